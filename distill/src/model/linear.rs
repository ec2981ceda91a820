//! Linear layers: frozen, trained, or frozen under an adapter.

use candle_core::{Result, Tensor};

use super::ops::{frozen_linear, linear};
use super::{Lora, Mode, Parameter, Weight};

/// A linear layer, y = x·Wᵀ + b.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Parameter>,
    /// The adapter.
    pub lora: Option<Lora>,
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
        let y = match (&self.lora, &self.weight) {
            (Some(lora), weight) => lora.forward(x, weight, mode)?,
            (None, Weight::Dense(weight)) if mode.gradient && weight.var().is_some() => {
                linear(x, weight.get(mode))?
            }
            (None, weight) => frozen_linear(x, &weight.frozen())?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias.get(mode)),
            None => Ok(y),
        }
    }
}
