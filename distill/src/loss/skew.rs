//! DistiLLM's skew divergences, <https://arxiv.org/abs/2402.03898>: KL to a mixture, whose gradient is bounded where
//! one of both finds a token impossible. The paper's code leaves −H(P) out of the forward one: its values are other
//! ones, its gradients the same.

use candle_core::{Result, Tensor};

use super::jsd::{composed_log_mixture, log_mixture};
use super::{Category, Divergence, composed_kl};
use crate::model::ops::Real;

/// KL(P‖M), M = αP + (1−α)Q.
#[derive(Clone, Copy)]
pub(super) struct SkewForwardKl(pub(super) f64);

/// KL(Q‖M), M = (1−α)P + αQ.
#[derive(Clone, Copy)]
pub(super) struct SkewReverseKl(pub(super) f64);

impl Divergence for SkewForwardKl {
    #[inline(always)]
    fn part<T: Real>(self, Category { log_p, log_q, p, q }: Category<T>) -> [T; 2] {
        let student = T::of(1.0 - self.0);
        let log_m = log_mixture(T::of(self.0), log_p, log_q);
        // −(1−α)·PQ/M, with (1−α)·Q added; M − P = (1−α)(Q − P).
        let slope = student * student * (q - p) * (log_q - log_m).exp();
        [p * (log_p - log_m) + student * (q - p), slope]
    }

    fn composed(self, log_p: &Tensor, log_q: &Tensor) -> Result<Tensor> {
        composed_kl(log_p, &composed_log_mixture(self.0, log_p, log_q)?)
    }
}

impl Divergence for SkewReverseKl {
    #[inline(always)]
    fn part<T: Real>(self, Category { log_p, log_q, p, q }: Category<T>) -> [T; 2] {
        let teacher = T::of(1.0 - self.0);
        let log_m = log_mixture(teacher, log_p, log_q);
        let product = q * (log_q - log_m);
        // Q(log Q − log M) − α·Q²/M, with α·Q added; M − Q = (1−α)(P − Q).
        let slope = product + T::of(self.0) * teacher * (p - q) * (log_q - log_m).exp();
        [product + teacher * (p - q), slope]
    }

    fn composed(self, log_p: &Tensor, log_q: &Tensor) -> Result<Tensor> {
        composed_kl(log_q, &composed_log_mixture(1.0 - self.0, log_p, log_q)?)
    }
}
