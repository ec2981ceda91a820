//! The generalised Jensen-Shannon divergence, β·KL(P‖M) + (1−β)·KL(Q‖M), with M = βP + (1−β)Q and 0 < β < 1.
//!
//! DistiLLM's `js_distance(lam)` is the same with λ = 1 − β. The value goes to zero at both ends: the ends themselves
//! are the full forward and reverse KL by convention, or the divergence is rescaled.

use candle_core::{Result, Tensor};

use super::{Category, Divergence, composed_kl};
use crate::model::ops::Real;

#[derive(Clone, Copy)]
pub(super) struct Jsd {
    beta: f64,
    scale: f64,
}

impl Jsd {
    pub(super) fn new(beta: f64, rescaled: bool) -> Self {
        let scale = if rescaled {
            1.0 / (beta * (1.0 - beta))
        } else {
            1.0
        };
        Self { beta, scale }
    }
}

impl Divergence for Jsd {
    /// The gradient by logits is (1−β)·Q((log Q − log M) − KL(Q‖M)).
    #[inline(always)]
    fn part<T: Real>(self, Category { log_p, log_q, p, q }: Category<T>) -> [T; 2] {
        let log_m = log_mixture(T::of(self.beta), log_p, log_q);
        let of_q = T::of((1.0 - self.beta) * self.scale) * q * (log_q - log_m);
        let of_p = T::of(self.beta * self.scale) * p * (log_p - log_m);
        [of_p + of_q, of_q]
    }

    fn composed(self, log_p: &Tensor, log_q: &Tensor) -> Result<Tensor> {
        let log_m = composed_log_mixture(self.beta, log_p, log_q)?;
        let (of_p, of_q) = (composed_kl(log_p, &log_m)?, composed_kl(log_q, &log_m)?);
        (of_p * (self.beta * self.scale))? + (of_q * ((1.0 - self.beta) * self.scale))?
    }
}

/// log(share · P + (1 − share) · Q), exactly log P where both are the same.
#[inline(always)]
pub(super) fn log_mixture<T: Real>(share: T, log_p: T, log_q: T) -> T {
    // The larger is taken out, so that nothing overflows; share + (1 − share) is 1, to the bit.
    let p_is_larger = log_p > log_q;
    let (larger, other) = if p_is_larger {
        (log_p, log_q)
    } else {
        (log_q, log_p)
    };
    let of_q = T::one() - share;
    let (of_larger, of_other) = if p_is_larger { (share, of_q) } else { (of_q, share) };
    larger + (of_larger + of_other * (other - larger).exp()).ln()
}

/// The same of tensors.
pub(super) fn composed_log_mixture(share: f64, log_p: &Tensor, log_q: &Tensor) -> Result<Tensor> {
    let larger = log_p.maximum(log_q)?.detach();
    let part = |log: &Tensor, share: f64| (log - &larger)?.exp()?.affine(share, 0.0);
    (part(log_p, share)? + part(log_q, 1.0 - share)?)?.log()? + larger
}
