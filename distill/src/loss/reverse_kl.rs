//! Reverse KL, Σ Q(log Q − log P).

use candle_core::{Result, Tensor};

use super::{Category, Divergence, composed_kl};
use crate::model::ops::Real;

#[derive(Clone, Copy)]
pub(super) struct ReverseKl;

impl Divergence for ReverseKl {
    /// The gradient by logits is Q((log Q − log P) − KL).
    #[inline(always)]
    fn part<T: Real>(self, Category { log_p, log_q, p, q }: Category<T>) -> [T; 2] {
        let product = q * (log_q - log_p);
        [product + (p - q), product]
    }

    fn composed(self, log_p: &Tensor, log_q: &Tensor) -> Result<Tensor> {
        composed_kl(log_q, log_p)
    }
}
