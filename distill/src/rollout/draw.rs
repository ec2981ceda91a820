//! One token out of logits: the most probable one, or a drawn one.

use rayon::prelude::*;

use crate::random::Random;

/// How tokens are drawn, in the order of transformers' generation: temperature, then `top_k`, then `top_p`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Logits are divided by it; 0 takes the most probable token.
    pub temperature: f64,
    /// Only so many tokens, the most probable ones; 0 for all.
    pub top_k: usize,
    /// Only the most probable tokens that together have at least this probability; 1 for all.
    pub top_p: f64,
}

impl Draw {
    /// The most probable token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
    };

    /// A token of each row of logits with the natural logarithm of its probability. Row i is that of answer `answers[i]`,
    /// which draws from its own of `streams`.
    pub(super) fn tokens(
        &self,
        logits: &[f32],
        vocab_size: usize,
        answers: &[usize],
        streams: &mut [Random],
    ) -> Vec<(u32, f32)> {
        let chances: Vec<f64> = answers.iter().map(|answer| streams[*answer].uniform()).collect();
        logits
            .par_chunks_exact(vocab_size)
            .zip(chances)
            .map(|(logits, chance)| self.token(logits, chance))
            .collect()
    }

    /// The token that a number from [0, 1) stands for.
    fn token(&self, logits: &[f32], chance: f64) -> (u32, f32) {
        let best = largest(logits);
        let temperature = if self.temperature > 0.0 {
            self.temperature
        } else {
            1.0
        };
        let top = f64::from(logits[best]);
        let weight = |logit: &f32| ((f64::from(*logit) - top) / temperature).exp();
        let weights: Vec<f64> = logits.iter().map(weight).collect();
        let sum: f64 = weights.iter().sum();
        let token = match self.temperature > 0.0 {
            false => best,
            true if self.takes_all() => at(weights.iter().copied().enumerate(), sum * chance).unwrap_or(best),
            true => {
                let kept = self.kept(&weights, sum);
                let sum: f64 = kept.iter().map(|i| weights[*i]).sum();
                at(kept.into_iter().map(|i| (i, weights[i])), sum * chance).unwrap_or(best)
            }
        };
        let logprob = (f64::from(logits[token]) - top) / temperature - sum.ln();
        (token as u32, logprob as f32)
    }

    fn takes_all(&self) -> bool {
        self.top_k == 0 && self.top_p >= 1.0
    }

    /// The tokens that are not ruled out, the most probable first.
    fn kept(&self, weights: &[f64], sum: f64) -> Vec<usize> {
        // All tokens below this together have less than 1 − top_p: none of them is among those that have top_p. With
        // top_k a part of them is the whole, which needs all.
        let floor = match self.top_k {
            0 => (1.0 - self.top_p) * sum / weights.len() as f64,
            _ => 0.0,
        };
        let mut order: Vec<usize> = (0..weights.len()).filter(|i| weights[*i] >= floor).collect();
        let by_weight = |a: &usize, b: &usize| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b));
        if self.top_k > 0 && self.top_k < order.len() {
            order.select_nth_unstable_by(self.top_k - 1, by_weight);
            order.truncate(self.top_k);
        }
        order.sort_unstable_by(by_weight);
        if self.top_p < 1.0 {
            let whole = match self.top_k {
                0 => sum,
                _ => order.iter().map(|i| weights[*i]).sum(),
            };
            let mut before = 0.0;
            let enough = order.iter().take_while(|i| {
                let takes = before < self.top_p * whole;
                before += weights[**i];
                takes
            });
            let count = enough.count();
            order.truncate(count.max(1));
        }
        order
    }
}

/// The item at which a running sum of weights passes `target`; the last one that weighs something where rounding keeps
/// it from getting there.
fn at(items: impl Iterator<Item = (usize, f64)>, target: f64) -> Option<usize> {
    let (mut sum, mut last) = (0.0, None);
    for (item, weight) in items.filter(|(_, weight)| *weight > 0.0) {
        sum += weight;
        last = Some(item);
        if sum > target {
            break;
        }
    }
    last
}

/// The place of the largest number, the first one of equals.
fn largest(logits: &[f32]) -> usize {
    let start = (0, f32::NEG_INFINITY);
    logits
        .iter()
        .enumerate()
        .fold(start, |best, (i, x)| if *x > best.1 { (i, *x) } else { best })
        .0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities 0.1, 0.4, 0.2, 0.3 at temperature 1.
    const LOGITS: [f32; 4] = [0.0, 1.386_294_4, core::f32::consts::LN_2, 1.098_612_3];

    fn shares(draw: Draw) -> [f64; 4] {
        let mut random = Random::new(1, "shares");
        let mut counts = [0u32; 4];
        for _ in 0..40_000 {
            let mut streams = [random.clone()];
            let (token, logprob) = draw.tokens(&LOGITS, 4, &[0], &mut streams)[0];
            [random] = streams;
            counts[token as usize] += 1;
            let p = [0.1, 0.4, 0.2, 0.3][token as usize];
            let sum: f64 = [0.1f64, 0.4, 0.2, 0.3]
                .iter()
                .map(|p| p.powf(1.0 / draw.temperature))
                .sum();
            let expected = (f64::powf(p, 1.0 / draw.temperature) / sum).ln();
            assert!((f64::from(logprob) - expected).abs() < 1e-6);
        }
        counts.map(|count| f64::from(count) / 40_000.0)
    }

    fn draw(temperature: f64, top_k: usize, top_p: f64) -> Draw {
        Draw {
            temperature,
            top_k,
            top_p,
        }
    }

    fn near(found: [f64; 4], expected: [f64; 4]) {
        for (found, expected) in found.iter().zip(expected) {
            // Five standard deviations.
            let sigma = (expected * (1.0 - expected) / 40_000.0).sqrt();
            assert!((found - expected).abs() <= 5.0 * sigma, "{found} {expected}");
        }
    }

    #[test]
    fn tokens_come_with_their_probability() {
        near(shares(draw(1.0, 0, 1.0)), [0.1, 0.4, 0.2, 0.3]);
        let squares = [0.01, 0.16, 0.04, 0.09].map(|p| p / 0.3);
        near(shares(draw(0.5, 0, 1.0)), squares);
    }

    #[test]
    fn unlikely_tokens_are_ruled_out() {
        near(shares(draw(1.0, 2, 1.0)), [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        // 0.4 and 0.3 have 0.7 together, so that 0.71 needs 0.2 too.
        near(shares(draw(1.0, 0, 0.69)), [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        near(shares(draw(1.0, 0, 0.71)), [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        near(shares(draw(1.0, 0, 1e-9)), [0.0, 1.0, 0.0, 0.0]);
        // Of the three that top_k leaves, 0.4 and 0.3 have 7/9.
        near(shares(draw(1.0, 3, 0.77)), [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
    }

    #[test]
    fn the_most_probable_token_needs_no_chance() {
        for chance in [0.0, 0.5, 0.999] {
            let (token, logprob) = Draw::GREEDY.token(&LOGITS, chance);
            assert_eq!(token, 1);
            assert!((f64::from(logprob) - 0.4f64.ln()).abs() < 1e-6);
        }
        assert_eq!(
            Draw::GREEDY.token(&[1.0, 2.0, 2.0], 0.0).0,
            1,
            "the first of equals"
        );
    }
}
