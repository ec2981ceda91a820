//! Weights that are frozen or trained, and linear layers that may carry an adapter.

use candle_core::{Result, Tensor, Var};

use super::ops::{Dropout, frozen_linear, linear, lora_linear};
use crate::random::mix;

/// How a forward pass is meant.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mode {
    /// Whether gradients will be asked for. Without, no graph is built.
    pub gradient: bool,
    /// The seed of this pass's dropout; without one nothing is dropped.
    pub dropout_seed: Option<u64>,
}

impl Mode {
    /// For evaluation and generation: no gradients, no dropout.
    pub const INFERENCE: Self = Self {
        gradient: false,
        dropout_seed: None,
    };
}

/// One weight tensor with its Hugging Face name.
#[derive(Debug)]
pub struct Parameter {
    /// The name in the checkpoint.
    pub name: String,
    tensor: Tensor,
    var: Option<Var>,
}

impl Parameter {
    /// A weight that stays as it is.
    pub fn frozen(name: String, tensor: &Tensor) -> Self {
        Self {
            name,
            tensor: tensor.detach(),
            var: None,
        }
    }

    /// A weight that is trained.
    pub fn trained(name: String, tensor: &Tensor) -> Result<Self> {
        let var = Var::from_tensor(tensor)?;
        Ok(Self {
            name,
            tensor: var.as_detached_tensor(),
            var: Some(var),
        })
    }

    /// The variable, where it is trained.
    pub fn var(&self) -> Option<&Var> {
        self.var.as_ref()
    }

    /// The values; tied to the gradient only where the mode asks for it.
    pub fn get(&self, mode: Mode) -> &Tensor {
        match &self.var {
            Some(var) if mode.gradient => var.as_tensor(),
            _ => &self.tensor,
        }
    }
}

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

/// A linear layer without bias, frozen, trained, or frozen under an adapter.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Parameter,
    /// The adapter.
    pub lora: Option<Lora>,
}

impl Linear {
    /// The module's name: the weight's without `.weight`.
    pub fn module(&self) -> &str {
        self.weight.name.trim_end_matches(".weight")
    }

    /// x `[rows, in]` → `[rows, out]`.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        match &self.lora {
            Some(lora) => {
                let dropout = mode.dropout_seed.filter(|_| lora.dropout > 0.0).map(|seed| {
                    let name = self
                        .weight
                        .name
                        .bytes()
                        .fold(seed, |hash, byte| mix(hash ^ u64::from(byte)));
                    Dropout {
                        chance: lora.dropout,
                        seed: name,
                    }
                });
                let (a, b) = (lora.a.get(mode), lora.b.get(mode));
                lora_linear(x, self.weight.get(Mode::INFERENCE), a, b, lora.scale, dropout)
            }
            None if mode.gradient && self.weight.var().is_some() => linear(x, self.weight.get(mode)),
            None => frozen_linear(x, self.weight.get(Mode::INFERENCE)),
        }
    }
}
