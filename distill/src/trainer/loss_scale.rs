//! Loss scaling for fp16 (<https://arxiv.org/abs/1710.03740>): the loss is multiplied before the backward pass, so that
//! small gradients do not become zero, and the gradients are divided again in f32. As in torch's `GradScaler` the factor
//! halves when a gradient overflows, and doubles after 2000 steps in which none did. A step that overflows is done again
//! and not left out.

use serde::{Deserialize, Serialize};

/// torch's `growth_interval`.
const STEADY_STEPS: u32 = 2000;
/// What the factor starts from. torch starts from 2¹⁶ with the mean of the loss; here it is the sum over a step's tokens.
const START: f64 = 1024.0;

/// The factor of the loss: a power of two, so that only the exponents of numbers change.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    factor: f64,
    /// Steps since it last changed.
    steps: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self {
            factor: START,
            steps: 0,
        }
    }
}

impl LossScale {
    /// What the loss is multiplied by.
    pub(super) fn factor(self) -> f64 {
        self.factor
    }

    /// A gradient overflowed. False when the factor is no reason for it.
    pub(super) fn lower(&mut self) -> bool {
        let lower = Self {
            factor: self.factor / 2.0,
            steps: 0,
        };
        // Below 2⁻²⁴ nothing is left of fp16's numbers.
        let is_reason = lower.factor >= 2f64.powi(-24);
        if is_reason {
            *self = lower;
        }
        is_reason
    }

    /// A step went well.
    pub(super) fn advance(&mut self) {
        self.steps += 1;
        if self.steps == STEADY_STEPS {
            *self = Self {
                factor: (self.factor * 2.0).min(2f64.powi(24)),
                steps: 0,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_halves_at_once_and_doubles_after_two_thousand_steps() {
        let mut scale = LossScale::default();
        assert!(scale.lower() && scale.lower());
        assert_eq!(scale.factor(), 256.0);
        for _ in 0..1999 {
            scale.advance();
        }
        assert_eq!(scale.factor(), 256.0);
        scale.advance();
        assert_eq!(scale.factor(), 512.0);
        for _ in 0..1999 {
            scale.advance();
        }
        scale.lower();
        scale.advance();
        assert_eq!(scale.factor(), 256.0, "an overflow begins the count anew");
        let halvings = std::iter::repeat_with(|| scale.lower())
            .take_while(|lower| *lower)
            .count();
        assert_eq!((halvings, scale.factor()), (32, 2f64.powi(-24)));
    }
}
