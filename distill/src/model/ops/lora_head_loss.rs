//! The output layer under an adapter and a loss over its logits in one operation, a chunk of rows at a time, as in
//! [`head_loss`](super::head_loss): logits = (hidden·Wᵀ + down·Bᵀ) ∘ factors.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType as _};
use rayon::prelude::*;

use super::composed;
use super::frozen::Frozen;
use super::gemm::{Mat, Threads, gemm};
use super::head_loss::Criterion;
use super::linear;
use super::real::{Real, dtype, elements, for_real, tensor};

/// Columns of the factors' gradient that one thread sums.
const COLUMNS: usize = 4096;

/// An adapter on an output layer.
#[derive(Debug, Clone, Copy)]
pub struct HeadAdapter<'a> {
    /// What A makes of the hidden states, times the scale, `[rows, r]`.
    pub down: &'a Tensor,
    /// B, `[vocabulary, r]`.
    pub b: &'a Tensor,
    /// What DoRA multiplies the logits by, `[vocabulary]`.
    pub factors: Option<&'a Tensor>,
}

struct LoraHeadLoss<C> {
    criterion: C,
    weight: Frozen,
    has_factors: bool,
    with_gradient: bool,
    /// The gradients by x, B and the factors, from the forward pass.
    kept: Mutex<Option<[Tensor; 3]>>,
}

/// The loss of (hidden·Wᵀ + down·Bᵀ) ∘ factors, a scalar. hidden `[rows, d]`, a weight `[vocabulary, d]` that stays as
/// it is.
pub(super) fn lora_head_loss<C: Criterion>(
    hidden: &Tensor,
    weight: &Frozen,
    adapter: HeadAdapter<'_>,
    criterion: C,
) -> Result<Tensor> {
    if composed::is_for(hidden) {
        return composed::lora_head_loss(hidden, weight, adapter, &criterion);
    }
    let HeadAdapter { down, b, factors } = adapter;
    // An operation of candle has three arguments at most: hidden and down go side by side.
    let x = Tensor::cat(&[hidden, down], 1)?.contiguous()?;
    let none = Tensor::zeros(weight.dims()?[0], x.dtype(), x.device())?;
    let op = LoraHeadLoss {
        criterion,
        weight: weight.clone(),
        has_factors: factors.is_some(),
        with_gradient: x.track_op() || b.track_op() || factors.is_some_and(Tensor::track_op),
        kept: Mutex::new(None),
    };
    x.apply_op3(b, factors.unwrap_or(&none), op)
}

/// (rows, d, r, vocabulary).
type Sizes = (usize, usize, usize, usize);

/// The sums over the chunks: the loss, and the gradients by x, B and the factors.
struct Sums<T> {
    loss: f64,
    gradients: [Vec<T>; 3],
}

impl<C: Criterion> LoraHeadLoss<C> {
    fn sizes(&self, x: &[usize], lora_b: &[usize], factors: &[usize]) -> Result<Sizes> {
        let [vocabulary, d] = self.weight.dims()?;
        match (x, lora_b, factors) {
            (&[rows, width], &[b_rows, r], &[count])
                if width == d + r && b_rows == vocabulary && count == vocabulary =>
            {
                Ok((rows, d, r, vocabulary))
            }
            _ => candle_core::bail!(
                "{}: {x:?}, B {lora_b:?}, factors {factors:?} for [{vocabulary}, {d}]",
                C::NAME
            ),
        }
    }

    fn compute<T: Real>(&self, x: &[T], b: &[T], factors: &[T], sizes: Sizes) -> Result<Sums<T>> {
        let (rows, d, r, vocabulary) = sizes;
        let mut loss = 0.0;
        let length = |length: usize| vec![T::zero(); if self.with_gradient { length } else { 0 }];
        let (mut dx, mut db) = (length(rows * (d + r)), length(vocabulary * r));
        let mut d_factors = length(vocabulary);
        for (first, chunk) in self.criterion.targets().chunks() {
            let count = chunk.len();
            let part = |from: usize, to: usize| -> Vec<T> {
                chunk
                    .iter()
                    .flat_map(|(row, _)| &x[row * (d + r)..][from..to])
                    .copied()
                    .collect()
            };
            let (hidden, down) = (part(0, d), part(d, d + r));
            let mut logits = self.weight.forward(C::NAME, &hidden, (count, d, vocabulary))?;
            let (down_mat, b_mat) = (Mat::new(&down, count, r), Mat::new(b, vocabulary, r));
            gemm(
                &mut logits,
                vocabulary,
                1.0,
                1.0,
                down_mat,
                b_mat.t(),
                Threads::All,
            );
            let scale = |row: &mut [T]| {
                if self.has_factors {
                    row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= *factor);
                }
            };
            // The factors' gradient needs the logits before them.
            let before = if self.has_factors && self.with_gradient {
                logits.clone()
            } else {
                Vec::new()
            };
            logits.par_chunks_mut(vocabulary).for_each(scale);
            loss += self.criterion.compute(first, &mut logits, vocabulary)?;
            if !self.with_gradient {
                continue;
            }
            d_factors
                .par_chunks_mut(COLUMNS)
                .enumerate()
                .for_each(|(i, sums)| {
                    let rows = logits
                        .chunks_exact(vocabulary)
                        .zip(before.chunks_exact(vocabulary));
                    for (d_logits, before) in rows {
                        let products = d_logits[i * COLUMNS..].iter().zip(&before[i * COLUMNS..]);
                        sums.iter_mut()
                            .zip(products)
                            .for_each(|(sum, (d, x))| *sum += *d * *x);
                    }
                });
            logits.par_chunks_mut(vocabulary).for_each(scale);
            let d_logits = Mat::new(&logits, count, vocabulary);
            gemm(&mut db, r, 1.0, 1.0, d_logits.t(), down_mat, Threads::All);
            let d_hidden = self.weight.backward_x(C::NAME, &logits, (count, d, vocabulary))?;
            let d_down = linear::backward_x(&logits, b, (count, r, vocabulary));
            for (i, (row, _)) in chunk.iter().enumerate() {
                let dx = &mut dx[row * (d + r)..][..d + r];
                dx[..d].copy_from_slice(&d_hidden[i * d..][..d]);
                dx[d..].copy_from_slice(&d_down[i * r..][..r]);
            }
        }
        Ok(Sums {
            loss,
            gradients: [dx, db, d_factors],
        })
    }
}

