//! Reverse KL, Σ Q(log Q − log P).

use super::{Category, Divergence};
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
}
