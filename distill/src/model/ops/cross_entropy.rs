//! Cross-entropy: the loss of the labels, over an output layer that is trained, frozen, or frozen under an adapter.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::frozen::Frozen;
use super::head_loss::{Criterion, Targets, frozen_head_loss, head_loss};
use super::lora_head_loss::{HeadAdapter, lora_head_loss};
use super::real::Real;

/// The **sum** over the targets of −log softmax(hidden·Wᵀ)\[token\], a scalar. hidden `[rows, d]`,
/// weight `[vocabulary, d]`, which gets a gradient too.
pub fn cross_entropy(hidden: &Tensor, weight: &Tensor, targets: Targets) -> Result<Tensor> {
    head_loss(hidden, weight, targets)
}

/// The same with a weight that gets no gradient.
pub fn frozen_cross_entropy(hidden: &Tensor, weight: &Frozen, targets: Targets) -> Result<Tensor> {
    frozen_head_loss(hidden, weight, targets)
}

/// The same under an adapter, whose tensors get gradients.
pub fn lora_cross_entropy(
    hidden: &Tensor,
    weight: &Frozen,
    adapter: HeadAdapter<'_>,
    targets: Targets,
) -> Result<Tensor> {
    lora_head_loss(hidden, weight, adapter, targets)
}

impl Criterion for Targets {
    const NAME: &'static str = "cross_entropy";

    fn targets(&self) -> &Targets {
        self
    }

    fn compute<T: Real>(&self, first: usize, logits: &mut [T], vocabulary: usize) -> Result<f64> {
        let losses: Vec<f64> = logits
            .par_chunks_mut(vocabulary)
            .zip(&self.rows[first..])
            .map(|(logits, (_, token))| loss_and_gradient(logits, *token as usize))
            .collect();
        Ok(losses.iter().sum())
    }

    fn compute_there(
        &self,
        first: usize,
        logits: &Tensor,
        with_gradient: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (count, _) = logits.dims2()?;
        let tokens = self.labels(first, count, logits.device())?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
        let exp = shifted.exp()?;
        let sum = exp.sum_keepdim(1)?;
        let loss = (sum.log()? - shifted.gather(&tokens, 1)?)?.sum_all()?;
        let gradient = || -> Result<Tensor> {
            let minus_one = Tensor::full(-1f32, tokens.shape(), logits.device())?.to_dtype(exp.dtype())?;
            exp.broadcast_div(&sum)?.scatter_add(&tokens, &minus_one, 1)
        };
        Ok((loss, with_gradient.then(gradient).transpose()?))
    }
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
