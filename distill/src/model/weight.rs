//! The matrix of a linear layer or an embedding: numbers in memory, or quantised blocks that stay as they are.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};

use super::ops::Frozen;
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
}

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
            Self::Dense(_) => self.dims().iter().product::<usize>() * 4,
            Self::Quantized(rows) => rows.bytes(),
        }
    }

    /// A frozen matrix of another name with the same numbers, in memory.
    pub(super) fn copy(&self, name: String) -> Result<Self> {
        let tensor = match self {
            Self::Dense(parameter) => parameter.get(Mode::INFERENCE).clone(),
            Self::Quantized(matrix) => {
                let [rows, columns] = matrix.dims();
                let mut numbers = vec![0.0; rows * columns];
                matrix.dequantize(0..rows, &mut numbers);
                Tensor::from_vec(numbers, (rows, columns), &Device::Cpu)?
            }
        };
        Ok(Self::Dense(Parameter::frozen(name, &tensor)))
    }

    /// Makes it a trained one; quantised blocks become numbers in memory.
    pub(super) fn train(&mut self) -> Result<()> {
        if matches!(self, Self::Quantized(_)) {
            *self = self.copy(self.name().to_owned())?;
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
