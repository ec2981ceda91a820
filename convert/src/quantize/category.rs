//! What a tensor is for, by its name in the GGUF file, and whether llama.cpp quantises it at all.

/// The roles that the mixes distinguish (llama-quant.cpp, `tensor_get_category`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Category {
    TokenEmbd,
    AttnQ,
    /// Also a fused attn_qkv, which the mixes treat the same.
    AttnV,
    AttnK,
    AttnOutput,
    FfnUp,
    FfnGate,
    FfnDown,
    Output,
    Other,
}

/// Parts of names, in the order in which llama.cpp looks for them.
const BY_PART: &[(&str, Category)] = &[
    ("attn_qkv.weight", Category::AttnV),
    ("attn_kv_b.weight", Category::AttnV),
    ("attn_v.weight", Category::AttnV),
    ("attn_k.weight", Category::AttnK),
    ("attn_q.weight", Category::AttnQ),
    ("attn_output.weight", Category::AttnOutput),
    ("ffn_up", Category::FfnUp),
    ("ffn_gate", Category::FfnGate),
    ("ffn_down", Category::FfnDown),
];

impl Category {
    pub(super) fn of(name: &str) -> Self {
        match name {
            "output.weight" => Self::Output,
            "token_embd.weight" | "per_layer_token_embd.weight" => Self::TokenEmbd,
            _ => BY_PART
                .iter()
                .find(|(part, _)| name.contains(part))
                .map_or(Self::Other, |(_, category)| *category),
        }
    }
}

/// Parts of the names of matrices that stay as they are (llama-quant.cpp, `tensor_allows_quantization`): small
/// ones, and those that decide where values go. Of llama.cpp's list, what the architectures of this program have.
const KEPT: &[&str] = &[
    "_norm.weight",
    "ffn_gate_inp.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "attn_rel_b.weight",
    ".position_embd",
];

/// Why a tensor is not quantised, if it is not.
pub(super) fn kept(name: &str, dimensions: &[u64]) -> Option<&'static str> {
    // ggml does not count trailing dimensions of 1.
    if dimensions.iter().skip(1).all(|n| *n == 1) {
        return Some("a vector");
    }
    if !name.ends_with("weight") {
        return Some("no weight");
    }
    let named = ["position_embd.weight", "token_types.weight"].contains(&name);
    (named || KEPT.iter().any(|part| name.contains(part))).then_some("llama.cpp does not quantise it")
}

/// The number after `blk.`, -1 for a tensor outside the layers.
pub(super) fn layer(name: &str) -> i64 {
    let digits = name.strip_prefix("blk.").unwrap_or("");
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().unwrap_or(-1)
}
