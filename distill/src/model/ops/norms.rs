//! The lengths of the rows, or of the columns, of a matrix under a low-rank adapter, W + s·L·R. DoRA divides by them
//! and treats them as constants (<https://arxiv.org/abs/2402.09353>, section 4.3), so they have no gradient.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::frozen::Frozen;
use super::gemm::{Mat, Threads, gemm};
use super::real::with_elements;

const OP: &str = "norms";
/// Rows of the sum that exist at one time, for each thread.
const ROWS: usize = 32;

/// W + s·left·right: left `[out, r]`, right `[r, in]`.
pub(crate) struct Adapted<'a> {
    /// W, `[out, in]`.
    pub(crate) weight: &'a Frozen,
    pub(crate) left: &'a Tensor,
    pub(crate) right: &'a Tensor,
    pub(crate) scale: f64,
}

impl Adapted<'_> {
    /// The length of every row, `[out]`.
    pub(crate) fn row_norms(&self) -> Result<Vec<f32>> {
        if !self.left.device().is_cpu() {
            return self.composed(1);
        }
        let parts = self.blocks(|rows, columns| {
            let square = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            rows.chunks_exact(columns)
                .map(|row| square(row).sqrt() as f32)
                .collect::<Vec<f32>>()
        })?;
        Ok(parts.concat())
    }

    /// The length of every column, `[in]`.
    pub(crate) fn column_norms(&self) -> Result<Vec<f32>> {
        if !self.left.device().is_cpu() {
            return self.composed(0);
        }
        let parts = self.blocks(|rows, columns| {
            let mut sums = vec![0.0f64; columns];
            for row in rows.chunks_exact(columns) {
                sums.iter_mut()
                    .zip(row)
                    .for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
            }
            sums
        })?;
        // In order, whatever the threads: the same seed gives the same bits.
        let sums = parts.into_iter().reduce(|mut all, part| {
            all.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            all
        });
        Ok(sums
            .unwrap_or_default()
            .into_iter()
            .map(|sum| sum.sqrt() as f32)
            .collect())
    }

    /// The same of candle's own operations, for devices other than the CPU: the lengths over a dimension.
    fn composed(&self, dim: usize) -> Result<Vec<f32>> {
        let Frozen::Dense(weight) = self.weight else {
            candle_core::bail!("{OP}: DoRA on a quantised matrix is computed on the CPU only")
        };
        let added = (self.left.matmul(self.right)? * self.scale)?;
        let sum = (weight.to_dtype(DType::F32)? + added.to_dtype(DType::F32)?)?;
        sum.sqr()?.sum(dim)?.sqrt()?.to_vec1()
    }

    /// What `f` makes of every block of rows (row-major, and the number of columns), in order.
    fn blocks<R: Send>(&self, f: impl Fn(&[f32], usize) -> R + Sync) -> Result<Vec<R>> {
        let [_, columns] = self.weight.dims()?;
        let rank = self.right.dim(0)?;
        let mut all = Vec::new();
        with_elements::<f32, _>(self.left, OP, |left| {
            with_elements::<f32, _>(self.right, OP, |right| {
                self.weight.tiles(OP, |first, tile: &[f32]| {
                    let block = |(i, rows): (usize, &[f32])| {
                        let (mut sum, count) = (rows.to_vec(), rows.len() / columns);
                        let left = &left[(first + i * ROWS) * rank..][..count * rank];
                        let (left, right) = (Mat::new(left, count, rank), Mat::new(right, rank, columns));
                        gemm(&mut sum, columns, 1.0, self.scale, left, right, Threads::One);
                        f(&sum, columns)
                    };
                    let blocks = tile.par_chunks(ROWS * columns).enumerate().map(block);
                    all.extend(blocks.collect::<Vec<R>>());
                })
            })
        })?;
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::random;

    #[test]
    fn the_norms_are_those_of_the_sum() {
        let f32s = |shape: &[usize], seed| random(shape, seed).to_dtype(DType::F32).unwrap();
        let (weight, left, right) = (f32s(&[70, 5], 50), f32s(&[70, 2], 51), f32s(&[2, 5], 52));
        let weight = Frozen::Dense(weight);
        let adapted = Adapted {
            weight: &weight,
            left: &left,
            right: &right,
            scale: 1.5,
        };
        for (ours, dim) in [(adapted.row_norms(), 1), (adapted.column_norms(), 0)] {
            let (ours, theirs) = (ours.unwrap(), adapted.composed(dim).unwrap());
            assert_eq!(ours.len(), theirs.len());
            assert!(ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }
}
