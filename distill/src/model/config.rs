//! `config.json` of a decoder, in the spellings of transformers 4 and 5. What a configuration asks for and this
//! implementation does not have is refused by name.
//!
//! Source: transformers models/{llama,qwen2,qwen3,gemma3}/configuration_*.py.

mod reader;
mod rope;

use std::path::Path;

use pipit_convert::checkpoint::Checkpoint;
pub(super) use reader::Reader;
pub use rope::{Rope, Scaling};
use serde_json::{Map, Value};

use super::ops::{Heads, RopeTable};
use super::{ModelError, gemma3, llama, qwen2, qwen3};

/// Which kind of decoder: `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2, TinyLlama.
    Llama,
    /// Qwen 2 and 2.5, and what was distilled into them.
    Qwen2,
    /// The dense models of Qwen 3.
    Qwen3,
    /// Gemma 3 without its eyes.
    Gemma3,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Gemma3];

    /// The name in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3_text",
        }
    }
}

/// The sizes and constants of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which kind.
    pub architecture: Architecture,
    /// The number of tokens that the embedding knows.
    pub vocab_size: usize,
    /// The width of the hidden states.
    pub hidden_size: usize,
    /// The width of the feed-forward layer.
    pub intermediate_size: usize,
    /// The number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// The width of one head.
    pub head_dim: usize,
    /// What the products of queries and keys are multiplied by.
    pub attention_scale: f64,
    /// For each block the number of tokens that a token sees, itself and those before it; all where there is none.
    pub windows: Vec<Option<usize>>,
    /// The longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
    /// The rotary embedding.
    pub rope: Rope,
    /// The one of blocks with a window, where they have their own.
    pub local_rope: Option<Rope>,
}

impl Config {
    /// Reads the checkpoint's `config.json`.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        Self::parse(&checkpoint.dir().join("config.json"), checkpoint.config())
    }

    /// The same of what stands in `config.json`, or would; errors name `path`.
    pub(super) fn parse(path: &Path, json: &Map<String, Value>) -> Result<Self, ModelError> {
        let reader = Reader { path, json };
        let found = reader
            .get("model_type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let architecture = Architecture::ALL
            .into_iter()
            .find(|known| known.model_type() == found);
        let architecture = architecture.ok_or_else(|| ModelError::Architecture {
            path: path.to_path_buf(),
            found: found.to_owned(),
        })?;
        reader.refuse_values(
            &["quantization_config"],
            "quantised checkpoints cannot be trained",
        )?;
        reader.refuse_flags(&["attention_bias", "mlp_bias"], "these biases are not supported")?;
        let config = match architecture {
            Architecture::Llama => llama::config(&reader),
            Architecture::Qwen2 => qwen2::config(&reader),
            Architecture::Qwen3 => qwen3::config(&reader),
            Architecture::Gemma3 => gemma3::config(&reader),
        }?;
        if !config
            .num_attention_heads
            .is_multiple_of(config.num_key_value_heads)
        {
            return Err(reader.bad("num_key_value_heads", "does not divide num_attention_heads"));
        }
        if config.head_dim == 0 || !config.head_dim.is_multiple_of(2) {
            return Err(reader.bad(
                "head_dim",
                format!("{} is not an even number above 0", config.head_dim),
            ));
        }
        Ok(config)
    }

    /// What the architectures have in common: every block sees everything, and attention is scaled by 1/√head_dim.
    pub(super) fn common(
        reader: &Reader<'_>,
        architecture: Architecture,
        defaults: Defaults,
        rope: Rope,
    ) -> Result<Self, ModelError> {
        let hidden_size = reader.size("hidden_size")?;
        let num_attention_heads = reader.size("num_attention_heads")?;
        let num_hidden_layers = reader.size("num_hidden_layers")?;
        let head_dim = defaults.head_dim.unwrap_or(hidden_size / num_attention_heads);
        let head_dim = reader.size_or("head_dim", head_dim)?;
        Ok(Self {
            architecture,
            vocab_size: reader.size("vocab_size")?,
            hidden_size,
            intermediate_size: reader.size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: reader.size_or("num_key_value_heads", num_attention_heads)?,
            head_dim,
            attention_scale: 1.0 / (head_dim as f64).sqrt(),
            windows: vec![None; num_hidden_layers],
            max_position_embeddings: reader
                .size_or("max_position_embeddings", defaults.max_position_embeddings)?,
            rms_norm_eps: reader.number_or("rms_norm_eps", 1e-6)?,
            tie_word_embeddings: reader.flag("tie_word_embeddings", defaults.tie_word_embeddings)?,
            rope,
            local_rope: None,
        })
    }

    /// The head sizes of a block, and what its attention sees.
    pub fn heads(&self, block: usize) -> Heads {
        Heads {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            scale: self.attention_scale,
            window: self.windows.get(block).copied().flatten(),
        }
    }

    /// The rotary embeddings that the blocks choose from with [`Config::rope_of`].
    pub fn rope_tables(&self) -> Vec<RopeTable> {
        let ropes = std::iter::once(&self.rope).chain(&self.local_rope);
        ropes.map(|rope| rope.table(self.head_dim)).collect()
    }

    /// Which of the rotary embeddings a block turns by.
    pub fn rope_of(&self, block: usize) -> usize {
        usize::from(self.local_rope.is_some() && self.heads(block).window.is_some())
    }

    /// What the embeddings of the tokens are multiplied by, where they are.
    pub fn embedding_scale(&self) -> Option<f64> {
        // transformers makes it a tensor of the weights' type: it is rounded to f32 where it is used.
        (self.architecture == Architecture::Gemma3).then(|| (self.hidden_size as f64).sqrt())
    }
}