impl<C: Criterion> CustomOp3 for LoraHeadLoss<C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
        factors: &CpuStorage,
        factors_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = self.sizes(x_layout.dims(), b_layout.dims(), factors_layout.dims())?;
        self.criterion.targets().check(C::NAME, sizes.0, sizes.3)?;
        for_real!(dtype(x), C::NAME, T => {
            let (x, b) = (elements::<T>(x, x_layout, C::NAME)?, elements(b, b_layout, C::NAME)?);
            let sums = self.compute(x, b, elements(factors, factors_layout, C::NAME)?, sizes)?;
            if self.with_gradient {
                let [dx, db, d_factors] = sums.gradients;
                let kept = [
                    tensor(dx, x_layout.dims())?,
                    tensor(db, b_layout.dims())?,
                    tensor(d_factors, factors_layout.dims())?,
                ];
                *self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(kept);
            }
            Ok((T::to_cpu_storage_owned(vec![T::of(sums.loss)]), Shape::from(())))
        })
    }

    fn bwd(
        &self,
        _x: &Tensor,
        _b: &Tensor,
        _factors: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .take();
        let Some([dx, db, d_factors]) = kept else {
            candle_core::bail!("{}: backward twice, or before forward", C::NAME)
        };
        let grad = grad.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
        let scaled = |t: Tensor| if grad == 1.0 { Ok(t) } else { t.affine(grad, 0.0) };
        Ok((Some(scaled(dx)?), Some(scaled(db)?), Some(scaled(d_factors)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::{check, random};
    use crate::model::ops::{Targets, cross_entropy};

    fn targets(chunk: usize) -> Targets {
        let rows = vec![(0, 3), (2, 0), (3, 6), (4, 3)];
        Targets { rows, chunk }
    }

    #[test]
    fn gradients_are_the_differences_whatever_the_chunk() {
        let (hidden, weight) = (random(&[5, 4], 60), random(&[7, 4], 61));
        let (down, b, factors) = (random(&[5, 2], 62), random(&[7, 2], 63), random(&[7], 64));
        let weight = Frozen::Dense(weight.as_detached_tensor());
        for chunk in [1, 3, 8] {
            check(&[&hidden, &down, &b, &factors], |args| {
                let adapter = HeadAdapter {
                    down: &args[1],
                    b: &args[2],
                    factors: Some(&args[3]),
                };
                lora_head_loss(&args[0], &weight, adapter, targets(chunk))? * 0.7
            });
            check(&[&hidden, &down, &b], |args| {
                let adapter = HeadAdapter {
                    down: &args[1],
                    b: &args[2],
                    factors: None,
                };
                lora_head_loss(&args[0], &weight, adapter, targets(chunk))
            });
        }
    }

    #[test]
    fn it_is_the_cross_entropy_of_the_merged_matrix() {
        let (hidden, weight, a) = (random(&[5, 4], 65), random(&[7, 4], 66), random(&[2, 4], 67));
        let (b, factors) = (random(&[7, 2], 68), random(&[7], 69));
        let down = hidden.matmul(&a.t().unwrap()).unwrap();
        let frozen = Frozen::Dense(weight.as_detached_tensor());
        let adapter = HeadAdapter {
            down: &down,
            b: &b,
            factors: Some(factors.as_tensor()),
        };
        let ours = lora_head_loss(&hidden, &frozen, adapter, targets(3)).unwrap();
        let sum = (weight.as_tensor() + b.matmul(&a).unwrap()).unwrap();
        let merged = sum.broadcast_mul(&factors.unsqueeze(1).unwrap()).unwrap();
        let theirs = cross_entropy(&hidden, &merged, targets(8)).unwrap();
        let [ours, theirs] = [ours, theirs].map(|loss| loss.to_scalar::<f64>().unwrap());
        assert!((ours - theirs).abs() < 1e-12, "{ours} {theirs}");
    }
}
