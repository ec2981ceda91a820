//! Total variation, ½ Σ|P − Q|.

use candle_core::{Result, Tensor};

use super::{Category, Divergence};
use crate::model::ops::Real;
use crate::model::ops::sum_of_rows;

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

    fn composed(self, log_p: &Tensor, log_q: &Tensor) -> Result<Tensor> {
        sum_of_rows(&(log_p.exp()? - log_q.exp()?)?.abs()?)? * 0.5
    }
}
