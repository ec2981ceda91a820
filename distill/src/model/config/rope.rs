//! The rotary embedding's constants: `rope_parameters` (transformers 5), or `rope_theta`, `rope_scaling` and Gemma's
//! `rope_local_base_freq` (before).
//!
//! Source: transformers modeling_rope_utils.py.

use serde_json::Value;

use super::reader::Reader;
use crate::model::ModelError;
use crate::model::ops::RopeTable;

/// One rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// The base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// How positions beyond those of the first training are reached.
    pub scaling: Scaling,
}

/// `rope_type`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// `default`: not at all.
    None,
    /// `linear`: every frequency divided by this factor.
    Linear(f64),
    /// `llama3`.
    Llama3(Llama3),
}

/// The constants of `rope_type: llama3`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3 {
    factor: f64,
    low_freq_factor: f64,
    high_freq_factor: f64,
    original_max_position_embeddings: f64,
}

impl Rope {
    /// The frequencies `theta^(−2i / head_dim)`, one a pair, scaled.
    pub fn table(&self, head_dim: usize) -> RopeTable {
        let frequency = |pair: usize| {
            let freq = self.theta.powf(-(2.0 * pair as f64) / head_dim as f64);
            match self.scaling {
                Scaling::None => freq,
                Scaling::Linear(factor) => freq / factor,
                Scaling::Llama3(llama3) => llama3.scale(freq),
            }
        };
        RopeTable::new((0..head_dim / 2).map(|pair| frequency(pair) as f32).collect())
    }

    /// The one rotary embedding of a model.
    pub(in crate::model) fn read(reader: &Reader<'_>, default_theta: f64) -> Result<Self, ModelError> {
        let theta = reader.number_or("rope_theta", default_theta)?;
        let Some((key, inner)) = parameters(reader)? else {
            return Self::new("rope_theta", reader, None, theta);
        };
        if inner.get("full_attention").is_some() || inner.get("sliding_attention").is_some() {
            return Err(reader.bad(
                key,
                "differs between layers, which this architecture does not have",
            ));
        }
        Self::new(key, reader, Some(inner), theta)
    }

    /// The rotary embeddings of layers that see everything and of layers with a window.
    pub(in crate::model) fn read_pair(
        reader: &Reader<'_>,
        default_theta: f64,
        default_local_theta: f64,
    ) -> Result<(Self, Self), ModelError> {
        let theta = reader.number_or("rope_theta", default_theta)?;
        let local_theta = reader.number_or("rope_local_base_freq", default_local_theta)?;
        let Some((key, inner)) = parameters(reader)? else {
            let full = Self::new("rope_theta", reader, None, theta)?;
            return Ok((
                full,
                Self::new("rope_local_base_freq", reader, None, local_theta)?,
            ));
        };
        let (full, local) = match key {
            "rope_parameters" => {
                // Without these two it is the flat spelling, which says nothing about the layers with a window.
                let (full, local) = (
                    inner.object("full_attention")?,
                    inner.object("sliding_attention")?,
                );
                if full.is_none() && local.is_none() && !inner.json.is_empty() {
                    return Err(reader.bad(key, "has neither `full_attention` nor `sliding_attention`"));
                }
                (full, local)
            }
            _ => (Some(inner), None),
        };
        Ok((
            Self::new(key, reader, full, theta)?,
            Self::new(key, reader, local, local_theta)?,
        ))
    }

    fn new(
        key: &'static str,
        outer: &Reader<'_>,
        inner: Option<Reader<'_>>,
        theta: f64,
    ) -> Result<Self, ModelError> {
        let plain = Self {
            theta,
            scaling: Scaling::None,
        };
        for reader in [Some(outer), inner.as_ref()].into_iter().flatten() {
            if reader.number_or("partial_rotary_factor", 1.0)? != 1.0 {
                return Err(outer.bad(
                    "partial_rotary_factor",
                    "heads that are turned in part are not supported",
                ));
            }
        }
        let Some(inner) = inner else { return Ok(plain) };
        let kind = inner.get("rope_type").or_else(|| inner.get("type"));
        let scaling = match kind.map(|kind| kind.as_str().unwrap_or_default()) {
            None | Some("default") => Scaling::None,
            Some("linear") => Scaling::Linear(inner.number("factor")?),
            Some("llama3") => Scaling::Llama3(Llama3 {
                factor: inner.number("factor")?,
                low_freq_factor: inner.number("low_freq_factor")?,
                high_freq_factor: inner.number("high_freq_factor")?,
                original_max_position_embeddings: inner.number("original_max_position_embeddings")?,
            }),
            Some(_) => {
                let kind = kind.unwrap_or(&Value::Null);
                let why = format!("asks for {kind}; `default`, `linear` and `llama3` are supported");
                return Err(outer.bad(key, why));
            }
        };
        Ok(Self {
            theta: inner.number_or("rope_theta", theta)?,
            scaling,
        })
    }
}

/// The object that says how the rotary embedding is scaled, and its key.
fn parameters<'a>(reader: &Reader<'a>) -> Result<Option<(&'static str, Reader<'a>)>, ModelError> {
    for key in ["rope_parameters", "rope_scaling"] {
        if let Some(inner) = reader.object(key)? {
            return Ok(Some((key, inner)));
        }
    }
    Ok(None)
}

impl Llama3 {
    /// transformers' `_compute_llama3_parameters`: long waves are stretched, short ones not, between them a ramp.
    fn scale(self, freq: f64) -> f64 {
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
