//! What a student is worth as a draft model of its teacher, by speculative decoding's own arithmetic
//! (<https://arxiv.org/abs/2211.17192>).

use serde::Serialize;

/// Drafts longer than this are not looked at.
const LONGEST: usize = 16;

/// The best draft length and what it is expected to give.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Draft {
    /// α, the chance that a drafted token is accepted: 1 − TV(teacher, student), averaged over the tokens
    /// (Definition 3.1 and Theorem 3.5).
    pub acceptance_rate: f64,
    /// The time of one token of the draft in those of one of the target.
    pub cost: f64,
    /// γ, the tokens to draft at a time; 0 where drafting does not pay.
    pub draft_tokens: usize,
    /// Tokens for each run of the target, (1 − α^(γ+1)) / (1 − α) (equation 1).
    pub tokens_per_run: f64,
    /// How many times as fast the target becomes: tokens a run / (γ·cost + 1) (Theorem 3.8). It takes it that the target
    /// checks γ + 1 tokens in the time of one.
    pub speed_up: f64,
}

impl Draft {
    /// The best draft length for this acceptance rate and cost.
    pub fn best(acceptance_rate: f64, cost: f64) -> Self {
        let with = |draft_tokens: usize| {
            // The sum of the geometric series, which is there at α = 1 too.
            let tokens_per_run = (0..=draft_tokens)
                .map(|i| acceptance_rate.powi(i as i32))
                .sum::<f64>();
            Self {
                acceptance_rate,
                cost,
                draft_tokens,
                tokens_per_run,
                speed_up: tokens_per_run / (draft_tokens as f64 * cost + 1.0),
            }
        };
        let lengths = (1..=LONGEST).map(with);
        lengths.fold(
            with(0),
            |best, next| if next.speed_up > best.speed_up { next } else { best },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_figures() {
        // Table 1 of the paper: c = 0 leaves the tokens of a run; γ = 2, α = 0.6 gives 1.96 and γ = 5, α = 0.8 gives 3.69.
        let free = |alpha: f64, gamma: i32| (1.0 - alpha.powi(gamma + 1)) / (1.0 - alpha);
        assert!((free(0.6, 2) - 1.96).abs() < 1e-9 && (free(0.8, 5) - 3.69).abs() < 5e-3);
        let draft = Draft::best(0.8, 0.02);
        assert!((draft.tokens_per_run - free(0.8, draft.draft_tokens as i32)).abs() < 1e-12);
        for gamma in 1..=LONGEST as i32 {
            assert!(draft.speed_up >= free(0.8, gamma) / (f64::from(gamma) * 0.02 + 1.0) - 1e-12);
        }
    }

    #[test]
    fn a_draft_that_is_as_slow_as_its_target_does_not_pay() {
        let draft = Draft::best(0.5, 1.0);
        assert_eq!((draft.draft_tokens, draft.speed_up), (0, 1.0));
        assert_eq!(Draft::best(1.0, 0.1).draft_tokens, LONGEST);
        assert_eq!(Draft::best(0.0, 0.1).speed_up, 1.0);
    }
}
