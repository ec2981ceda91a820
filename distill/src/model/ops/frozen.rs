//! A matrix that gets no gradient: numbers in memory, or quantised rows that become numbers tile by tile.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::gemm::{Mat, Threads, gemm};
use super::real::{Real, with_elements};
use crate::model::QuantizedRows;

/// Rows of a quantised matrix that are numbers at one time.
const TILE: usize = 256;

/// A frozen matrix `[out, in]`.
#[derive(Debug, Clone)]
pub enum Frozen {
    /// Numbers in memory.
    Dense(Tensor),
    /// Rows that become numbers when they are needed.
    Quantized(Arc<dyn QuantizedRows>),
}

impl Frozen {
    /// Rows and columns.
    pub fn dims(&self) -> Result<[usize; 2]> {
        match self {
            Self::Dense(tensor) => Ok(tensor.dims2()?.into()),
            Self::Quantized(rows) => Ok(rows.dims()),
        }
    }

    /// Calls `f` with every tile: its first row, and its elements.
    pub(crate) fn tiles<T: Real>(&self, op: &str, mut f: impl FnMut(usize, &[T])) -> Result<()> {
        match self {
            Self::Dense(tensor) => with_elements(&tensor.detach(), op, |w| {
                f(0, w);
                Ok(())
            }),
            Self::Quantized(matrix) => {
                let [rows, columns] = matrix.dims();
                for first in (0..rows).step_by(TILE) {
                    let last = rows.min(first + TILE);
                    let mut tile = vec![0.0; (last - first) * columns];
                    matrix.dequantize(first..last, &mut tile);
                    f(first, &T::from_f32(tile));
                }
                Ok(())
            }
        }
    }

    /// (rows of x, in, out), or an error when the shapes do not fit.
    pub(crate) fn sizes(&self, x: &[usize]) -> Result<(usize, usize, usize)> {
        super::linear::sizes(x, &self.dims()?)
    }

    /// x·Wᵀ, `[rows, out]`.
    pub(crate) fn forward<T: Real>(
        &self,
        op: &str,
        x: &[T],
        (rows, input, out): (usize, usize, usize),
    ) -> Result<Vec<T>> {
        let mut y = vec![T::zero(); rows * out];
        self.tiles(op, |first, tile: &[T]| {
            let tile = Mat::new(tile, tile.len() / input, input);
            gemm(
                &mut y[first..],
                out,
                0.0,
                1.0,
                Mat::new(x, rows, input),
                tile.t(),
                Threads::All,
            );
        })?;
        Ok(y)
    }

    /// dx = dy·W, `[rows, in]`.
    pub(crate) fn backward_x<T: Real>(
        &self,
        op: &str,
        dy: &[T],
        (rows, input, out): (usize, usize, usize),
    ) -> Result<Vec<T>> {
        let mut dx = vec![T::zero(); rows * input];
        self.tiles(op, |first, tile: &[T]| {
            let count = tile.len() / input;
            let dy = Mat::strided(&dy[first..], rows, count, out);
            let keep = if first == 0 { 0.0 } else { 1.0 };
            gemm(
                &mut dx,
                input,
                keep,
                1.0,
                dy,
                Mat::new(tile, count, input),
                Threads::All,
            );
        })?;
        Ok(dx)
    }
}
