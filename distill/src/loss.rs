//! Distillation losses: how far a student's next token is from its teacher's, with the gradient by the student's
//! logits. A loss is a file; the formulas have the same names everywhere:
//!
//! P is the teacher, Q the student, M a mixture of both; sums run over the vocabulary, or over the teacher's k most
//! probable tokens and one more category for all others, the tail.

mod categories;
mod forward_kl;
mod jsd;
mod policy_gradient;
mod reverse_kl;
mod skew;
mod total_variation;

use candle_core::{Result as CandleResult, Tensor};
pub(crate) use categories::{Category, Divergence, composed_kl, composed_log_softmax, log_softmax, sum};
pub(crate) use policy_gradient::Sampled;

use crate::model::ops::Real;
use crate::teacher::Scores;

/// A distillation loss, a sum over tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// KL(P‖Q): the student covers all that the teacher does.
    ForwardKl,
    /// KL(Q‖P): the student keeps to what the teacher finds probable.
    ReverseKl,
    /// The generalised Jensen-Shannon divergence, β·KL(P‖M) + (1−β)·KL(Q‖M) with M = βP + (1−β)Q
    /// (<https://arxiv.org/abs/2306.13649>, eq. 1).
    Jsd {
        /// β; 0 is [`ForwardKl`](Self::ForwardKl) and 1 is [`ReverseKl`](Self::ReverseKl), as in TRL.
        beta: f64,
        /// Divided by β(1−β), which goes over into both ends without a jump.
        rescaled: bool,
    },
    /// KL(P‖αP + (1−α)Q) (DistiLLM, <https://arxiv.org/abs/2402.03898>, eq. 4).
    SkewForwardKl {
        /// α, the share of the teacher.
        alpha: f64,
    },
    /// KL(Q‖(1−α)P + αQ) (DistiLLM, eq. 5).
    SkewReverseKl {
        /// α, the share of the student.
        alpha: f64,
    },
    /// ½ Σ|P − Q|. 1 less it is the chance that a draft's token is accepted.
    TotalVariation,
    /// Reverse KL of the sampled tokens as a policy gradient.
    PolicyGradient {
        /// What a token's reward counts at the token before it; 0 counts it at its own only.
        discount: f64,
    },
}

/// What a student is trained for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// The distillation loss.
    pub loss: Loss,
    /// What the logits of both are divided by.
    pub temperature: f64,
    /// Whether the loss is multiplied by the square of the temperature, so that gradients stay as long as at 1.
    pub t_squared: bool,
    /// Of a teacher that tells all logits, its most probable tokens and their tail only.
    pub top_k: Option<usize>,
    /// The weight of the labels' cross-entropy, which is added, at temperature 1.
    pub ce_weight: f64,
    /// Rows of logits that exist at a time.
    pub chunk: usize,
}

/// What a teacher said about a batch, and what is known of how its answers were sampled.
pub struct Taught {
    /// A row for each of the batch's targets.
    pub scores: Scores,
    /// log Q of each target when it was sampled, at the loss's temperature: [`Loss::PolicyGradient`] needs it where
    /// the student has moved since.
    pub old: Option<Vec<f32>>,
}

impl From<Scores> for Taught {
    fn from(scores: Scores) -> Self {
        Self { scores, old: None }
    }
}

/// Sums over the targets.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Measures {
    /// The distillation loss.
    pub loss: f64,
    /// −log Q of the labels at temperature 1, where it is mixed in.
    pub cross_entropy: Option<f64>,
    /// log Q − log P of the labels, which over sampled answers estimates the reverse KL; where the teacher tells it of
    /// every label.
    pub sampled_kl: Option<f64>,
}

/// What is wrong with an objective.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LossError {
    /// A number that a loss cannot be computed with.
    #[error("{name} is {value}; it must be {range}")]
    Range {
        /// The option.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it can be.
        range: &'static str,
    },
    /// The teacher tells less than the loss is made of.
    #[error("{loss} cannot be computed from {scores}\nhint: {hint}")]
    Scores {
        /// The loss.
        loss: &'static str,
        /// What the teacher tells.
        scores: &'static str,
        /// What can be done.
        hint: &'static str,
    },
    /// Another temperature than 1 with probabilities that are known at 1 only.
    #[error(
        "temperature {temperature} needs all logits of the teacher; of this one {scores} are known, at temperature 1\nhint: use temperature 1, or a checkpoint or a GGUF file as teacher"
    )]
    Temperature {
        /// The temperature.
        temperature: f64,
        /// What the teacher tells.
        scores: &'static str,
    },
    /// A reward is to count at the tokens before it, but the sampled tokens' probabilities are not known.
    #[error(
        "a discount needs the sampled tokens' log-probabilities\nhint: they are known of the student's own answers; or set the discount to 0"
    )]
    Discount,
}

impl Scores {
    /// What it is, in words.
    fn named(&self) -> &'static str {
        match self {
            Self::Full(_) => "all logits",
            Self::Top(_) => "the most probable tokens",
            Self::Label(_) => "the probabilities of the labels",
        }
    }
}

