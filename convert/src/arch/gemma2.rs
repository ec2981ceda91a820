//! The gemma2 architecture.
//!
//! Source: transformers models/gemma2, llama.cpp conversion/gemma.py and src/models/gemma2.cpp.

use serde_json::{Map, Value as Json, json};

use super::decoder::{self, Keys, Sizes, Source, with};
use super::llama::EMBEDDINGS;
use super::rope::{Rope, rope_of};
use super::table::Dim::{FeedForward, Hidden, KeyValue, Query};
use super::table::{Line, line};
use super::{ArchError, Architecture, Config, TensorRule, no_extra_tensors};
use crate::gguf::{Gguf, Value};

/// The table of this architecture.
pub const GEMMA2: Architecture = Architecture {
    name: "gemma2",
    hugging_face: &["Gemma2ForCausalLM"],
    models: "Gemma 2 2B, 9B and 27B",
    fixtures: &["gemma2"],
    real: &[],
    rope: &[],
    tensors,
    extra_tensors: no_extra_tensors,
    metadata,
    config,
};

/// Outside the layers. The embeddings are always the output matrix too.
pub(super) const OUTSIDE: &[Line] = &[
    EMBEDDINGS,
    line("model.norm", "output_norm", &[Hidden]).plus_one(),
];

/// In each layer: norms before and after both halves.
const LAYER: &[Line] = &[
    line("input_layernorm", "attn_norm", &[Hidden]).plus_one(),
    line("self_attn.q_proj", "attn_q", &[Query, Hidden]),
    line("self_attn.k_proj", "attn_k", &[KeyValue, Hidden]),
    line("self_attn.v_proj", "attn_v", &[KeyValue, Hidden]),
    line("self_attn.o_proj", "attn_output", &[Hidden, Query]),
    line("post_attention_layernorm", "post_attention_norm", &[Hidden]).plus_one(),
    line("pre_feedforward_layernorm", "ffn_norm", &[Hidden]).plus_one(),
    line("mlp.gate_proj", "ffn_gate", &[FeedForward, Hidden]),
    line("mlp.up_proj", "ffn_up", &[FeedForward, Hidden]),
    line("mlp.down_proj", "ffn_down", &[Hidden, FeedForward]),
    line("post_feedforward_layernorm", "post_ffw_norm", &[Hidden]).plus_one(),
];

const THETA: f64 = 10_000.0;
const HEAD_DIM: usize = 256;
const LAYERS_OF_27B: usize = 46;

/// llama.cpp's order: every second layer sees a window, from the first one on.
fn window(layer: usize) -> bool {
    layer.is_multiple_of(2)
}

fn sizes(config: &Config<'_>) -> Result<Sizes, ArchError> {
    Sizes::new(config).map(|sizes| sizes.head_dim_or(config, HEAD_DIM))
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    let sizes = sizes(config)?;
    check_gemma(config)?;
    decoder::check_windows(config, &sizes, window)?;
    decoder::check_gemma_scale(config, &sizes, LAYERS_OF_27B)?;
    if !decoder::tied(config, true)? {
        return Err(config.error(
            "tie_word_embeddings",
            "is false; llama.cpp has no output matrix here",
        ));
    }
    decoder::tensors(config, &sizes, OUTSIDE, None, |_| LAYER)
}

/// What neither Gemma 2 nor Gemma 3 may have.
pub(super) fn check_gemma(config: &Config<'_>) -> Result<(), ArchError> {
    for key in ["hidden_activation", "hidden_act"] {
        decoder::check_activation(config, key, &["gelu_pytorch_tanh", "gelu"])?;
    }
    decoder::check_off(config, &["attention_bias", "use_bidirectional_attention"])
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = sizes(config)?;
    let rope = Rope::whole(config, THETA, GEMMA2.rope)?;
    let mut keys = Keys::new(GEMMA2.name, config, &sizes, &rope)?;
    keys.kv_heads(&sizes);
    keys.head_dim(&sizes);
    for (key, name, default) in [
        ("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", "final_logit_softcapping", 30.0),
    ] {
        if config.0.get(name).is_some_and(Json::is_null) {
            return Err(config.error(name, "is null; llama.cpp always caps here"));
        }
        keys.float(key, config.number_opt(name)?.unwrap_or(default));
    }
    keys.size(
        "attention.sliding_window",
        config.size_opt("sliding_window")?.unwrap_or(4096),
    );
    Ok(keys.done())
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let source = Source::new(gguf, GEMMA2.name)?;
    let rope = rope_of(&source, source.rotated_head_dim()?, THETA)?;
    let config = source.config(GEMMA2.hugging_face[0], "gemma2", &rope)?;
    let own = json!({
        "attn_logit_softcapping": source.float_opt("attn_logit_softcapping")?.unwrap_or(50.0),
        "final_logit_softcapping": source.float_opt("final_logit_softcapping")?.unwrap_or(30.0),
        "sliding_window": source.unsigned_opt("attention.sliding_window")?.unwrap_or(4096),
    });
    with_gemma(&source, with(config, own), LAYERS_OF_27B, window)
}

/// What Gemma 2 and Gemma 3 spell alike.
pub(super) fn with_gemma(
    source: &Source<'_>,
    config: Map<String, Json>,
    layers_of_27b: usize,
    window: impl Fn(usize) -> bool,
) -> Result<Map<String, Json>, ArchError> {
    let config = with(config, json!({"head_dim": source.head_dim()?}));
    let sizes = Sizes::new(&Config(&config))?;
    let own = json!({
        "attention_bias": false,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": decoder::layer_types(sizes.layers, window),
        "query_pre_attn_scalar":
            decoder::gemma_scale(sizes.layers, sizes.hidden, sizes.heads, sizes.head_dim, layers_of_27b),
    });
    Ok(with(config, own))
}
