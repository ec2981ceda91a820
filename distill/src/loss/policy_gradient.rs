//! Reverse KL of sampled tokens as a policy gradient: −Σ ratio · A, with the reward r = log P(y) − log Q_old(y), the
//! advantage A_t = Σ_{s≥t} γ^{s−t} r_s and the importance ratio Q(y) / Q_old(y)
//! (tinker-cookbook, distillation/train_on_policy.py; <https://thinkingmachines.ai/blog/on-policy-distillation>).
//!
//! Its gradient is that of the reverse KL on average over tokens that Q samples. Neither A nor Q_old has a gradient.

use super::log_softmax;
use crate::model::ops::Real;

/// What is known of the sampled tokens before the student's logits are.
pub(crate) struct Sampled {
    /// log P(y), by target.
    pub(crate) log_p: Vec<f64>,
    /// log Q_old(y), by target.
    old: Option<Vec<f64>>,
    /// A, by target, where the old probabilities are known.
    advantages: Vec<f64>,
}

impl Sampled {
    /// Of targets that belong to these sequences, in order. Without `old` the student is the one that sampled.
    pub(crate) fn new(log_p: Vec<f64>, old: Option<Vec<f64>>, sequences: &[usize], discount: f64) -> Self {
        let rewards = old.iter().flatten().zip(&log_p).map(|(old, log_p)| log_p - old);
        let mut advantages: Vec<f64> = rewards.collect();
        for at in (1..advantages.len()).rev() {
            if sequences[at] == sequences[at - 1] {
                advantages[at - 1] += discount * advantages[at];
            }
        }
        Self {
            log_p,
            old,
            advantages,
        }
    }

    /// One target: the loss and log Q(y), and in place of the logits the gradient by logits whose softmax is Q.
    pub(crate) fn compute<T: Real>(
        &self,
        target: usize,
        token: usize,
        logits: &mut [T],
        scale: f64,
    ) -> [f64; 2] {
        log_softmax(logits, scale);
        let log_q = logits[token].to_f64();
        let weight = match &self.old {
            Some(old) => (log_q - old[target]).exp() * self.advantages[target],
            None => self.log_p[target] - log_q,
        };
        let by_q = T::of(weight);
        for x in logits.iter_mut() {
            *x = x.exp() * by_q;
        }
        logits[token] -= by_q;
        [-weight, log_q]
    }
}
