//! Forward KL, Σ P(log P − log Q).

use candle_core::{Result, Tensor};

use super::{Category, Divergence, composed_kl};
use crate::model::ops::Real;

#[derive(Clone, Copy)]
pub(super) struct ForwardKl;

impl Divergence for ForwardKl {
    /// The gradient by logits is Q − P.
    #[inline(always)]
    fn part<T: Real>(self, Category { log_p, log_q, p, q }: Category<T>) -> [T; 2] {
        [p * (log_p - log_q) + (q - p), q - p]
    }

    fn composed(self, log_p: &Tensor, log_q: &Tensor) -> Result<Tensor> {
        composed_kl(log_p, log_q)
    }
}
