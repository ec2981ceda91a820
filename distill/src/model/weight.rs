//! The matrix of a linear layer or an embedding: numbers in memory, or quantised blocks that stay as they are.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use rayon::prelude::*;

use super::ops::{Frozen, drawn_linear, frozen_linear};
use super::{Mode, Parameter};

/// A frozen matrix whose rows become numbers when they are needed.
pub trait QuantizedRows: Debug + Send + Sync {
    /// The name in the checkpoint.
    fn name(&self) -> &str;
    /// Rows and columns, `[out, in]`.
    fn dims(&self) -> [usize; 2];
    /// Fills `out` (`rows.len() · in`) with these rows.
    fn dequantize(&self, rows: Range<usize>, out: &mut [f32]);
    /// Bytes that the matrix takes.
    fn bytes(&self) -> usize;
    /// A part was read and is no longer needed: what is seldom read from a file may give its memory back.
    fn used(&self) {}

    /// All of it as numbers on a device. Blocks that are in the computer's memory become numbers there, and are sent.
    fn on(&self, device: &Device, dtype: DType) -> Result<Tensor> {
        let [rows, columns] = self.dims();
        let mut numbers = vec![0.0; rows * columns];
        let parts = numbers.par_chunks_mut((ROWS * columns).max(1)).enumerate();
        parts.for_each(|(i, out)| {
            let start = i * ROWS;
            self.dequantize(start..start + out.len() / columns, out);
        });
        Tensor::from_vec(numbers, (rows, columns), device)?.to_dtype(dtype)
    }
}

/// Rows that a thread dequantises at a time.
const ROWS: usize = 16;

/// A matrix `[out, in]`.
#[derive(Debug)]
pub enum Weight {
    /// Numbers in memory, frozen or trained.
    Dense(Parameter),
    /// Blocks that stay as they are.
    Quantized(Arc<dyn QuantizedRows>),
}

impl Weight {
    /// The name in the checkpoint.
    pub fn name(&self) -> &str {
        match self {
            Self::Dense(parameter) => &parameter.name,
            Self::Quantized(rows) => rows.name(),
        }
    }

    /// x·Wᵀ, `[rows, in]` → `[rows, out]`, without a gradient of W.
    pub(super) fn product(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        match mode.drawn {
            true => drawn_linear(x, &self.frozen()),
            false => frozen_linear(x, &self.frozen()),
        }
    }

    /// Rows and columns, `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(parameter) => match *parameter.get(Mode::INFERENCE).dims() {
                [out, input] => [out, input],
                _ => [0, 0],
            },
            Self::Quantized(rows) => rows.dims(),
        }
    }

    /// The bytes that it takes, in memory or in a mapped file.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(parameter) => parameter.bytes(),
            Self::Quantized(rows) => rows.bytes(),
        }
    }

    /// A frozen matrix of another name with the same numbers, in the memory of a device: that of the model.
    pub(super) fn copy(&self, name: String, device: &Device) -> Result<Self> {
        let tensor = match self {
            Self::Dense(parameter) => parameter.get(Mode::INFERENCE).clone(),
            Self::Quantized(matrix) => matrix.on(device, DType::F32)?,
        };
        Ok(Self::Dense(Parameter::frozen(name, &tensor)))
    }

    /// Makes it a trained one; quantised blocks become numbers in memory.
    pub(super) fn train(&mut self, device: &Device) -> Result<()> {
        if matches!(self, Self::Quantized(_)) {
            *self = self.copy(self.name().to_owned(), device)?;
        }
        match self {
            Self::Dense(parameter) => parameter.train(),
            Self::Quantized(_) => Ok(()),
        }
    }

    /// Gives it other values of the same shape.
    pub(super) fn replace(&mut self, tensor: &Tensor) -> Result<()> {
        match self {
            Self::Dense(parameter) => parameter.replace(tensor),
            Self::Quantized(rows) => {
                *self = Self::Dense(Parameter::frozen(rows.name().to_owned(), tensor));
                Ok(())
            }
        }
    }

    /// The numbers in memory, where there are.
    pub fn dense(&self) -> Option<&Parameter> {
        match self {
            Self::Dense(parameter) => Some(parameter),
            Self::Quantized(_) => None,
        }
    }

    /// The quantised blocks, where they stay as they are.
    pub fn quantized(&self) -> Option<&dyn QuantizedRows> {
        match self {
            Self::Dense(_) => None,
            Self::Quantized(rows) => Some(rows.as_ref()),
        }
    }

    /// The variable, where the matrix is trained.
    pub fn var(&self) -> Option<&Var> {
        self.dense()?.var()
    }

    /// The matrix as operations take it that compute no gradient of it.
    pub fn frozen(&self) -> Frozen {
        match self {
            Self::Dense(parameter) => Frozen::Dense(parameter.get(Mode::INFERENCE).clone()),
            Self::Quantized(rows) => Frozen::Quantized(rows.clone()),
        }
    }
}
