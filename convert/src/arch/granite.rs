//! The granite architecture: llama with four multipliers.
//!
//! Source: transformers models/granite, llama.cpp conversion/granite.py and src/models/granite.cpp.

use serde_json::{Map, Value as Json, json};

use super::decoder::{self, Keys, Sizes, Source, with};
use super::llama::{HEAD, LAYER, OUTSIDE};
use super::rope::{Rope, rope_of};
use super::{ArchError, Architecture, Config, TensorRule, no_extra_tensors};
use crate::gguf::{Gguf, Value};

/// The table of this architecture.
pub const GRANITE: Architecture = Architecture {
    name: "granite",
    hugging_face: &["GraniteForCausalLM"],
    models: "Granite 3.0 to 3.3 2B and 8B",
    fixtures: &["granite", "granite-biases"],
    real: &[],
    rope: &["linear", "yarn"],
    tensors,
    extra_tensors: no_extra_tensors,
    metadata,
    config,
};

/// The key of a GGUF file, and the name in `config.json`.
const MULTIPLIERS: &[(&str, &str)] = &[
    ("attention.scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
];

const THETA: f64 = 10_000.0;

fn rope(config: &Config<'_>) -> Result<Rope, ArchError> {
    Rope::whole(config, THETA, GRANITE.rope)
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    decoder::check_silu(config)?;
    sizes.check_heads(config)?;
    rope(config)?;
    let head = (!decoder::tied(config, false)?).then_some(&HEAD);
    decoder::tensors(config, &sizes, OUTSIDE, head, |_| LAYER)
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    let mut keys = Keys::new(GRANITE.name, config, &sizes, &rope(config)?)?;
    keys.kv_heads(&sizes);
    keys.size("vocab_size", sizes.vocabulary);
    keys.size("rope.dimension_count", sizes.head_dim);
    for (key, name) in MULTIPLIERS {
        let multiplier = config.number_opt(name)?.unwrap_or(1.0);
        // llama.cpp takes 0 for a multiplier that is not there.
        if multiplier == 0.0 {
            return Err(config.error(name, "is 0"));
        }
        keys.float(key, multiplier);
    }
    Ok(keys.done())
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let source = Source::new(gguf, GRANITE.name)?;
    let head_dim = source.rotated_head_dim()?;
    let rope = rope_of(&source, head_dim, THETA)?;
    let mut config = source.config(GRANITE.hugging_face[0], "granite", &rope)?;
    for (key, name) in MULTIPLIERS {
        let absent = match *key {
            "attention.scale" => 1.0 / (head_dim.max(1) as f64).sqrt(),
            _ => 1.0,
        };
        let multiplier = source.float_opt(key)?.filter(|value| *value != 0.0);
        config.insert((*name).into(), json!(multiplier.unwrap_or(absent)));
    }
    let own = json!({
        "attention_bias": source.has("blk.0.attn_q.bias"),
        "hidden_act": "silu",
        "mlp_bias": source.has("blk.0.ffn_up.bias"),
    });
    Ok(with(config, own))
}
