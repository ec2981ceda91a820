//! The lfm2 architecture: short convolutions, with attention in a few layers.
//!
//! Source: transformers models/lfm2, llama.cpp conversion/lfm2.py and src/models/lfm2.cpp.

use serde_json::{Map, Value as Json, json};

use super::decoder::{self, Keys, Sizes, Source, with};
use super::llama::{EMBEDDINGS, HEAD};
use super::rope::{Rope, rope_of};
use super::table::Dim::{ConvInputs, FeedForward, Head, Hidden, Kernel, KeyValue, One, Query};
use super::table::{Line, line};
use super::{ArchError, Architecture, Config, TensorRule, no_extra_tensors};
use crate::gguf::{Array, Gguf, Value};

/// The table of this architecture.
pub const LFM2: Architecture = Architecture {
    name: "lfm2",
    hugging_face: &["Lfm2ForCausalLM"],
    models: "LFM2 350M, 700M, 1.2B and 2.6B, and LFM2.5",
    fixtures: &["lfm2", "lfm2-untied"],
    real: &[],
    rope: &["linear", "yarn"],
    tensors,
    extra_tensors: no_extra_tensors,
    metadata,
    config,
};

/// Outside the layers. The last norm has the name of the first one: llama.cpp calls it so too.
const OUTSIDE: &[Line] = &[
    EMBEDDINGS,
    line("model.embedding_norm", "token_embd_norm", &[Hidden]),
];

const NORM: Line = line("operator_norm", "attn_norm", &[Hidden]);
const FEED_FORWARD: [Line; 4] = [
    line("ffn_norm", "ffn_norm", &[Hidden]),
    line("feed_forward.w1", "ffn_gate", &[FeedForward, Hidden]),
    line("feed_forward.w3", "ffn_up", &[FeedForward, Hidden]),
    line("feed_forward.w2", "ffn_down", &[Hidden, FeedForward]),
];

/// In a layer with a convolution.
const CONVOLUTION: &[Line] = &[
    NORM,
    line("conv.in_proj", "shortconv.in_proj", &[ConvInputs, Hidden]),
    line("conv.conv", "shortconv.conv", &[Hidden, One, Kernel]).always_f32(),
    line("conv.out_proj", "shortconv.out_proj", &[Hidden, Hidden]),
    FEED_FORWARD[0],
    FEED_FORWARD[1],
    FEED_FORWARD[2],
    FEED_FORWARD[3],
];

/// In a layer with attention.
const ATTENTION: &[Line] = &[
    NORM,
    line("self_attn.q_proj", "attn_q", &[Query, Hidden]),
    line("self_attn.q_layernorm", "attn_q_norm", &[Head]),
    line("self_attn.k_proj", "attn_k", &[KeyValue, Hidden]),
    line("self_attn.k_layernorm", "attn_k_norm", &[Head]),
    line("self_attn.v_proj", "attn_v", &[KeyValue, Hidden]),
    line("self_attn.out_proj", "attn_output", &[Hidden, Query]),
    FEED_FORWARD[0],
    FEED_FORWARD[1],
    FEED_FORWARD[2],
    FEED_FORWARD[3],
];

const THETA: f64 = 1_000_000.0;

fn rope(config: &Config<'_>) -> Result<Rope, ArchError> {
    Rope::whole(config, THETA, LFM2.rope)
}

fn sizes(config: &Config<'_>) -> Result<Sizes, ArchError> {
    let mut sizes = Sizes::with_feed_forward(config, feed_forward(config)?)?;
    sizes.kernel = config.size_opt("conv_L_cache")?.unwrap_or(3);
    Ok(sizes)
}

