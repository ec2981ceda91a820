//! The olmo2 architecture: norms after both halves instead of before them, and of all queries and keys at once.
//!
//! Source: transformers models/olmo2, llama.cpp conversion/olmo.py and src/models/olmo2.cpp.

use serde_json::{Map, Value as Json, json};

use super::decoder::{self, Keys, Sizes, Source, with};
use super::llama::{HEAD, OUTSIDE};
use super::rope::{Rope, rope_of};
use super::table::Dim::{FeedForward, Hidden, KeyValue, Query};
use super::table::{Line, line};
use super::{ArchError, Architecture, Config, TensorRule, no_extra_tensors};
use crate::gguf::{Gguf, Value};

/// The table of this architecture.
pub const OLMO2: Architecture = Architecture {
    name: "olmo2",
    hugging_face: &["Olmo2ForCausalLM"],
    models: "OLMo 2 1B to 32B",
    fixtures: &["olmo2", "olmo2-yarn"],
    real: &[],
    rope: &["linear", "yarn"],
    tensors,
    extra_tensors: no_extra_tensors,
    metadata,
    config,
};

/// In each layer.
const LAYER: &[Line] = &[
    line("self_attn.q_proj", "attn_q", &[Query, Hidden]),
    line("self_attn.q_norm", "attn_q_norm", &[Query]),
    line("self_attn.k_proj", "attn_k", &[KeyValue, Hidden]),
    line("self_attn.k_norm", "attn_k_norm", &[KeyValue]),
    line("self_attn.v_proj", "attn_v", &[KeyValue, Hidden]),
    line("self_attn.o_proj", "attn_output", &[Hidden, Query]),
    line("post_attention_layernorm", "post_attention_norm", &[Hidden]),
    line("mlp.gate_proj", "ffn_gate", &[FeedForward, Hidden]),
    line("mlp.up_proj", "ffn_up", &[FeedForward, Hidden]),
    line("mlp.down_proj", "ffn_down", &[Hidden, FeedForward]),
    line("post_feedforward_layernorm", "post_ffw_norm", &[Hidden]),
];

const THETA: f64 = 10_000.0;

fn rope(config: &Config<'_>) -> Result<Rope, ArchError> {
    Rope::whole(config, THETA, OLMO2.rope)
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    decoder::check_silu(config)?;
    decoder::check_off(config, &["attention_bias"])?;
    sizes.check_heads(config)?;
    rope(config)?;
    if decoder::tied(config, false)? {
        return Err(config.error(
            "tie_word_embeddings",
            "is true; llama.cpp needs an output matrix here",
        ));
    }
    decoder::tensors(config, &sizes, OUTSIDE, Some(&HEAD), |_| LAYER)
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    let mut keys = Keys::new(OLMO2.name, config, &sizes, &rope(config)?)?;
    keys.kv_heads(&sizes);
    keys.head_dim_if_given(config, &sizes);
    Ok(keys.done())
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let source = Source::new(gguf, OLMO2.name)?;
    if source.unsigned_opt("attention.sliding_window")?.unwrap_or(0) > 0 {
        return Err(source.error(
            "attention.sliding_window",
            "makes it an OLMo 3, which is not built",
        ));
    }
    let rope = rope_of(&source, source.rotated_head_dim()?, THETA)?;
    let own = json!({"attention_bias": false, "hidden_act": "silu"});
    Ok(with(source.config(OLMO2.hugging_face[0], "olmo2", &rope)?, own))
}
