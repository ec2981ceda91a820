//! Total variation, ½ Σ|P − Q|.

use super::{Category, Divergence};
use crate::model::ops::Real;

#[derive(Clone, Copy)]
pub(super) struct TotalVariation;

impl Divergence for TotalVariation {
    /// The derivative by log Q is ½ Q·sign(Q − P), and 0 where both are the same.
    #[inline(always)]
    fn part<T: Real>(self, Category { p, q, .. }: Category<T>) -> [T; 2] {
        let half = T::of(0.5);
        let difference = if q > p { q - p } else { p - q };
        let signed = if q > p {
            q
        } else if p > q {
            T::zero() - q
        } else {
            T::zero()
        };
        [half * difference, half * signed]
    }
}