/// The configuration has the length that a layer without a gate would need; with one it is two thirds of it,
/// rounded up.
fn feed_forward(config: &Config<'_>) -> Result<usize, ArchError> {
    let given = match config.size_opt("block_ff_dim")? {
        Some(length) => length,
        None => config.size("intermediate_size")?,
    };
    if config.get("block_auto_adjust_ff_dim").is_some() && !config.flag("block_auto_adjust_ff_dim")? {
        return Ok(given);
    }
    let multiplier = config.number_opt("block_ffn_dim_multiplier")?.unwrap_or(1.0);
    let exact = (multiplier * (2 * given / 3) as f64) as usize;
    let of = config.size_opt("block_multiple_of")?.unwrap_or(256);
    match exact.checked_next_multiple_of(of) {
        Some(length @ 1..=0x8000_0000) => Ok(length),
        _ => Err(config.error(
            "block_ffn_dim_multiplier",
            format!("makes the feed-forward length {exact}, in multiples of {of}"),
        )),
    }
}

/// For each layer, whether it attends.
fn attends(config: &Config<'_>, sizes: &Sizes) -> Result<Vec<bool>, ArchError> {
    if let Some(types) = config.get("layer_types").and_then(Json::as_array) {
        let known = |kind: &Json| match kind.as_str() {
            Some("conv") => Ok(false),
            Some("full_attention") => Ok(true),
            _ => Err(config.error("layer_types", format!("has {kind}, which is not built"))),
        };
        let attends = types.iter().map(known).collect::<Result<Vec<_>, _>>()?;
        if attends.len() != sizes.layers {
            return Err(config.error("layer_types", "has another length than num_hidden_layers"));
        }
        return Ok(attends);
    }
    match config.get("full_attn_idxs").and_then(Json::as_array) {
        Some(layers) => Ok((0..sizes.layers)
            .map(|layer| layers.contains(&json!(layer)))
            .collect()),
        None => Ok(vec![true; sizes.layers]),
    }
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    let sizes = sizes(config)?;
    decoder::check_off(config, &["conv_bias"])?;
    sizes.check_heads(config)?;
    rope(config)?;
    let tied = match config.get("tie_embedding") {
        Some(_) => config.flag("tie_embedding")?,
        None => decoder::tied(config, true)?,
    };
    let attends = attends(config, &sizes)?;
    let head = (!tied).then_some(&HEAD);
    decoder::tensors(config, &sizes, OUTSIDE, head, |layer| {
        if attends[layer] { ATTENTION } else { CONVOLUTION }
    })
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = sizes(config)?;
    let mut keys = Keys::new(LFM2.name, config, &sizes, &rope(config)?)?;
    let heads = attends(config, &sizes)?
        .into_iter()
        .map(|attends| if attends { sizes.kv_heads as i32 } else { 0 })
        .collect();
    keys.add("attention.head_count_kv", Value::Array(Array::I32(heads)));
    keys.head_dim_if_given(config, &sizes);
    keys.size("vocab_size", sizes.vocabulary);
    keys.size("shortconv.l_cache", sizes.kernel);
    Ok(keys.done())
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let source = Source::new(gguf, LFM2.name)?;
    if source.unsigned_opt("attention.sliding_window")?.unwrap_or(0) > 0 {
        return Err(source.error("attention.sliding_window", "is set, which is not built"));
    }
    let rope = rope_of(&source, source.rotated_head_dim()?, THETA)?;
    let mut config = source.config(LFM2.hugging_face[0], "lfm2", &rope)?;
    let epsilon = config.remove("rms_norm_eps");
    let layers = Sizes::new(&Config(&config))?.layers;
    let kv_heads = source.kv_heads()?;
    if kv_heads.len() != layers {
        return Err(source.error("attention.head_count_kv", "has no element for every layer"));
    }
    let attends = || kv_heads.iter().map(|heads| *heads > 0);
    let types: Vec<_> = attends()
        .map(|attends| if attends { "full_attention" } else { "conv" })
        .collect();
    let attending: Vec<_> = (0..layers)
        .zip(attends())
        .filter_map(|(layer, attends)| attends.then_some(layer))
        .collect();
    let own = json!({
        "block_auto_adjust_ff_dim": false,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "conv_L_cache": source.unsigned("shortconv.l_cache")?,
        "conv_bias": false,
        "full_attn_idxs": attending,
        "layer_types": types,
        "norm_eps": epsilon,
    });
    Ok(with(config, own))
}
