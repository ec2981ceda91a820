//! RMSNorm as a layer.

use candle_core::{Result, Tensor};

use super::load::Loader;
use super::ops::{per_head, rms_norm, rms_norm_plus_one};
use super::{Architecture, Config, Mode, ModelError, Parameter};

/// An RMSNorm over rows, or over the heads in them.
#[derive(Debug)]
pub(crate) struct Norm {
    pub(crate) weight: Parameter,
    eps: f64,
    /// Whether the factor is 1 + weight.
    plus_one: bool,
}

impl Norm {
    /// Takes `module.weight`, `[d]`, out of a checkpoint.
    pub(crate) fn load(
        loader: &mut Loader<'_>,
        config: &Config,
        module: &str,
        d: usize,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self {
            weight: loader.parameter(format!("{module}.weight"), &[d])?,
            eps: config.rms_norm_eps,
            plus_one: config.architecture == Architecture::Gemma3,
        })
    }

    /// x `[rows, d]` → the same shape.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let norm = if self.plus_one {
            rms_norm_plus_one
        } else {
            rms_norm
        };
        norm(x, self.weight.get(mode), self.eps)
    }

    /// x `[rows, heads · head_dim]` → the same shape, every head by itself.
    pub(crate) fn heads(&self, x: &Tensor, head_dim: usize, mode: Mode) -> Result<Tensor> {
        per_head(x, head_dim, |x| self.forward(x, mode))
    }
}
