//! The llama architecture: Llama 1 to 3, SmolLM and SmolLM2, TinyLlama, Mistral 7B.
//!
//! Source: transformers models/llama, llama.cpp conversion/llama.py and src/models/llama.cpp.

use serde_json::{Map, Value as Json, json};

use super::decoder::{self, Keys, Sizes, Source, with};
use super::rope::{Rope, rope_of};
use super::table::Dim::{FeedForward, Hidden, KeyValue, Query, Vocabulary};
use super::table::{Line, line};
use super::{ArchError, Architecture, Config, ExtraTensor, TensorRule};
use crate::gguf::{Gguf, Value};

/// The table of this architecture.
pub const LLAMA: Architecture = Architecture {
    name: "llama",
    hugging_face: &["LlamaForCausalLM", "MistralForCausalLM"],
    models: "Llama 1 to 3.2, SmolLM, SmolLM2, TinyLlama, Mistral 7B",
    fixtures: &["llama-linear", "llama-yarn", "llama-factors", "mistral"],
    real: &["SmolLM2-135M-Instruct"],
    rope: &["linear", "yarn", "llama3"],
    tensors,
    extra_tensors,
    metadata,
    config,
};

/// Outside the layers. These three stand in most decoders.
pub(super) const OUTSIDE: &[Line] = &[EMBEDDINGS, line("model.norm", "output_norm", &[Hidden])];
pub(super) const EMBEDDINGS: Line = line("model.embed_tokens", "token_embd", &[Vocabulary, Hidden]);
pub(super) const HEAD: Line = line("lm_head", "output", &[Vocabulary, Hidden]);

/// In each layer; Granite's and SmolLM3's are the same.
pub(super) const LAYER: &[Line] = &[
    line("input_layernorm", "attn_norm", &[Hidden]),
    line("self_attn.q_proj", "attn_q", &[Query, Hidden])
        .rotated()
        .bias_if("attention_bias"),
    line("self_attn.k_proj", "attn_k", &[KeyValue, Hidden])
        .rotated()
        .bias_if("attention_bias"),
    line("self_attn.v_proj", "attn_v", &[KeyValue, Hidden]).bias_if("attention_bias"),
    line("self_attn.o_proj", "attn_output", &[Hidden, Query]).bias_if("attention_bias"),
    line("post_attention_layernorm", "ffn_norm", &[Hidden]),
    line("mlp.gate_proj", "ffn_gate", &[FeedForward, Hidden]).bias_if("mlp_bias"),
    line("mlp.up_proj", "ffn_up", &[FeedForward, Hidden]).bias_if("mlp_bias"),
    line("mlp.down_proj", "ffn_down", &[Hidden, FeedForward]).bias_if("mlp_bias"),
];

const THETA: f64 = 10_000.0;

fn rope(config: &Config<'_>) -> Result<Rope, ArchError> {
    Rope::whole(config, THETA, LLAMA.rope)
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    decoder::check_silu(config)?;
    decoder::warn_of_window(config)?;
    rope(config)?;
    let head = (!decoder::tied(config, false)?).then_some(&HEAD);
    decoder::tensors(config, &Sizes::new(config)?, OUTSIDE, head, |_| LAYER)
}

fn extra_tensors(config: &Map<String, Json>) -> Result<Vec<ExtraTensor>, ArchError> {
    let config = &Config(config);
    Ok(rope(config)?.tensors(Sizes::new(config)?.head_dim))
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    let mut keys = Keys::new(LLAMA.name, config, &sizes, &rope(config)?)?;
    keys.kv_heads(&sizes);
    keys.head_dim(&sizes);
    keys.size("vocab_size", sizes.vocabulary);
    keys.size("rope.dimension_count", sizes.head_dim);
    Ok(keys.done())
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let source = Source::new(gguf, LLAMA.name)?;
    let head_dim = source.rotated_head_dim()?;
    let rope = rope_of(&source, head_dim, THETA)?;
    let own = json!({
        "attention_bias": source.has("blk.0.attn_q.bias"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "mlp_bias": source.has("blk.0.ffn_up.bias"),
    });
    Ok(with(source.config(LLAMA.hugging_face[0], "llama", &rope)?, own))
}
