//! The qwen2 architecture: Qwen 2 and 2.5, and what was distilled into them.
//!
//! Source: transformers models/qwen2, llama.cpp conversion/qwen.py and src/models/qwen2.cpp.

use serde_json::{Map, Value as Json, json};

use super::decoder::{self, Keys, Sizes, Source, with};
use super::llama::{HEAD, OUTSIDE};
use super::rope::{Rope, rope_of};
use super::table::Dim::{FeedForward, Hidden, KeyValue, Query};
use super::table::{Line, line};
use super::{ArchError, Architecture, Config, TensorRule, no_extra_tensors};
use crate::gguf::{Gguf, Value};

/// The table of this architecture.
pub const QWEN2: Architecture = Architecture {
    name: "qwen2",
    hugging_face: &["Qwen2ForCausalLM"],
    models: "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    fixtures: &["qwen2", "qwen2-yarn"],
    real: &[],
    rope: &["linear", "yarn"],
    tensors,
    extra_tensors: no_extra_tensors,
    metadata,
    config,
};

/// In each layer. Queries, keys and values have biases, the output has none.
const LAYER: &[Line] = &[
    line("input_layernorm", "attn_norm", &[Hidden]),
    line("self_attn.q_proj", "attn_q", &[Query, Hidden]).bias(),
    line("self_attn.k_proj", "attn_k", &[KeyValue, Hidden]).bias(),
    line("self_attn.v_proj", "attn_v", &[KeyValue, Hidden]).bias(),
    line("self_attn.o_proj", "attn_output", &[Hidden, Query]),
    line("post_attention_layernorm", "ffn_norm", &[Hidden]),
    line("mlp.gate_proj", "ffn_gate", &[FeedForward, Hidden]),
    line("mlp.up_proj", "ffn_up", &[FeedForward, Hidden]),
    line("mlp.down_proj", "ffn_down", &[Hidden, FeedForward]),
];

const THETA: f64 = 10_000.0;

fn rope(config: &Config<'_>) -> Result<Rope, ArchError> {
    Rope::whole(config, THETA, QWEN2.rope)
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    decoder::check_silu(config)?;
    sizes.check_heads(config)?;
    if config.flag("use_sliding_window")? {
        decoder::warn_of_window(config)?;
    }
    rope(config)?;
    let head = (!decoder::tied(config, false)?).then_some(&HEAD);
    decoder::tensors(config, &sizes, OUTSIDE, head, |_| LAYER)
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    let mut keys = Keys::new(QWEN2.name, config, &sizes, &rope(config)?)?;
    keys.kv_heads(&sizes);
    keys.head_dim_if_given(config, &sizes);
    Ok(keys.done())
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let source = Source::new(gguf, QWEN2.name)?;
    let rope = rope_of(&source, source.rotated_head_dim()?, THETA)?;
    let own = json!({"hidden_act": "silu", "use_sliding_window": false, "sliding_window": null});
    Ok(with(source.config(QWEN2.hugging_face[0], "qwen2", &rope)?, own))
}
