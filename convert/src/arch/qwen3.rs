//! The qwen3 architecture: the dense models of Qwen 3.
//!
//! Source: transformers models/qwen3, llama.cpp conversion/qwen.py and src/models/qwen3.cpp.

use serde_json::{Map, Value as Json, json};

use super::decoder::{self, Keys, Sizes, Source, with};
use super::llama::{HEAD, OUTSIDE};
use super::rope::{Rope, rope_of};
use super::table::Dim::{FeedForward, Head, Hidden, KeyValue, Query};
use super::table::{Line, line};
use super::{ArchError, Architecture, Config, TensorRule, no_extra_tensors};
use crate::gguf::{Gguf, Value};

/// The table of this architecture.
pub const QWEN3: Architecture = Architecture {
    name: "qwen3",
    hugging_face: &["Qwen3ForCausalLM"],
    models: "Qwen3 0.6B to 32B",
    fixtures: &["qwen3", "qwen3-untied"],
    real: &[],
    rope: &["linear", "yarn"],
    tensors,
    extra_tensors: no_extra_tensors,
    metadata,
    config,
};

/// In each layer. Queries and keys are normed head by head.
const LAYER: &[Line] = &[
    line("input_layernorm", "attn_norm", &[Hidden]),
    line("self_attn.q_proj", "attn_q", &[Query, Hidden]),
    line("self_attn.q_norm", "attn_q_norm", &[Head]),
    line("self_attn.k_proj", "attn_k", &[KeyValue, Hidden]),
    line("self_attn.k_norm", "attn_k_norm", &[Head]),
    line("self_attn.v_proj", "attn_v", &[KeyValue, Hidden]),
    line("self_attn.o_proj", "attn_output", &[Hidden, Query]),
    line("post_attention_layernorm", "ffn_norm", &[Hidden]),
    line("mlp.gate_proj", "ffn_gate", &[FeedForward, Hidden]),
    line("mlp.up_proj", "ffn_up", &[FeedForward, Hidden]),
    line("mlp.down_proj", "ffn_down", &[Hidden, FeedForward]),
];

const THETA: f64 = 10_000.0;
/// The length of a head where `config.json` does not say.
const HEAD_DIM: usize = 128;

fn sizes(config: &Config<'_>) -> Result<Sizes, ArchError> {
    Sizes::new(config).map(|sizes| sizes.head_dim_or(config, HEAD_DIM))
}

fn rope(config: &Config<'_>) -> Result<Rope, ArchError> {
    Rope::whole(config, THETA, QWEN3.rope)
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    decoder::check_silu(config)?;
    decoder::check_off(config, &["attention_bias"])?;
    if config.flag("use_sliding_window")? {
        decoder::warn_of_window(config)?;
    }
    rope(config)?;
    let head = (!decoder::tied(config, false)?).then_some(&HEAD);
    decoder::tensors(config, &sizes(config)?, OUTSIDE, head, |_| LAYER)
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = sizes(config)?;
    let mut keys = Keys::new(QWEN3.name, config, &sizes, &rope(config)?)?;
    keys.kv_heads(&sizes);
    keys.head_dim(&sizes);
    Ok(keys.done())
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let source = Source::new(gguf, QWEN3.name)?;
    let head_dim = source.rotated_head_dim()?;
    let rope = rope_of(&source, head_dim, THETA)?;
    let own = json!({
        "attention_bias": false,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "sliding_window": null,
        "use_sliding_window": false,
    });
    Ok(with(source.config(QWEN3.hugging_face[0], "qwen3", &rope)?, own))
}
