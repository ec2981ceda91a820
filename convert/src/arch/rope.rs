//! The rotation's parameters: `rope_parameters` of `config.json` on one side, keys and tensors of frequencies on the
//! other.
//!
//! Source: transformers modeling_rope_utils.py, llama.cpp conversion/base.py and src/llama-context.cpp.

mod llama3;

use llama3::Llama3;
use serde_json::{Map, Value as Json, json};

use super::decoder::{Keys, Source};
use super::{ArchError, Config, ExtraTensor};

/// The tensor that divides the rotation's frequencies.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// The rotation of a model.
pub(super) struct Rope {
    /// The base of the frequencies.
    pub(super) theta: f64,
    /// The base in layers that see a window only, where it differs (Gemma 3).
    pub(super) local_theta: Option<f64>,
    pub(super) scaling: Scaling,
    /// How much of a head is rotated.
    pub(super) share: f64,
}

/// How positions beyond those of the first training are reached.
pub(super) enum Scaling {
    None,
    /// Positions divided by the factor.
    Linear(f64),
    Yarn(Yarn),
    Llama3(Llama3),
    /// A divisor for every frequency, one list for short texts and one for long ones.
    LongRope(LongRope),
}

/// <https://arxiv.org/abs/2309.00071>
pub(super) struct Yarn {
    factor: f64,
    original: usize,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
}

/// <https://arxiv.org/abs/2402.13753>
pub(super) struct LongRope {
    pub(super) short: Vec<f32>,
    pub(super) long: Vec<f32>,
    /// What `attention_factor` says, where it says anything.
    pub(super) attention_factor: Option<f64>,
}

impl Rope {
    /// Reads `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (before). `known` are the kinds
    /// that llama.cpp has in this architecture, besides `default`.
    pub(super) fn new(config: &Config<'_>, default_theta: f64, known: &[&str]) -> Result<Self, ArchError> {
        let at = if config.get("rope_parameters").is_some() {
            "rope_parameters"
        } else {
            "rope_scaling"
        };
        let given = object(config, at, config.get(at))?;
        // With windows, each kind of layer has its own.
        let parameters = match given.get("full_attention") {
            Some(full) => object(config, at, Some(full))?,
            None => given.clone(),
        };
        let local = object(config, at, given.get("sliding_attention"))?;
        let own = Config(&parameters);
        let or_outside = |key: &str| match own.number_opt(key)? {
            Some(value) => Ok(Some(value)),
            None => config.number_opt(key),
        };
        let kind = match own.get("rope_type").or(own.get("type")).and_then(Json::as_str) {
            Some("su") => "longrope",
            kind => kind.unwrap_or("default"),
        };
        if kind != "default" && !known.contains(&kind) {
            return Err(config.error(
                at,
                format!(
                    "asks for {kind}; in this architecture default{} are built",
                    known.iter().map(|kind| format!(", {kind}")).collect::<String>()
                ),
            ));
        }
        if Config(&local)
            .get("rope_type")
            .is_some_and(|kind| kind != "default")
        {
            return Err(config.error(
                at,
                "scales the layers that see a window, which llama.cpp does not",
            ));
        }
        let number = |key: &str, default: f64| Ok::<_, ArchError>(own.number_opt(key)?.unwrap_or(default));
        let scaling = match kind {
            "linear" => Scaling::Linear(number("factor", 1.0)?),
            "yarn" => Scaling::Yarn(Yarn::new(config, at, &own)?),
            "llama3" => Scaling::Llama3(Llama3 {
                factor: number("factor", 8.0)?,
                low: number("low_freq_factor", 1.0)?,
                high: number("high_freq_factor", 4.0)?,
                context: number("original_max_position_embeddings", 8192.0)?,
            }),
            "longrope" => Scaling::LongRope(LongRope {
                short: factors(config, &own, "short_factor")?,
                long: factors(config, &own, "long_factor")?,
                attention_factor: own.number_opt("attention_factor")?,
            }),
            _ => Scaling::None,
        };
        let local_theta = match Config(&local).number_opt("rope_theta")? {
            Some(theta) => Some(theta),
            None => config.number_opt("rope_local_base_freq")?,
        };
        Ok(Self {
            theta: or_outside("rope_theta")?.unwrap_or(default_theta),
            local_theta,
            scaling,
            share: or_outside("partial_rotary_factor")?.unwrap_or(1.0),
        })
    }

    /// The same, where llama.cpp rotates whole heads only.
    pub(super) fn whole(config: &Config<'_>, default_theta: f64, known: &[&str]) -> Result<Self, ArchError> {
        let rope = Self::new(config, default_theta, known)?;
        if rope.share != 1.0 {
            return Err(config.error(
                "partial_rotary_factor",
                format!("is {}; llama.cpp rotates whole heads here", rope.share),
            ));
        }
        Ok(rope)
    }

    /// The keys, as llama.cpp's converter writes them.
    pub(super) fn add_keys(&self, keys: &mut Keys) {
        match &self.scaling {
            Scaling::None | Scaling::Llama3(_) | Scaling::LongRope(_) => {}
            Scaling::Linear(factor) => {
                keys.add("rope.scaling.type", "linear".into());
                keys.float("rope.scaling.factor", *factor);
            }
            Scaling::Yarn(yarn) => {
                keys.add("rope.scaling.type", "yarn".into());
                keys.float("rope.scaling.factor", yarn.factor);
                keys.size("rope.scaling.original_context_length", yarn.original);
                let given = [
                    ("rope.scaling.yarn_attn_factor", yarn.attention_factor),
                    ("rope.scaling.yarn_beta_fast", yarn.beta_fast),
                    ("rope.scaling.yarn_beta_slow", yarn.beta_slow),
                ];
                for (key, value) in given {
                    if let Some(value) = value {
                        keys.float(key, value);
                    }
                }
            }
        }
        keys.float("rope.freq_base", self.theta);
        if let Some(theta) = self.local_theta {
            keys.float("rope.freq_base_swa", theta);
        }
    }

