//! Linear layers: frozen, trained, or frozen under an adapter.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::ops::linear;
use super::{Lora, Mode, Parameter, Weight};

/// Sees the inputs of a linear layer.
pub trait Watch: Debug + Send + Sync {
    /// An input of a forward pass, `[rows, in]`.
    fn see(&self, x: &Tensor) -> Result<()>;
}

/// A linear layer, y = x·Wᵀ + b.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Parameter>,
    /// The adapter.
    pub lora: Option<Lora>,
    /// Who sees the inputs, while a model is measured.
    pub watch: Option<Arc<dyn Watch>>,
}

impl Linear {
    /// The module's name: the weight's without `.weight`.
    pub fn module(&self) -> &str {
        self.weight.name().trim_end_matches(".weight")
    }

    /// Weight and bias, as far as they are numbers in memory.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.weight.dense().into_iter().chain(&self.bias)
    }

    /// x `[rows, in]` → `[rows, out]`.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        if let Some(watch) = &self.watch {
            watch.see(x)?;
        }
        let y = match (&self.lora, &self.weight) {
            (Some(lora), weight) if !mode.base => lora.forward(x, weight, mode)?,
            (_, Weight::Dense(weight)) if mode.gradient && weight.var().is_some() => {
                linear(x, weight.get(mode))?
            }
            (_, weight) => weight.product(x, mode)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.get(mode).to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }
}
