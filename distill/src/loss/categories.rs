//! What all losses between two distributions share: a sum over categories, and its gradient by logits.

use candle_core::{D, Result, Tensor};

use crate::model::ops::{Real, sum_of_rows};

/// So many numbers are added in their own type before they are in f64: 50,000 small f32 add up without a loss, in the
/// same order whatever the threads.
const PART: usize = 256;

/// One category, of a token or of several.
#[derive(Clone, Copy)]
pub(crate) struct Category<T> {
    pub(crate) log_p: T,
    pub(crate) log_q: T,
    pub(crate) p: T,
    pub(crate) q: T,
}

/// A loss between distributions: a sum over categories.
pub(crate) trait Divergence: Copy {
    /// A category's part of the loss, and its derivative by log q, up to a multiple of q that is the same for all
    /// categories: it falls out of the gradient. Chosen so that it is zero where p = q, to the bit.
    ///
    /// Differences such as Σq − Σp, which are zero, may be part of the loss: they keep every part positive, and take
    /// away the rounding of the logarithms.
    fn part<T: Real>(self, at: Category<T>) -> [T; 2];

    /// The loss as an expression of candle's differentiable operations, for devices: log P and log Q, `[rows, tokens]` →
    /// a scalar.
    fn composed(self, log_p: &Tensor, log_q: &Tensor) -> Result<Tensor>;

    /// The loss. In place of `log_q` is left the gradient by logits whose softmax is Q.
    fn compute<T: Real>(self, log_p: &mut [T], log_q: &mut [T]) -> f64 {
        let (mut loss, mut sum) = (0.0, 0.0);
        for (log_p, log_q) in log_p.chunks_mut(PART).zip(log_q.chunks_mut(PART)) {
            let (mut part_of_loss, mut part_of_sum) = (T::zero(), T::zero());
            for (log_p, log_q) in log_p.iter_mut().zip(log_q) {
                let (p, q) = (log_p.exp(), log_q.exp());
                let at = Category {
                    log_p: *log_p,
                    log_q: *log_q,
                    p,
                    q,
                };
                let [value, slope] = self.part(at);
                part_of_loss += value;
                part_of_sum += slope;
                (*log_p, *log_q) = (q, slope);
            }
            loss += part_of_loss.to_f64();
            sum += part_of_sum.to_f64();
        }
        // ∂log q_j / ∂z_i = [i = j] − q_i.
        let sum = T::of(sum);
        for (q, slope) in log_p.iter().zip(log_q) {
            *slope -= *q * sum;
        }
        loss
    }
}

/// Σ A(log A − log B), of tensors.
pub(crate) fn composed_kl(log_a: &Tensor, log_b: &Tensor) -> Result<Tensor> {
    sum_of_rows(&(log_a.exp()? * (log_a - log_b)?)?)
}

/// log softmax(x · scale) of every row, of tensors.
pub(crate) fn composed_log_softmax(x: &Tensor, scale: f64) -> Result<Tensor> {
    let shifted = x
        .broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?
        .affine(scale, 0.0)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    shifted.broadcast_sub(&log_sum)
}

/// log softmax(x · scale), in place.
pub(crate) fn log_softmax<T: Real>(x: &mut [T], scale: f64) {
    let max = x
        .iter()
        .fold(T::of(f64::NEG_INFINITY), |max, x| if *x > max { *x } else { max });
    let scale = T::of(scale);
    let mut sum = 0.0;
    for part in x.chunks_mut(PART) {
        let mut small = T::zero();
        for x in part {
            *x = (*x - max) * scale;
            small += x.exp();
        }
        sum += small.to_f64();
    }
    let log_sum = T::of(sum.ln());
    for x in x {
        *x -= log_sum;
    }
}

/// Σx.
pub(crate) fn sum<T: Real>(x: &[T]) -> f64 {
    let parts = x.chunks(PART).map(|part| {
        let mut small = T::zero();
        part.iter().for_each(|x| small += *x);
        small.to_f64()
    });
    parts.sum()
}
