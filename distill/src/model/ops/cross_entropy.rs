//! Output layer and cross-entropy in one operation, a chunk of rows at a time: the logits of all rows never
//! exist together, nor do their gradients. Only rows with a label are computed.
//!
//! The gradients are computed in the forward pass, while a chunk's logits are at hand (as in Liger Kernel,
//! <https://arxiv.org/abs/2410.10989>), and scaled in the backward pass.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::composed;
use super::frozen::Frozen;
use super::gemm::{Mat, Threads, gemm};
use super::real::{Real, dtype, elements, for_real, tensor};

const OP: &str = "cross_entropy";

/// The rows that are predicted from, with what should follow each.
#[derive(Debug, Clone)]
pub struct Targets {
    /// (row of the hidden states, the token that follows it), by row.
    pub rows: Vec<(usize, u32)>,
    /// How many rows are computed at a time, at least 1.
    pub chunk: usize,
}

struct Kept {
    d_hidden: Tensor,
    d_weight: Option<Tensor>,
}

struct CrossEntropy {
    targets: Targets,
    /// The output layer's weight.
    weight: Frozen,
    /// Whether it is trained.
    with_dw: bool,
    with_gradient: bool,
    kept: Mutex<Option<Kept>>,
}

/// The **sum** over the targets of −log softmax(hidden·Wᵀ)\[token\], a scalar. hidden `[rows, d]`,
/// weight `[vocabulary, d]`, which gets a gradient too.
pub fn cross_entropy(hidden: &Tensor, weight: &Tensor, targets: Targets) -> Result<Tensor> {
    if !hidden.device().is_cpu() {
        return composed::cross_entropy(hidden, weight, &targets);
    }
    let op = CrossEntropy {
        targets,
        weight: Frozen::Dense(weight.detach()),
        with_dw: true,
        with_gradient: true,
        kept: Mutex::new(None),
    };
    hidden.apply_op2(weight, op)
}

/// The same with a weight that gets no gradient.
pub fn frozen_cross_entropy(hidden: &Tensor, weight: &Frozen, targets: Targets) -> Result<Tensor> {
    if !hidden.device().is_cpu() {
        return composed::frozen_cross_entropy(hidden, weight, &targets);
    }
    let op = CrossEntropy {
        targets,
        weight: weight.clone(),
        with_dw: false,
        with_gradient: hidden.track_op(),
        kept: Mutex::new(None),
    };
    hidden.apply_op1(op)
}

struct Sums<T> {
    loss: f64,
    d_hidden: Option<Vec<T>>,
    d_weight: Option<Vec<T>>,
}

/// One row: its loss, and in place of the logits their gradient, softmax − one-hot.
pub(super) fn loss_and_gradient<T: Real>(logits: &mut [T], token: usize) -> f64 {
    let max = logits
        .iter()
        .fold(T::of(f64::NEG_INFINITY), |max, x| if *x > max { *x } else { max });
    let at_token = logits[token];
    // Parts of the sum are kept apart, so that 50,000 small f32 numbers add up without a loss.
    let mut sum = 0.0;
    for part in logits.chunks_mut(256) {
        let mut small = T::zero();
        for x in part.iter_mut() {
            *x = (*x - max).exp();
            small += *x;
        }
        sum += small.to_f64();
    }
    let scale = T::of(1.0 / sum);
    for x in logits.iter_mut() {
        *x *= scale;
    }
    logits[token] -= T::one();
    sum.ln() - (at_token - max).to_f64()
}

impl CrossEntropy {
    /// The loss, and the gradients by hidden and, where it is trained, by the weight.
    fn compute<T: Real>(
        &self,
        hidden: &[T],
        (rows, d, vocabulary): (usize, usize, usize),
    ) -> Result<Sums<T>> {
        let mut sums = Sums {
            loss: 0.0,
            d_hidden: self.with_gradient.then(|| vec![T::zero(); rows * d]),
            d_weight: self.with_dw.then(|| vec![T::zero(); vocabulary * d]),
        };
        for chunk in self.targets.rows.chunks(self.targets.chunk.max(1)) {
            let sizes = (chunk.len(), d, vocabulary);
            let mut x = Vec::with_capacity(chunk.len() * d);
            for (row, _) in chunk {
                x.extend_from_slice(&hidden[row * d..][..d]);
            }
            let mut logits = self.weight.forward(OP, &x, sizes)?;
            let losses: Vec<f64> = logits
                .par_chunks_mut(vocabulary)
                .zip(chunk)
                .map(|(logits, (_, token))| loss_and_gradient(logits, *token as usize))
                .collect();
            sums.loss += losses.iter().sum::<f64>();
            if let Some(d_hidden) = &mut sums.d_hidden {
                let dx = self.weight.backward_x(OP, &logits, sizes)?;
                for ((row, _), dx) in chunk.iter().zip(dx.chunks_exact(d)) {
                    d_hidden[row * d..][..d].copy_from_slice(dx);
                }
            }
            if let Some(d_weight) = &mut sums.d_weight {
                let d_logits = Mat::new(&logits, chunk.len(), vocabulary);
                gemm(
                    d_weight,
                    d,
                    1.0,
                    1.0,
                    d_logits.t(),
                    Mat::new(&x, chunk.len(), d),
                    Threads::All,
                );
            }
        }
        Ok(sums)
    }

