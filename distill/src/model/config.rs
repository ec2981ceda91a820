//! `config.json` of a decoder, in the spellings of transformers 4 and 5.

use std::path::Path;

use pipit_convert::checkpoint::Checkpoint;
use serde_json::{Map, Value};

use super::ModelError;
use super::ops::{Heads, RopeTable};

/// Which kind of decoder: `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2, TinyLlama.
    Llama,
}

impl Architecture {
    const ALL: [Self; 1] = [Self::Llama];

    /// The name in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
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
    /// The longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
    /// The base of the rotary embedding.
    pub rope_theta: f64,
    /// Llama 3's stretching of the rotary embedding.
    pub rope_llama3: Option<Llama3Rope>,
}

/// `rope_type: llama3`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Rope {
    factor: f64,
    low_freq_factor: f64,
    high_freq_factor: f64,
    original_max_position_embeddings: f64,
}

/// A JSON object with the path that errors name.
struct Reader<'a> {
    path: &'a Path,
    json: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn bad(&self, key: &'static str, why: impl Into<String>) -> ModelError {
        ModelError::Config {
            path: self.path.to_path_buf(),
            key,
            why: why.into(),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// A positive integer.
    fn size(&self, key: &'static str) -> Result<usize, ModelError> {
        let value = self.get(key).ok_or_else(|| self.bad(key, "is missing"))?;
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            // No model has a dimension beyond 2³²; products of two sizes then cannot overflow.
            Some(n) if n > 0 && u32::try_from(n).is_ok() => Ok(n),
            _ => Err(self.bad(key, format!("{value} is not a size"))),
        }
    }

    fn size_or(&self, key: &'static str, default: usize) -> Result<usize, ModelError> {
        if self.get(key).is_some() {
            self.size(key)
        } else {
            Ok(default)
        }
    }

    /// A finite number above 0.
    fn number(&self, key: &'static str) -> Result<f64, ModelError> {
        let value = self.get(key).ok_or_else(|| self.bad(key, "is missing"))?;
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            _ => Err(self.bad(key, format!("{value} is not a positive number"))),
        }
    }

    fn flag(&self, key: &'static str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.bad(key, format!("{value} is not true or false"))),
        }
    }
}

