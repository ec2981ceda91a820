//! Tensors that are frozen or trained, and how a forward pass is meant.

use candle_core::{DType, Result, Tensor, Var};

/// How a forward pass is meant.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mode {
    /// Whether gradients will be asked for. Without, no graph is built.
    pub gradient: bool,
    /// The seed of this pass's dropout; without one nothing is dropped.
    pub dropout_seed: Option<u64>,
    /// Whether adapters are left out: what is asked is the model that they stand on.
    pub base: bool,
    /// Whether tokens are drawn: a product with few rows then goes a faster way, with bits of its own.
    pub drawn: bool,
}

impl Mode {
    /// For evaluation: no gradients, no dropout.
    pub const INFERENCE: Self = Self {
        gradient: false,
        dropout_seed: None,
        base: false,
        drawn: false,
    };
    /// The same without adapters.
    pub const BASE: Self = Self {
        base: true,
        ..Self::INFERENCE
    };
    /// For the tokens of answers.
    pub const DRAWN: Self = Self {
        drawn: true,
        ..Self::INFERENCE
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

    /// A weight that is trained: in f32, whatever type the model computes in.
    pub fn trained(name: String, tensor: &Tensor) -> Result<Self> {
        let var = Var::from_tensor(&tensor.to_dtype(DType::F32)?)?;
        Ok(Self {
            name,
            tensor: var.as_detached_tensor(),
            var: Some(var),
        })
    }

    /// Makes it a trained one.
    pub(super) fn train(&mut self) -> Result<()> {
        if self.var.is_none() {
            *self = Self::trained(std::mem::take(&mut self.name), &self.tensor)?;
        }
        Ok(())
    }

    /// Gives it other values of the same shape; it stays trained or frozen, where it is and of its type.
    pub(super) fn replace(&mut self, tensor: &Tensor) -> Result<()> {
        let name = std::mem::take(&mut self.name);
        let tensor = &tensor
            .to_device(self.tensor.device())?
            .to_dtype(self.tensor.dtype())?;
        *self = match self.var {
            Some(_) => Self::trained(name, tensor)?,
            None => Self::frozen(name, tensor),
        };
        Ok(())
    }

    /// The variable, where it is trained.
    pub fn var(&self) -> Option<&Var> {
        self.var.as_ref()
    }

    /// The bytes of its values.
    pub fn bytes(&self) -> usize {
        self.tensor.elem_count() * self.tensor.dtype().size_in_bytes()
    }

    /// The values; tied to the gradient only where the mode asks for it.
    pub fn get(&self, mode: Mode) -> &Tensor {
        match &self.var {
            Some(var) if mode.gradient => var.as_tensor(),
            _ => &self.tensor,
        }
    }
}
