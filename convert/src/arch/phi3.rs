//! The phi3 architecture: Phi 3 and 3.5 mini, Phi 4 and Phi 4 mini.
//!
//! Source: transformers models/phi3, llama.cpp conversion/phi.py and src/models/phi3.cpp.

use serde_json::{Map, Value as Json, json};

use super::decoder::{self, Keys, Sizes, Source, with};
use super::llama::{HEAD, OUTSIDE};
use super::rope::{LongRope, Rope, Scaling, rope_of};
use super::table::Dim::{FeedForward, GateUp, Hidden, Query, QueryKeyValue};
use super::table::{Line, line};
use super::{ArchError, Architecture, Config, ExtraTensor, TensorRule};
use crate::gguf::{Gguf, Value};

/// The table of this architecture.
pub const PHI3: Architecture = Architecture {
    name: "phi3",
    hugging_face: &["Phi3ForCausalLM"],
    models: "Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4-mini",
    fixtures: &["phi", "phi-long", "phi-short"],
    real: &[],
    rope: &["longrope"],
    tensors,
    extra_tensors,
    metadata,
    config,
};

/// In each layer. Both sides have the same matrices fused.
const LAYER: &[Line] = &[
    line("input_layernorm", "attn_norm", &[Hidden]),
    line("self_attn.qkv_proj", "attn_qkv", &[QueryKeyValue, Hidden]),
    line("self_attn.o_proj", "attn_output", &[Hidden, Query]),
    line("post_attention_layernorm", "ffn_norm", &[Hidden]),
    line("mlp.gate_up_proj", "ffn_up", &[GateUp, Hidden]),
    line("mlp.down_proj", "ffn_down", &[Hidden, FeedForward]),
];

const THETA: f64 = 10_000.0;

fn rope(config: &Config<'_>) -> Result<Rope, ArchError> {
    let rope = Rope::new(config, THETA, PHI3.rope)?;
    if let Scaling::LongRope(longrope) = &rope.scaling {
        let wanted = rotated(&Sizes::new(config)?, rope.share) / 2;
        for (key, found) in [("short_factor", &longrope.short), ("long_factor", &longrope.long)] {
            if found.len() != wanted {
                return Err(config.error(
                    key,
                    format!("has {} elements, where {wanted} are needed", found.len()),
                ));
            }
        }
    }
    Ok(rope)
}

/// How many of a head's elements are rotated.
fn rotated(sizes: &Sizes, share: f64) -> usize {
    (share * sizes.hidden as f64) as usize / sizes.heads
}

/// The number of positions before the scaling.
fn original(config: &Config<'_>) -> Result<usize, ArchError> {
    let key = "original_max_position_embeddings";
    for at in ["rope_parameters", "rope_scaling"] {
        if let Some(Json::Object(own)) = config.get(at)
            && let Some(original) = Config(own).size_opt(key)?
        {
            return Ok(original);
        }
    }
    match config.size_opt(key)? {
        Some(original) => Ok(original),
        None => config.size("max_position_embeddings"),
    }
}

/// By how much the rotated queries and keys are multiplied (transformers, `_compute_longrope_parameters`).
fn attention_factor(longrope: &LongRope, context: f64, original: f64) -> f64 {
    let scale = context / original;
    longrope.attention_factor.unwrap_or(if scale > 1.0 {
        (1.0 + scale.ln() / original.ln()).sqrt()
    } else {
        1.0
    })
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    decoder::check_silu(config)?;
    sizes.check_heads(config)?;
    decoder::warn_of_window(config)?;
    rope(config)?;
    let head = (!decoder::tied(config, false)?).then_some(&HEAD);
    decoder::tensors(config, &sizes, OUTSIDE, head, |_| LAYER)
}

fn extra_tensors(config: &Map<String, Json>) -> Result<Vec<ExtraTensor>, ArchError> {
    let config = &Config(config);
    Ok(rope(config)?.tensors(Sizes::new(config)?.head_dim))
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    let rope = rope(config)?;
    let original = original(config)?;
    let mut keys = Keys::new(PHI3.name, config, &sizes, &rope)?;
    keys.kv_heads(&sizes);
    keys.size("rope.scaling.original_context_length", original);
    keys.size("rope.dimension_count", rotated(&sizes, rope.share));
    if let Scaling::LongRope(longrope) = &rope.scaling {
        let context = config.size("max_position_embeddings")? as f64;
        keys.float(
            "rope.scaling.attn_factor",
            attention_factor(longrope, context, original as f64),
        );
    }
    // llama.cpp tells Phi 4 by a window of 0.
    let window = config.size_opt("sliding_window")?.unwrap_or(0);
    keys.size("attention.sliding_window", window);
    Ok(keys.done())
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let source = Source::new(gguf, PHI3.name)?;
    let head_dim = source.head_dim()?;
    let context = source.unsigned("context_length")?;
    let original = source
        .unsigned_opt("rope.scaling.original_context_length")?
        .unwrap_or(context);
    let rotated = source.unsigned_opt("rope.dimension_count")?.unwrap_or(head_dim);
    // The share is cut to whole elements on both sides: this one gives the same number again.
    let share = rotated as f64 / head_dim.max(1) as f64;
    let mut rope = match (
        source.floats("rope_factors_short.weight"),
        source.floats("rope_factors_long.weight"),
    ) {
        (Some(short), Some(long)) => {
            let mut rope = json!({
                "rope_type": "longrope",
                "rope_theta": source.float_opt("rope.freq_base")?.unwrap_or(THETA),
                "short_factor": short.iter().map(|f| decoder::shortest(*f)).collect::<Vec<_>>(),
                "long_factor": long.iter().map(|f| decoder::shortest(*f)).collect::<Vec<_>>(),
                "original_max_position_embeddings": original,
            });
            let longrope = LongRope {
                short,
                long,
                attention_factor: None,
            };
            let implied = attention_factor(&longrope, context as f64, original as f64) as f32;
            let said = source.float_opt("rope.scaling.attn_factor")?.unwrap_or(1.0);
            if said as f32 != implied {
                rope["attention_factor"] = json!(said);
            }
            rope
        }
        _ => rope_of(&source, head_dim, THETA)?,
    };
    rope["partial_rotary_factor"] = json!(share);
    let window = source
        .unsigned_opt("attention.sliding_window")?
        .filter(|n| *n > 0);
    let own = json!({
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "partial_rotary_factor": share,
        "resid_pdrop": 0.0,
        "sliding_window": window,
    });
    Ok(with(source.config(PHI3.hugging_face[0], "phi3", &rope)?, own))
}