/// Runs `$body` with `$loss` standing for the divergence that a loss is, or `$none` where it is none.
macro_rules! with_divergence {
    ($which:expr, $loss:ident => $body:expr, $none:expr) => {{
        macro_rules! with {
            ($divergence:expr) => {{
                let $loss = $divergence;
                $body
            }};
        }
        match $which {
            Loss::ForwardKl | Loss::Jsd { beta: 0.0, .. } | Loss::SkewForwardKl { alpha: 0.0 } => {
                with!(forward_kl::ForwardKl)
            }
            Loss::ReverseKl | Loss::Jsd { beta: 1.0, .. } | Loss::SkewReverseKl { alpha: 0.0 } => {
                with!(reverse_kl::ReverseKl)
            }
            Loss::Jsd { beta, rescaled } => with!(jsd::Jsd::new(beta, rescaled)),
            Loss::SkewForwardKl { alpha } => with!(skew::SkewForwardKl(alpha)),
            Loss::SkewReverseKl { alpha } => with!(skew::SkewReverseKl(alpha)),
            Loss::TotalVariation => with!(total_variation::TotalVariation),
            Loss::PolicyGradient { .. } => $none,
        }
    }};
}

impl Loss {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::ForwardKl => "forward KL",
            Self::ReverseKl => "reverse KL",
            Self::Jsd { .. } => "JSD",
            Self::SkewForwardKl { .. } => "skew forward KL",
            Self::SkewReverseKl { .. } => "skew reverse KL",
            Self::TotalVariation => "total variation",
            Self::PolicyGradient { .. } => "policy gradient",
        }
    }

    /// The loss between log-probabilities of the same categories, and in place of `log_q` the gradient by logits whose
    /// softmax is Q. What is left in `log_p` means nothing. A policy gradient is none between probabilities: zero.
    pub(crate) fn of_log_probabilities<T: Real>(self, log_p: &mut [T], log_q: &mut [T]) -> f64 {
        let none = |log_q: &mut [T]| {
            log_q.fill(T::zero());
            0.0
        };
        with_divergence!(self, loss => loss.compute(log_p, log_q), none(log_q))
    }

    /// The same of tensors, `[rows, tokens]`, by candle's differentiable operations: a scalar.
    pub(crate) fn composed(self, log_p: &Tensor, log_q: &Tensor) -> CandleResult<Tensor> {
        with_divergence!(self, loss => loss.composed(log_p, log_q), Tensor::zeros((), log_q.dtype(), log_q.device()))
    }
}

impl Objective {
    /// Refuses numbers that no loss can be computed with.
    pub fn check(&self) -> Result<(), LossError> {
        let refuse = |name, value, range| Err(LossError::Range { name, value, range });
        let within = |value: f64| (0.0..=1.0).contains(&value);
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return refuse("temperature", self.temperature, "greater than 0");
        }
        match self.loss {
            Loss::Jsd { beta, .. } if !within(beta) => return refuse("beta", beta, "from 0 to 1"),
            // At 1 the mixture is what it is compared with, and the loss always zero.
            Loss::SkewForwardKl { alpha } | Loss::SkewReverseKl { alpha }
                if !within(alpha) || alpha == 1.0 =>
            {
                return refuse("alpha", alpha, "from 0 to less than 1");
            }
            Loss::PolicyGradient { discount } if !within(discount) => {
                return refuse("discount", discount, "from 0 to 1");
            }
            _ => {}
        }
        if !(self.ce_weight.is_finite() && self.ce_weight >= 0.0) {
            return refuse("ce_weight", self.ce_weight, "0 or more");
        }
        if self.top_k == Some(0) {
            return refuse("top_k", 0.0, "1 or more");
        }
        if self.chunk == 0 {
            return refuse("chunk", 0.0, "1 or more");
        }
        Ok(())
    }

    /// Refuses scores that say less than the loss is made of.
    pub fn accepts(&self, scores: &Scores) -> Result<(), LossError> {
        let refuse = |hint| {
            Err(LossError::Scores {
                loss: self.loss.name(),
                scores: scores.named(),
                hint,
            })
        };
        match (self.loss, scores) {
            (Loss::PolicyGradient { .. }, Scores::Top(_)) => {
                return refuse("a sampled token may be none of them; ask for the labels' probabilities");
            }
            (Loss::PolicyGradient { .. }, _) | (_, Scores::Full(_) | Scores::Top(_)) => {}
            (_, Scores::Label(_)) => {
                return refuse("policy gradient can; or ask for the most probable tokens");
            }
        }
        if self.temperature != 1.0 && !matches!(scores, Scores::Full(_)) {
            return Err(LossError::Temperature {
                temperature: self.temperature,
                scores: scores.named(),
            });
        }
        Ok(())
    }

    /// What the distillation loss is multiplied by.
    pub(crate) fn scale(&self) -> f64 {
        match self.t_squared {
            true => self.temperature * self.temperature,
            false => 1.0,
        }
    }
}
