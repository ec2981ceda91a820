//! The llama architecture: Llama 1 to 3, SmolLM and SmolLM2, TinyLlama, Mistral 7B.
//!
//! Source: transformers models/llama, llama.cpp conversion/llama.py and src/models/llama.cpp.

mod rope;

use rope::{Rope, llama3_factors, rope_of};
use serde_json::{Map, Value as Json, json};

use super::{ArchError, Architecture, Change, Config, ExtraTensor, RowOrder, TensorRule};
use crate::gguf::{Gguf, GgufError, Value};

/// The table of this architecture.
pub const LLAMA: Architecture = Architecture {
    name: "llama",
    hugging_face: &["LlamaForCausalLM", "MistralForCausalLM"],
    tensors,
    extra_tensors,
    metadata,
    config,
};

/// The name of the tensor that scales the rotation's frequencies.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// More layers than any model has: what is more is damage, and must not cost memory.
const MAX_LAYERS: usize = 4096;

/// A dimension, by what it counts.
#[derive(Clone, Copy)]
enum Dim {
    Vocabulary,
    Hidden,
    Query,
    KeyValue,
    FeedForward,
}
use Dim::{FeedForward, Hidden, KeyValue, Query, Vocabulary};

/// Checkpoint name, GGUF name (both without `.weight` or `.bias`), shape, whether the rows are rotated.
type Rule = (&'static str, &'static str, &'static [Dim], bool);

/// Outside the layers.
const OUTER: &[Rule] = &[
    ("model.embed_tokens", "token_embd", &[Vocabulary, Hidden], false),
    ("model.norm", "output_norm", &[Hidden], false),
];
const HEAD: Rule = ("lm_head", "output", &[Vocabulary, Hidden], false);

/// In layer `{}`.
const LAYER: &[Rule] = &[
    (
        "model.layers.{}.input_layernorm",
        "blk.{}.attn_norm",
        &[Hidden],
        false,
    ),
    (
        "model.layers.{}.self_attn.q_proj",
        "blk.{}.attn_q",
        &[Query, Hidden],
        true,
    ),
    (
        "model.layers.{}.self_attn.k_proj",
        "blk.{}.attn_k",
        &[KeyValue, Hidden],
        true,
    ),
    (
        "model.layers.{}.self_attn.v_proj",
        "blk.{}.attn_v",
        &[KeyValue, Hidden],
        false,
    ),
    (
        "model.layers.{}.self_attn.o_proj",
        "blk.{}.attn_output",
        &[Hidden, Query],
        false,
    ),
    (
        "model.layers.{}.post_attention_layernorm",
        "blk.{}.ffn_norm",
        &[Hidden],
        false,
    ),
    (
        "model.layers.{}.mlp.gate_proj",
        "blk.{}.ffn_gate",
        &[FeedForward, Hidden],
        false,
    ),
    (
        "model.layers.{}.mlp.up_proj",
        "blk.{}.ffn_up",
        &[FeedForward, Hidden],
        false,
    ),
    (
        "model.layers.{}.mlp.down_proj",
        "blk.{}.ffn_down",
        &[Hidden, FeedForward],
        false,
    ),
];

/// The sizes that `config.json` gives.
struct Sizes {
    vocabulary: usize,
    hidden: usize,
    feed_forward: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Sizes {
    fn new(config: &Config<'_>) -> Result<Self, ArchError> {
        let heads = config.size("num_attention_heads")?;
        let hidden = config.size("hidden_size")?;
        let head_dim = config.size_opt("head_dim")?.unwrap_or(hidden / heads);
        let sizes = Self {
            vocabulary: config.size("vocab_size")?,
            hidden,
            feed_forward: config.size("intermediate_size")?,
            layers: config.size("num_hidden_layers")?,
            heads,
            kv_heads: config.size_opt("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
        };
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(config.error(
                "head_dim",
                format!("is {head_dim}; the rotation needs an even number"),
            ));
        }
        if sizes.layers > MAX_LAYERS {
            return Err(config.error(
                "num_hidden_layers",
                format!("is {}, more than {MAX_LAYERS}", sizes.layers),
            ));
        }
        if heads % sizes.kv_heads != 0 {
            return Err(config.error("num_key_value_heads", "does not divide num_attention_heads"));
        }
        Ok(sizes)
    }

    fn of(&self, dim: Dim) -> usize {
        match dim {
            Vocabulary => self.vocabulary,
            Hidden => self.hidden,
            Query => self.heads * self.head_dim,
            KeyValue => self.kv_heads * self.head_dim,
            FeedForward => self.feed_forward,
        }
    }
}

fn tensors(config: &Map<String, Json>) -> Result<Vec<TensorRule>, ArchError> {
    let config = &Config(config);
    refuse_what_is_not_built(config)?;
    let sizes = Sizes::new(config)?;
    let mut rules = Vec::new();
    let mut add = |(hf, gguf, shape, rotated): &Rule, layer: usize, bias: bool| {
        let shape: Vec<_> = shape.iter().map(|dim| sizes.of(*dim)).collect();
        let (suffix, shape) = if bias {
            ("bias", shape[..1].to_vec())
        } else {
            ("weight", shape)
        };
        let rows = if *rotated {
            RowOrder::Interleaved {
                head_dim: sizes.head_dim,
            }
        } else {
            RowOrder::Same
        };
        let name = |pattern: &str| format!("{}.{suffix}", pattern.replace("{}", &layer.to_string()));
        rules.push(TensorRule {
            hf: name(hf),
            gguf: name(gguf),
            shape,
            rows,
            change: Change::None,
            always_f32: false,
        });
    };
    OUTER.iter().for_each(|rule| add(rule, 0, false));
    if !config.flag("tie_word_embeddings")? {
        add(&HEAD, 0, false);
    }
    let attention_bias = config.flag("attention_bias")?;
    let mlp_bias = config.flag("mlp_bias")?;
    for layer in 0..sizes.layers {
        for rule in LAYER {
            add(rule, layer, false);
            if (attention_bias && rule.0.contains(".self_attn.")) || (mlp_bias && rule.0.contains(".mlp.")) {
                add(rule, layer, true);
            }
        }
    }
    Ok(rules)
}

fn refuse_what_is_not_built(config: &Config<'_>) -> Result<(), ArchError> {
    if let Some(quantised) = config.get("quantization_config") {
        let method = quantised
            .get("quant_method")
            .and_then(Json::as_str)
            .unwrap_or("an unnamed method");
        return Err(config.error(
            "quantization_config",
            format!("says that the weights are quantised by {method}, which is not read\nhint: convert the original checkpoint instead"),
        ));
    }
    match config.get("hidden_act").and_then(Json::as_str) {
        None | Some("silu" | "swish") => {}
        Some(other) => {
            return Err(config.error("hidden_act", format!("is {other}; llama.cpp has only silu here")));
        }
    }
    if let Some(window) = config.size_opt("sliding_window")?
        && window < config.size("max_position_embeddings")?
    {
        return Err(config.error(
            "sliding_window",
            format!("is {window}; llama.cpp's llama has no window"),
        ));
    }
    match config.number_opt("partial_rotary_factor")? {
        None | Some(1.0) => Ok(()),
        Some(other) => Err(config.error("partial_rotary_factor", format!("is {other}, which is not built"))),
    }
}

fn extra_tensors(config: &Map<String, Json>) -> Result<Vec<ExtraTensor>, ArchError> {
    let config = &Config(config);
    let rope = Rope::new(config)?;
    if rope.kind != "llama3" {
        return Ok(Vec::new());
    }
    let values = llama3_factors(
        Sizes::new(config)?.head_dim,
        rope.theta,
        rope.number("factor", 8.0)?,
        rope.number("low_freq_factor", 1.0)?,
        rope.number("high_freq_factor", 4.0)?,
        rope.number("original_max_position_embeddings", 8192.0)?,
    );
    Ok(vec![ExtraTensor {
        gguf: ROPE_FREQS.into(),
        values,
    }])
}

fn metadata(config: &Map<String, Json>) -> Result<Vec<(String, Value)>, ArchError> {
    let config = &Config(config);
    let sizes = Sizes::new(config)?;
    let rope = Rope::new(config)?;
    let epsilon = config.number_opt("rms_norm_eps")?.unwrap_or(1e-6);
    let mut keys: Vec<(String, Value)> = Vec::new();
    let mut add = |key: &str, value: Value| keys.push((format!("llama.{key}"), value));
    let size = |n: usize| Value::U32(n as u32);
    add("block_count", size(sizes.layers));
    add("context_length", size(config.size("max_position_embeddings")?));
    add("embedding_length", size(sizes.hidden));
    add("feed_forward_length", size(sizes.feed_forward));
    add("attention.head_count", size(sizes.heads));
    add("attention.head_count_kv", size(sizes.kv_heads));
    if rope.kind == "linear" {
        add("rope.scaling.type", "linear".into());
        add(
            "rope.scaling.factor",
            Value::F32(rope.number("factor", 1.0)? as f32),
        );
    }
    add("rope.freq_base", Value::F32(rope.theta as f32));
    add("attention.layer_norm_rms_epsilon", Value::F32(epsilon as f32));
    add("attention.key_length", size(sizes.head_dim));
    add("attention.value_length", size(sizes.head_dim));
    add("vocab_size", size(sizes.vocabulary));
    add("rope.dimension_count", size(sizes.head_dim));
    Ok(keys)
}

fn config(gguf: &Gguf) -> Result<Map<String, Json>, ArchError> {
    let key = |name: &str| format!("llama.{name}");
    if gguf.unsigned_opt(&key("expert_count"))?.unwrap_or(0) > 0 {
        return Err(ArchError::Unsupported(format!(
            "{} is a mixture of experts, which is not built",
            gguf.path().display()
        )));
    }
    let hidden = gguf.unsigned(&key("embedding_length"))?;
    let heads = gguf.unsigned(&key("attention.head_count"))?;
    let kv_heads = gguf
        .unsigned_opt(&key("attention.head_count_kv"))?
        .unwrap_or(heads);
    if heads == 0 || kv_heads == 0 {
        return Err(gguf.key_error(&key("attention.head_count"), "is 0").into());
    }
    let head_dim = gguf
        .unsigned_opt(&key("attention.key_length"))?
        .unwrap_or(hidden / heads);
    if gguf
        .unsigned_opt(&key("attention.value_length"))?
        .is_some_and(|n| n != head_dim)
    {
        return Err(gguf
            .key_error(&key("attention.value_length"), "differs from the key length")
            .into());
    }
    if gguf
        .unsigned_opt(&key("rope.dimension_count"))?
        .is_some_and(|n| n != head_dim)
    {
        return Err(gguf
            .key_error(&key("rope.dimension_count"), "differs from the length of a head")
            .into());
    }
    let theta = match gguf.get(&key("rope.freq_base")) {
        None => 10000.0,
        Some(_) => shortest(gguf.float(&key("rope.freq_base"))?),
    };
    let embeddings = gguf
        .tensor("token_embd.weight")
        .ok_or_else(|| GgufError::MissingTensor {
            path: gguf.path().to_path_buf(),
            tensor: "token_embd.weight".into(),
        })?;
    let rope = rope_of(gguf, head_dim as usize, theta)?;
    let scaling = if rope["rope_type"] == "default" {
        Json::Null
    } else {
        rope.clone()
    };
    let config = json!({
        "architectures": [LLAMA.hugging_face[0]],
        "attention_bias": gguf.tensor("blk.0.attn_q.bias").is_some(),
        "attention_dropout": 0.0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": gguf.unsigned(&key("feed_forward_length"))?,
        "max_position_embeddings": gguf.unsigned(&key("context_length"))?,
        "mlp_bias": gguf.tensor("blk.0.ffn_up.bias").is_some(),
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": gguf.unsigned(&key("block_count"))?,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": shortest(gguf.float(&key("attention.layer_norm_rms_epsilon"))?),
        "rope_parameters": rope,
        "rope_scaling": scaling,
        "rope_theta": theta,
        "tie_word_embeddings": gguf.tensor("output.weight").is_none(),
        "use_cache": true,
        "vocab_size": embeddings.rows(),
    });
    match config {
        Json::Object(config) => Ok(config),
        _ => Err(ArchError::Unsupported("the configuration is no object".into())),
    }
}

/// The shortest decimal number that is this f32, so that 1e-5 does not become 0.000009999999747378752.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(value.into())
}