    /// The tensors that only the GGUF file has.
    pub(super) fn tensors(&self, head_dim: usize) -> Vec<ExtraTensor> {
        let tensor = |name: &str, values: Vec<f32>| ExtraTensor {
            gguf: name.into(),
            values,
        };
        match &self.scaling {
            Scaling::Llama3(llama3) => vec![tensor(ROPE_FREQS, llama3.factors(head_dim, self.theta))],
            Scaling::LongRope(longrope) => vec![
                tensor("rope_factors_long.weight", longrope.long.clone()),
                tensor("rope_factors_short.weight", longrope.short.clone()),
            ],
            _ => Vec::new(),
        }
    }
}

impl Yarn {
    fn new(config: &Config<'_>, at: &str, own: &Config<'_>) -> Result<Self, ArchError> {
        for key in ["mscale", "mscale_all_dim", "extrapolation_factor"] {
            if own.get(key).is_some() {
                return Err(config.error(at, format!("has {key}, which is not built")));
            }
        }
        if own.get("truncate").is_some_and(|truncate| truncate == false) {
            return Err(config.error(at, "has truncate = false; llama.cpp truncates"));
        }
        let factor = own
            .number_opt("factor")?
            .ok_or_else(|| config.error(at, "asks for yarn without a factor"))?;
        // llama.cpp computes the factor of the attention itself, whatever the file says (llama-context.cpp).
        let computed = 0.1 * factor.max(1.0).ln() + 1.0;
        let attention_factor = own.number_opt("attention_factor")?;
        if attention_factor.is_some_and(|given| (given - computed).abs() > 1e-6) {
            return Err(config.error(
                at,
                format!(
                    "has an attention_factor other than {computed}, which llama.cpp takes for this factor"
                ),
            ));
        }
        let original = match own.size_opt("original_max_position_embeddings")? {
            Some(original) => original,
            None => config.size("max_position_embeddings")?,
        };
        Ok(Self {
            factor,
            original,
            attention_factor,
            beta_fast: own.number_opt("beta_fast")?,
            beta_slow: own.number_opt("beta_slow")?,
        })
    }
}

fn object(config: &Config<'_>, at: &str, value: Option<&Json>) -> Result<Map<String, Json>, ArchError> {
    match value {
        None | Some(Json::Null) => Ok(Map::new()),
        Some(Json::Object(parameters)) => Ok(parameters.clone()),
        Some(other) => Err(config.error(at, format!("is {other}, not an object"))),
    }
}

/// A list of positive numbers.
fn factors(config: &Config<'_>, own: &Config<'_>, key: &str) -> Result<Vec<f32>, ArchError> {
    let list = own.get(key).and_then(Json::as_array);
    let list = list.ok_or_else(|| config.error(key, "is no list, and longrope needs it"))?;
    list.iter()
        .map(|value| match value.as_f64() {
            Some(factor) if factor > 0.0 && factor.is_finite() => Ok(factor as f32),
            _ => Err(config.error(key, format!("has the element {value}, not a positive number"))),
        })
        .collect()
}

/// The `rope_parameters` that the keys and the frequency tensor stand for.
pub(super) fn rope_of(source: &Source<'_>, head_dim: u64, default_theta: f64) -> Result<Json, ArchError> {
    let theta = source.float_opt("rope.freq_base")?.unwrap_or(default_theta);
    let scaling = source.string_opt("rope.scaling.type")?.unwrap_or("none");
    match (scaling, source.floats(ROPE_FREQS)) {
        ("none", None) => Ok(json!({"rope_type": "default", "rope_theta": theta})),
        ("linear", None) => Ok(json!({
            "rope_type": "linear", "rope_theta": theta, "factor": source.float("rope.scaling.factor")?,
        })),
        ("yarn", None) => {
            let mut yarn = json!({
                "rope_type": "yarn", "rope_theta": theta, "factor": source.float("rope.scaling.factor")?,
                "original_max_position_embeddings": source.unsigned("rope.scaling.original_context_length")?,
            });
            for (name, key) in [
                ("attention_factor", "rope.scaling.yarn_attn_factor"),
                ("beta_fast", "rope.scaling.yarn_beta_fast"),
                ("beta_slow", "rope.scaling.yarn_beta_slow"),
            ] {
                if let Some(value) = source.float_opt(key)? {
                    yarn[name] = json!(value);
                }
            }
            Ok(yarn)
        }
        ("none", Some(values)) => {
            let refuse = |why: String| {
                let path = source.gguf.path().display();
                ArchError::Unsupported(format!("{path}: {ROPE_FREQS} {why}"))
            };
            if head_dim == 0 || values.len() as u64 != head_dim / 2 {
                return Err(refuse(format!(
                    "has {} elements, where a head of {head_dim} needs half as many as its size",
                    values.len()
                )));
            }
            let found = Llama3::recover(&values, theta).ok_or_else(|| {
                refuse(
                    "holds factors that no constants of Llama 3's scaling give: nothing else is built".into(),
                )
            })?;
            Ok(json!({
                "rope_type": "llama3", "rope_theta": theta, "factor": found.factor, "low_freq_factor": found.low,
                "high_freq_factor": found.high, "original_max_position_embeddings": found.context as u64,
            }))
        }
        (other, _) => Err(source.error(
            "rope.scaling.type",
            &format!("is {other}, which is not built in this architecture"),
        )),
    }
}
