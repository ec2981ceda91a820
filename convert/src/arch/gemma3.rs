//! The gemma3 architecture: Gemma 3 without its eyes.
//!
//! A checkpoint with a vision tower (`Gemma3ForConditionalGeneration`) is refused by name: half of it would be lost.
//!
//! Source: transformers models/gemma3, llama.cpp conversion/gemma.py and src/models/gemma3.cpp.

use serde_json::{Map, Value as Json, json};

use super::decoder::{self, Keys, Sizes, Source, with};
use super::gemma2::{OUTSIDE, check_gemma, with_gemma};
use super::llama::HEAD;
use super::rope::{Rope, rope_of};
use super::table::Dim::{FeedForward, Head, Hidden, KeyValue, Query};
use super::table::{Line, line};
use super::{ArchError, Architecture, Config, TensorRule, no_extra_tensors};
use crate::gguf::{Gguf, Value};

/// The table of this architecture.
pub const GEMMA3: Architecture = Architecture {
    name: "gemma3",
    hugging_face: &["Gemma3ForCausalLM"],
    models: "Gemma 3 270M and 1B, and the larger ones saved as text models",
    fixtures: &["gemma3", "gemma3-linear"],
    real: &["Gemma 3 270M"],
    rope: &["linear"],
    tensors,
    extra_tensors: no_extra_tensors,
    metadata,
    config,
};

/// In each layer: norms before and after both halves, and of queries and keys.
const LAYER: &[Line] = &[
    line("input_layernorm", "attn_norm", &[Hidden]).plus_one(),
    line("self_attn.q_proj", "attn_q", &[Query, Hidden]),
    line("self_attn.q_norm", "attn_q_norm", &[Head]).plus_one(),
    line("self_attn.k_proj", "attn_k", &[KeyValue, Hidden]),
    line("self_attn.k_norm", "attn_k_norm", &[Head]).plus_one(),
    line("self_attn.v_proj", "attn_v", &[KeyValue, Hidden]),
    line("self_attn.o_proj", "attn_output", &[Hidden, Query]),
    line("post_attention_layernorm", "post_attention_norm", &[Hidden]).plus_one(),
    line("pre_feedforward_layernorm", "ffn_norm", &[Hidden]).plus_one(),
    line("mlp.gate_proj", "ffn_gate", &[FeedForward, Hidden]),
    line("mlp.up_proj", "ffn_up", &[FeedForward, Hidden]),
    line("mlp.down_proj", "ffn_down", &[Hidden, FeedForward]),
    line("post_feedforward_layernorm", "post_ffw_norm", &[Hidden]).plus_one(),
];

const THETA: f64 = 1_000_000.0;
const LOCAL_THETA: f64 = 10_000.0;
const HEAD_DIM: usize = 256;
const LAYERS_OF_27B: usize = 62;
const PERIOD: usize = 6;

/// llama.cpp's order: every sixth layer sees everything.
fn window(layer: usize) -> bool {
    !(layer + 1).is_multiple_of(PERIOD)
}

fn sizes(config: &Config<'_>) -> Result<Sizes, ArchError> {
    Sizes::new(config).map(|sizes| sizes.head_dim_or(config, HEAD_DIM))
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    let sizes = sizes(config)?;
    check_gemma(config)?;
    for key in ["sliding_window_pattern", "_sliding_window_pattern"] {
        if config.size_opt(key)?.is_some_and(|period| period != PERIOD) {
            return Err(config.error(key, format!("is not {PERIOD}, the one that llama.cpp has")));
        }
    }
    decoder::check_windows(config, &sizes, window)?;
    decoder::check_gemma_scale(config, &sizes, LAYERS_OF_27B)?;
    if config.get("attn_logit_softcapping").is_some() {
        return Err(config.error(
            "attn_logit_softcapping",
            "is set; llama.cpp does not cap the attention here",
        ));
    }
    let head = (!decoder::tied(config, true)?).then_some(&HEAD);
    decoder::tensors(config, &sizes, OUTSIDE, head, |_| LAYER)
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = sizes(config)?;
    let mut rope = Rope::whole(config, THETA, GEMMA3.rope)?;
    rope.local_theta = rope.local_theta.or(Some(LOCAL_THETA));
    let mut keys = Keys::new(GEMMA3.name, config, &sizes, &rope)?;
    keys.kv_heads(&sizes);
    keys.head_dim(&sizes);
    if let Some(cap) = config.number_opt("final_logit_softcapping")? {
        keys.float("final_logit_softcapping", cap);
    }
    keys.size("attention.sliding_window", config.size("sliding_window")?);
    Ok(keys.done())
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let source = Source::new(gguf, GEMMA3.name)?;
    let head_dim = source.rotated_head_dim()?;
    let local = source.float_opt("rope.freq_base_swa")?.unwrap_or(LOCAL_THETA);
    let full = rope_of(&source, head_dim, THETA)?;
    let config = source.config(GEMMA3.hugging_face[0], "gemma3_text", &full)?;
    let own = json!({
        "attn_logit_softcapping": null,
        "final_logit_softcapping": source.float_opt("final_logit_softcapping")?,
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "sliding_window": source.unsigned("attention.sliding_window")?,
        "sliding_window_pattern": PERIOD,
        "use_bidirectional_attention": false,
    });
    with_gemma(&source, with(config, own), LAYERS_OF_27B, window)
}
