//! Linear layers: frozen, trained, or frozen under an adapter.

use candle_core::{Result, Tensor};

use super::ops::{Dropout, frozen_linear, linear, lora_linear};
use super::{Mode, Parameter, Weight};
use crate::random::mix;

/// A low-rank adapter: the layer adds `scale · lora_b · lora_a · x`.
#[derive(Debug)]
pub struct Lora {
    /// `[r, in]`.
    pub a: Parameter,
    /// `[out, r]`.
    pub b: Parameter,
    /// `alpha / r`, or `alpha / √r`.
    pub scale: f64,
    /// The chance with which an input of A is dropped while training.
    pub dropout: f64,
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
            (Some(lora), weight) => {
                let dropout = mode
                    .dropout_seed
                    .filter(|_| lora.dropout > 0.0)
                    .map(|seed| Dropout {
                        chance: lora.dropout,
                        seed: weight
                            .name()
                            .bytes()
                            .fold(seed, |hash, byte| mix(hash ^ u64::from(byte))),
                    });
                lora_linear(
                    x,
                    &weight.frozen(),
                    lora.a.get(mode),
                    lora.b.get(mode),
                    lora.scale,
                    dropout,
                )?
            }
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