    fn run<T: Real>(&self, hidden: &[T], hidden_dims: &[usize]) -> Result<(CpuStorage, Shape)> {
        let sizes = self.weight.sizes(hidden_dims)?;
        for (row, token) in &self.targets.rows {
            if *row >= sizes.0 || *token as usize >= sizes.2 {
                candle_core::bail!("{OP}: row {row} of {}, token {token} of {}", sizes.0, sizes.2);
            }
        }
        let sums = self.compute(hidden, sizes)?;
        if let Some(d_hidden) = sums.d_hidden {
            let kept = Kept {
                d_hidden: tensor(d_hidden, hidden_dims)?,
                d_weight: sums
                    .d_weight
                    .map(|dw| tensor(dw, &[sizes.2, sizes.1]))
                    .transpose()?,
            };
            *self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(kept);
        }
        Ok((T::to_cpu_storage_owned(vec![T::of(sums.loss)]), Shape::from(())))
    }

    fn scaled(&self, grad: &Tensor) -> Result<Kept> {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .take();
        let Some(kept) = kept else {
            candle_core::bail!("{OP}: backward twice, or before forward")
        };
        let grad = grad.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
        let scale = |t: Tensor| if grad == 1.0 { Ok(t) } else { t.affine(grad, 0.0) };
        Ok(Kept {
            d_hidden: scale(kept.d_hidden)?,
            d_weight: kept.d_weight.map(scale).transpose()?,
        })
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        for_real!(dtype(hidden), OP, T => self.run::<T>(elements(hidden, layout, OP)?, layout.dims()))
    }

    fn bwd(&self, _hidden: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.scaled(grad)?.d_hidden))
    }
}

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        layout: &Layout,
        _weight: &CpuStorage,
        _weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        for_real!(dtype(hidden), OP, T => self.run::<T>(elements(hidden, layout, OP)?, layout.dims()))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        _weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let kept = self.scaled(grad)?;
        Ok((hidden.track_op().then_some(kept.d_hidden), kept.d_weight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::{check, random};

    fn targets(chunk: usize) -> Targets {
        Targets {
            rows: vec![(0, 3), (2, 0), (3, 6), (5, 3)],
            chunk,
        }
    }

    #[test]
    fn gradients_are_the_differences_whatever_the_chunk() {
        let (hidden, weight) = (random(&[6, 4], 16), random(&[7, 4], 17));
        for chunk in [1, 3, 4, 100] {
            let scaled = |loss: Tensor| loss.affine(0.25, 0.0);
            check(&[&hidden, &weight], |args| {
                cross_entropy(&args[0], &args[1], targets(chunk)).and_then(scaled)
            });
            let frozen = Frozen::Dense(weight.as_detached_tensor());
            check(&[&hidden], |args| {
                frozen_cross_entropy(&args[0], &frozen, targets(chunk))
            });
        }
    }

    #[test]
    fn without_a_target_the_loss_is_zero() {
        let (hidden, weight) = (random(&[2, 4], 16), random(&[7, 4], 17));
        let loss = cross_entropy(
            &hidden,
            weight.as_tensor(),
            Targets {
                rows: vec![],
                chunk: 8,
            },
        )
        .unwrap();
        assert_eq!(loss.to_scalar::<f64>().unwrap(), 0.0);
        let grads = loss.backward().unwrap();
        let largest = grads.get(&hidden).unwrap().abs().unwrap().max_all().unwrap();
        assert_eq!(largest.to_scalar::<f64>().unwrap(), 0.0);
    }
}