impl Config {
    /// Reads the checkpoint's `config.json`, and refuses by name what this implementation does not have.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        Self::parse(&checkpoint.dir().join("config.json"), checkpoint.config())
    }

    /// The same of what stands in `config.json`, or would; errors name `path`.
    pub(super) fn parse(path: &Path, json: &Map<String, Value>) -> Result<Self, ModelError> {
        let reader = Reader { path, json };
        let model_type = reader
            .get("model_type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let Some(architecture) = Architecture::ALL
            .into_iter()
            .find(|a| a.model_type() == model_type)
        else {
            return Err(ModelError::Architecture {
                path: path.to_path_buf(),
                found: model_type.to_owned(),
            });
        };
        for key in ["attention_bias", "mlp_bias"] {
            if reader.flag(key, false)? {
                return Err(reader.bad(key, "biases of linear layers are not supported for llama"));
            }
        }
        if let Some(act) = reader
            .get("hidden_act")
            .filter(|act| act.as_str() != Some("silu"))
        {
            return Err(reader.bad("hidden_act", format!("{act} is not supported, only \"silu\"")));
        }
        if reader.get("quantization_config").is_some() {
            return Err(reader.bad("quantization_config", "quantised checkpoints cannot be trained"));
        }
        let hidden_size = reader.size("hidden_size")?;
        let num_attention_heads = reader.size("num_attention_heads")?;
        let (rope_theta, rope_llama3) = read_rope(&reader)?;
        let config = Self {
            architecture,
            vocab_size: reader.size("vocab_size")?,
            hidden_size,
            intermediate_size: reader.size("intermediate_size")?,
            num_hidden_layers: reader.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: reader.size_or("num_key_value_heads", num_attention_heads)?,
            head_dim: reader.size_or("head_dim", hidden_size / num_attention_heads)?,
            max_position_embeddings: reader.size_or("max_position_embeddings", 2048)?,
            rms_norm_eps: if reader.get("rms_norm_eps").is_some() {
                reader.number("rms_norm_eps")?
            } else {
                1e-6
            },
            tie_word_embeddings: reader.flag("tie_word_embeddings", false)?,
            rope_theta,
            rope_llama3,
        };
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

    /// The head sizes.
    pub fn heads(&self) -> Heads {
        Heads {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }

    /// The rotary embeddings that the blocks choose from: `rope_theta^(−2i / head_dim)` per pair, stretched as Llama 3
    /// does where asked.
    pub fn rope_tables(&self) -> Vec<RopeTable> {
        let pairs = self.head_dim / 2;
        vec![RopeTable::new(
            (0..pairs)
                .map(|i| {
                    let freq = self.rope_theta.powf(-(2.0 * i as f64) / self.head_dim as f64);
                    self.rope_llama3.map_or(freq, |rope| rope.stretch(freq)) as f32
                })
                .collect(),
        )]
    }
}

impl Llama3Rope {
    /// transformers' `_compute_llama3_parameters`: long waves are stretched, short ones not, between them a ramp.
    fn stretch(self, freq: f64) -> f64 {
        let wavelength = std::f64::consts::TAU / freq;
        let turns = self.original_max_position_embeddings / wavelength;
        if turns < self.low_freq_factor {
            freq / self.factor
        } else if turns > self.high_freq_factor {
            freq
        } else {
            let smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
            (1.0 - smooth) * freq / self.factor + smooth * freq
        }
    }
}

/// `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).
fn read_rope(reader: &Reader<'_>) -> Result<(f64, Option<Llama3Rope>), ModelError> {
    let object = |key: &'static str| match reader.get(key) {
        None => Ok(None),
        Some(Value::Object(json)) => Ok(Some(Reader {
            path: reader.path,
            json,
        })),
        Some(other) => Err(reader.bad(key, format!("{other} is not an object"))),
    };
    let parameters = object("rope_parameters")?;
    let scaling = object("rope_scaling")?;
    let theta = match &parameters {
        Some(inner) if inner.get("rope_theta").is_some() => inner.number("rope_theta")?,
        _ if reader.get("rope_theta").is_some() => reader.number("rope_theta")?,
        _ => 10_000.0,
    };
    let Some(inner) = parameters.or(scaling) else {
        return Ok((theta, None));
    };
    let kind = inner
        .get("rope_type")
        .or_else(|| inner.get("type"))
        .and_then(Value::as_str);
    match kind.unwrap_or("default") {
        "default" => Ok((theta, None)),
        "llama3" => {
            let rope = Llama3Rope {
                factor: inner.number("factor")?,
                low_freq_factor: inner.number("low_freq_factor")?,
                high_freq_factor: inner.number("high_freq_factor")?,
                original_max_position_embeddings: inner.number("original_max_position_embeddings")?,
            };
            Ok((theta, Some(rope)))
        }
        other => Err(reader.bad(
            "rope_type",
            format!("{other:?} is not supported, `default` and `llama3` are"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(change: impl FnOnce(&mut Map<String, Value>)) -> Result<Config, ModelError> {
        let mut json = json!({"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5});
        change(json.as_object_mut().unwrap());
        Config::parse(Path::new("config.json"), json.as_object().unwrap())
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        assert_eq!(parse(|_| ()).unwrap().rope_theta, 10_000.0);
        let old = parse(|c| drop(c.insert("rope_theta".into(), json!(5e5)))).unwrap();
        let new = json!({"rope_type": "default", "rope_theta": 5e5});
        assert_eq!(
            old,
            parse(|c| drop(c.insert("rope_parameters".into(), new))).unwrap()
        );
        assert_eq!(old.head_dim, 16);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (key, value) in [
            ("attention_bias", json!(true)),
            ("mlp_bias", json!(true)),
            ("hidden_act", json!("gelu")),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
            ("quantization_config", json!({"bits": 4})),
            ("num_key_value_heads", json!(3)),
            ("hidden_size", json!(-1)),
            ("head_dim", json!(15)),
        ] {
            let error = parse(|c| drop(c.insert(key.into(), value)))
                .unwrap_err()
                .to_string();
            assert!(error.contains(key) || error.contains("yarn"), "{key}: {error}");
        }
        assert!(
            parse(|c| drop(c.insert("model_type".into(), json!("gpt2"))))
                .unwrap_err()
                .to_string()
                .contains("gpt2")
        );
    }
}
