//! The smollm3 architecture: llama, with every fourth layer not rotated.
//!
//! Source: transformers models/smollm3, llama.cpp conversion/llama.py and src/models/smollm3.cpp.

use serde_json::{Map, Value as Json, json};

use super::decoder::{self, Keys, Sizes, Source, with};
use super::llama::{HEAD, LAYER, OUTSIDE};
use super::rope::{Rope, rope_of};
use super::{ArchError, Architecture, Config, TensorRule, no_extra_tensors};
use crate::gguf::{Gguf, Value};

/// The table of this architecture.
pub const SMOLLM3: Architecture = Architecture {
    name: "smollm3",
    hugging_face: &["SmolLM3ForCausalLM"],
    models: "SmolLM3 3B",
    fixtures: &["smollm3", "smollm3-untied"],
    real: &[],
    rope: &["linear", "yarn"],
    tensors,
    extra_tensors: no_extra_tensors,
    metadata,
    config,
};

const THETA: f64 = 2_000_000.0;
/// llama.cpp has this number in its code, not in the file.
const INTERVAL: usize = 4;

/// `no_rope_layers`: 1 for a layer that is rotated.
fn rotated_layers(layers: usize) -> Vec<Json> {
    (1..=layers)
        .map(|layer| json!(u8::from(!layer.is_multiple_of(INTERVAL))))
        .collect()
}

fn rope(config: &Config<'_>) -> Result<Rope, ArchError> {
    Rope::whole(config, THETA, SMOLLM3.rope)
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    decoder::check_silu(config)?;
    decoder::check_off(config, &["attention_bias", "mlp_bias"])?;
    if config.flag("use_sliding_window")? {
        decoder::warn_of_window(config)?;
    }
    let layers = config.get("no_rope_layers").and_then(Json::as_array);
    let interval = config.size_opt("no_rope_layer_interval")?;
    let differs = match layers {
        Some(layers) => *layers != rotated_layers(sizes.layers),
        None => interval.is_some_and(|interval| interval != INTERVAL),
    };
    if differs {
        return Err(config.error(
            "no_rope_layers",
            format!("leaves other layers unrotated than every {INTERVAL}th, as llama.cpp does"),
        ));
    }
    rope(config)?;
    let head = (!decoder::tied(config, true)?).then_some(&HEAD);
    decoder::tensors(config, &sizes, OUTSIDE, head, |_| LAYER)
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    let mut keys = Keys::new(SMOLLM3.name, config, &sizes, &rope(config)?)?;
    keys.kv_heads(&sizes);
    keys.head_dim_if_given(config, &sizes);
    keys.size("vocab_size", sizes.vocabulary);
    keys.size("rope.dimension_count", sizes.head_dim);
    Ok(keys.done())
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let source = Source::new(gguf, SMOLLM3.name)?;
    let head_dim = source.rotated_head_dim()?;
    let rope = rope_of(&source, head_dim, THETA)?;
    let mut config = source.config(SMOLLM3.hugging_face[0], "smollm3", &rope)?;
    let layers = Sizes::new(&Config(&config))?.layers;
    if source.unsigned_opt("attention.key_length")?.is_some() {
        config.insert("head_dim".into(), json!(head_dim));
    }
    let own = json!({
        "attention_bias": false,
        "hidden_act": "silu",
        "layer_types": decoder::layer_types(layers, |_| false),
        "mlp_bias": false,
        "no_rope_layer_interval": INTERVAL,
        "no_rope_layers": rotated_layers(layers),
        "sliding_window": null,
        "use_sliding_window": false,
    });
    Ok(with(config, own))
}