/// What stands for keys that `config.json` leaves out; it differs between the architectures.
#[derive(Debug, Clone, Copy)]
pub(super) struct Defaults {
    /// None for hidden_size / num_attention_heads.
    pub(super) head_dim: Option<usize>,
    pub(super) max_position_embeddings: usize,
    pub(super) tie_word_embeddings: bool,
}

/// The window of each block, from `layer_types`, or where it is left out from the architecture's rule.
/// `size` is the window's, where the configuration has one.
pub(super) fn windows(
    reader: &Reader<'_>,
    size: Option<usize>,
    rule: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>, ModelError> {
    const KEY: &str = "layer_types";
    let layers = reader.size("num_hidden_layers")?;
    let window = |sees_window: bool| match (sees_window, size) {
        (false, _) => Ok(None),
        (true, Some(size)) => Ok(Some(size)),
        (true, None) => Err(reader.bad("sliding_window", "is missing, and some blocks have a window")),
    };
    let Some(types) = reader.get(KEY) else {
        return (0..layers).map(|layer| window(rule(layer))).collect();
    };
    let types = types.as_array().filter(|types| types.len() == layers);
    let types = types.ok_or_else(|| reader.bad(KEY, format!("is no list of {layers} kinds")))?;
    let kinds = types.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => window(false),
        Some("sliding_attention") => window(true),
        _ => Err(reader.bad(KEY, format!("{kind} is not supported"))),
    });
    kinds.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn minimal(model_type: &str) -> Map<String, Value> {
        let json = json!({"model_type": model_type, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5});
        json.as_object().unwrap().clone()
    }

    /// A minimal configuration with some keys changed.
    fn parse(model_type: &str, change: Value) -> Result<Config, ModelError> {
        let mut json = minimal(model_type);
        let Value::Object(change) = change else {
            panic!("{change} is no object")
        };
        json.extend(change);
        Config::parse(Path::new("config.json"), &json)
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        assert_eq!(parse("llama", json!({})).unwrap().rope.theta, 10_000.0);
        let old = parse("qwen2", json!({"rope_theta": 5e5})).unwrap();
        let new = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}});
        assert_eq!(old, parse("qwen2", new).unwrap());
        assert_eq!(old.head_dim, 16);
        let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}});
        let new = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}});
        assert_eq!(parse("llama", old).unwrap(), parse("llama", new).unwrap());
    }

    #[test]
    fn both_spellings_of_gemmas_two_ropes_and_windows_are_read() {
        let old = json!({"rope_theta": 1e5, "rope_local_base_freq": 500.0, "sliding_window": 8,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2});
        let new = json!({"sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}});
        let config = parse("gemma3_text", old).unwrap();
        assert_eq!(config, parse("gemma3_text", new).unwrap());
        assert_eq!(config.windows, [Some(8), None, Some(8)]);
        assert_eq!([0, 1, 2].map(|block| config.rope_of(block)), [1, 0, 1]);
        assert_eq!(config.rope.scaling, Scaling::Linear(8.0));
        assert_eq!(
            config.local_rope.map(|rope| (rope.theta, rope.scaling)),
            Some((500.0, Scaling::None))
        );
        // What is left out is what transformers has for it.
        let plain = parse("gemma3_text", json!({})).unwrap();
        assert_eq!((plain.head_dim, plain.attention_scale), (256, 1.0 / 16.0));
        assert_eq!(plain.windows, [Some(4096); 3]);
        assert_eq!(plain.rope.theta, 1e6);
        assert!(plain.tie_word_embeddings);
    }

    #[test]
    fn qwens_windows_are_transformers() {
        let windows = |change| parse("qwen2", change).map(|config| config.windows);
        // Many checkpoints carry a size that `use_sliding_window` switches off.
        let off = json!({"use_sliding_window": false, "sliding_window": 8, "max_window_layers": 0});
        assert_eq!(windows(off).unwrap(), [None; 3]);
        let on = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1});
        assert_eq!(windows(on).unwrap(), [None, Some(8), Some(8)]);
        let null = json!({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 1});
        assert_eq!(windows(null).unwrap(), [None; 3]);
        let default = json!({"use_sliding_window": true, "max_window_layers": 2});
        assert_eq!(windows(default).unwrap(), [None, None, Some(4096)]);
        let types = ["sliding_attention", "full_attention", "full_attention"];
        let listed = json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": types});
        assert_eq!(windows(listed).unwrap(), [Some(8), None, None]);
        let error = windows(json!({"layer_types": types})).unwrap_err().to_string();
        assert!(error.contains("sliding_window"), "{error}");
    }

    #[test]
    fn qwen3_has_heads_of_128_where_nothing_is_said() {
        assert_eq!(parse("qwen3", json!({})).unwrap().head_dim, 128);
        assert_eq!(parse("qwen3", json!({"head_dim": 24})).unwrap().head_dim, 24);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (model_type, key, value) in [
            ("llama", "attention_bias", json!(true)),
            ("llama", "mlp_bias", json!(true)),
            ("llama", "hidden_act", json!("gelu")),
            (
                "llama",
                "rope_scaling",
                json!({"rope_type": "yarn", "factor": 4.0}),
            ),
            (
                "llama",
                "rope_parameters",
                json!({"full_attention": {"rope_theta": 1e4}}),
            ),
            ("llama", "partial_rotary_factor", json!(0.5)),
            ("llama", "quantization_config", json!({"bits": 4})),
            ("llama", "num_key_value_heads", json!(3)),
            ("llama", "hidden_size", json!(-1)),
            ("llama", "head_dim", json!(15)),
            ("qwen2", "use_mrope", json!(true)),
            ("qwen2", "hidden_act", json!("relu")),
            ("qwen3", "attention_bias", json!(true)),
            ("qwen3", "layer_types", json!(["full_attention"])),
            (
                "qwen3",
                "layer_types",
                json!(["full_attention", "chunked_attention", "full_attention"]),
            ),
            ("gemma3_text", "hidden_activation", json!("gelu")),
            ("gemma3_text", "use_bidirectional_attention", json!(true)),
            ("gemma3_text", "final_logit_softcapping", json!(30.0)),
            ("gemma3_text", "attn_logit_softcapping", json!(50.0)),
            ("gemma3_text", "sliding_window_pattern", json!(0)),
            ("gemma3_text", "rope_parameters", json!({"rope_theta": 1e4})),
        ] {
            let error = parse(model_type, json!({key: value})).unwrap_err().to_string();
            assert!(
                error.contains(&format!("`{key}`")),
                "{model_type}, {key}: {error}"
            );
        }
        let error = parse("gpt2", json!({})).unwrap_err().to_string();
        for name in ["gpt2", "llama", "qwen2", "qwen3", "gemma3_text"] {
            assert!(error.contains(name), "{error}");
        }
        let error = parse("gemma3", json!({})).unwrap_err().to_string();
        assert!(error.contains("vision"), "{error}");
    }
}
