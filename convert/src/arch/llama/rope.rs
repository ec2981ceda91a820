//! The rotation's parameters: `rope_parameters` of `config.json` on one side, keys and `rope_freqs.weight` on the
//! other.

use serde_json::{Map, Value as Json, json};

use super::{ROPE_FREQS, shortest};
use crate::arch::{ArchError, Config};
use crate::gguf::Gguf;

/// `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before).
pub(super) struct Rope {
    pub(super) theta: f64,
    pub(super) kind: String,
    parameters: Map<String, Json>,
}

impl Rope {
    pub(super) fn new(config: &Config<'_>) -> Result<Self, ArchError> {
        let at = if config.get("rope_parameters").is_some() {
            "rope_parameters"
        } else {
            "rope_scaling"
        };
        let parameters = match config.get(at) {
            None => Map::new(),
            Some(Json::Object(parameters)) => parameters.clone(),
            Some(other) => return Err(config.error(at, format!("is {other}, not an object"))),
        };
        let own = Config(&parameters);
        let theta = match own.number_opt("rope_theta")? {
            Some(theta) => theta,
            None => config.number_opt("rope_theta")?.unwrap_or(10000.0),
        };
        let kind = own
            .get("rope_type")
            .or(own.get("type"))
            .and_then(Json::as_str)
            .unwrap_or("default");
        if !matches!(kind, "default" | "linear" | "llama3") {
            return Err(config.error(
                at,
                format!("asks for {kind}; default, linear and llama3 are built"),
            ));
        }
        Ok(Self {
            theta,
            kind: kind.to_owned(),
            parameters,
        })
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64, ArchError> {
        Ok(Config(&self.parameters).number_opt(key)?.unwrap_or(default))
    }
}

/// By how much each frequency of the rotation is divided, `head_dim / 2` values: 1 for short wavelengths, the
/// factor for long ones, in between for those in between (llama.py, `generate_extra_tensors`; f32 as there).
pub(super) fn llama3_factors(
    head_dim: usize,
    theta: f64,
    factor: f64,
    low: f64,
    high: f64,
    context: f64,
) -> Vec<f32> {
    let (factor, low, high, context) = (factor as f32, low as f32, high as f32, context as f32);
    let exponents = (0..head_dim).step_by(2).map(|i| i as f32 / head_dim as f32);
    exponents
        .map(|exponent| {
            let frequency = 1.0 / (theta as f32).powf(exponent);
            let wavelength = std::f32::consts::TAU / frequency;
            if wavelength < context / high {
                1.0
            } else if wavelength > context / low {
                factor
            } else {
                let smooth = (context / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        })
        .collect()
}

/// The `rope_parameters` that the keys and the frequency tensor stand for.
pub(super) fn rope_of(gguf: &Gguf, head_dim: usize, theta: f64) -> Result<Json, ArchError> {
    let scaling = match gguf.get("llama.rope.scaling.type") {
        None => "none",
        Some(_) => gguf.string("llama.rope.scaling.type")?,
    };
    match (scaling, gguf.tensor(ROPE_FREQS)) {
        ("none", None) => Ok(json!({"rope_type": "default", "rope_theta": theta})),
        ("linear", None) => {
            let factor = shortest(gguf.float("llama.rope.scaling.factor")?);
            Ok(json!({"rope_type": "linear", "rope_theta": theta, "factor": factor}))
        }
        ("none", Some(tensor)) => {
            let (chunks, _) = gguf.data(tensor).as_chunks::<4>();
            let values: Vec<f32> = chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            if Some(values.len()) != head_dim.checked_div(2) || values.is_empty() {
                return Err(ArchError::Unsupported(format!(
                    "{}: {ROPE_FREQS} has {} elements, where a head of {head_dim} needs half as many as its size",
                    gguf.path().display(),
                    values.len()
                )));
            }
            // The last frequency is the lowest one: its factor is the factor. The rest is Llama 3's own.
            let factor = values.last().copied().unwrap_or(1.0);
            let expected = llama3_factors(head_dim, theta, factor.into(), 1.0, 4.0, 8192.0);
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * b.abs();
            if !values.iter().zip(&expected).all(close) {
                return Err(ArchError::Unsupported(format!(
                    "{}: {ROPE_FREQS} does not hold the factors of Llama 3.1 or 3.2, and nothing else is built",
                    gguf.path().display()
                )));
            }
            Ok(json!({
                "rope_type": "llama3", "rope_theta": theta, "factor": shortest(factor), "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            }))
        }
        (other, _) => Err(gguf
            .key_error(
                "llama.rope.scaling.type",
                &format!("is {other}, which is not built"),
            )
            .into()),
    }
}
