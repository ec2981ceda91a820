//! The figures of a comparison, as `kl_divergence` in tools/perplexity/perplexity.cpp of llama.cpp computes them.

/// A mean and its standard error.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Its standard error.
    pub error: f64,
}

/// What two models make of a text.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Comparison {
    /// The number of chunks.
    pub chunks: usize,
    /// The number of tokens of a chunk.
    pub ctx: usize,
    /// The number of tokens that the models had to guess.
    pub tokens: usize,
    /// The reference's perplexity.
    pub reference_perplexity: Estimate,
    /// The other model's perplexity.
    pub perplexity: Estimate,
    /// The other's by the reference's.
    pub ratio: PerplexityRatio,
    /// Of the other model from the reference.
    pub divergence: Divergence,
    /// The part of the tokens, 0 to 1, for which both models have the same first guess.
    pub same_top: Estimate,
    /// How much more probable the other model finds the text's tokens: the mean of the differences.
    pub probability: Estimate,
    /// The root of the mean square of the differences.
    pub probability_rms: Estimate,
}

/// One perplexity by another. What they share does not count as an error.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct PerplexityRatio {
    /// The ratio.
    pub value: f64,
    /// Its standard error.
    pub error: f64,
    /// Its natural logarithm.
    pub logarithm: Estimate,
}

/// The Kullback-Leibler divergence in nats, token by token.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Divergence {
    /// The mean.
    pub mean: Estimate,
    /// Half of the tokens have less.
    pub median: f64,
    /// 90 of 100 tokens have less.
    pub percentile_90: f64,
    /// 99 of 100 tokens have less.
    pub percentile_99: f64,
    /// The largest.
    pub max: f64,
}

/// Which model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Reference,
    Other,
}

/// What both models make of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row {
    /// The negative logarithms of the probabilities of the token that follows.
    reference: f64,
    other: f64,
    divergence: f64,
    same_top: bool,
}

impl Row {
    /// Compares two rows of logits. `next` is the token that follows in the text. The error is the model whose logits
    /// are no numbers.
    pub(super) fn of(reference: &[f32], other: &[f32], next: i32) -> Result<Self, Side> {
        let (first, max) = top(reference);
        let (other_first, other_max) = top(other);
        let (mut sum, mut other_sum, mut difference) = (0.0, 0.0, 0.0);
        for (logit, other_logit) in reference.iter().zip(other) {
            let weight = f64::from((logit - max).exp());
            sum += weight;
            other_sum += f64::from((other_logit - other_max).exp());
            if weight > 0.0 {
                difference += weight * (f64::from(*logit) - f64::from(*other_logit));
            }
        }
        let normaliser = f64::from(max) + sum.ln();
        let other_normaliser = f64::from(other_max) + other_sum.ln();
        let divergence = difference / sum - normaliser + other_normaliser;
        let next = usize::try_from(next).unwrap_or(usize::MAX);
        let logit = |logits: &[f32]| f64::from(logits.get(next).copied().unwrap_or(f32::NAN));
        let row = Self {
            reference: normaliser - logit(reference),
            other: other_normaliser - logit(other),
            // Below zero it is the rounding.
            divergence: divergence.max(0.0),
            same_top: first == other_first,
        };
        if !row.reference.is_finite() {
            return Err(Side::Reference);
        }
        if !row.other.is_finite() || !divergence.is_finite() {
            return Err(Side::Other);
        }
        Ok(row)
    }

    fn probability_difference(&self) -> f64 {
        (-self.other).exp() - (-self.reference).exp()
    }
}

/// The place and value of the largest logit, the first of equals.
fn top(logits: &[f32]) -> (usize, f32) {
    let first = (0, f32::NEG_INFINITY);
    logits.iter().enumerate().fold(
        first,
        |best, (at, logit)| if *logit > best.1 { (at, *logit) } else { best },
    )
}

impl Comparison {
    pub(super) fn of(rows: &[Row], chunks: usize, ctx: usize) -> Self {
        let reference = Moments::of(rows.iter().map(|row| row.reference));
        let other = Moments::of(rows.iter().map(|row| row.other));
        let covariance = covariance(rows, reference.mean, other.mean);
        let logarithm = Estimate {
            value: other.mean - reference.mean,
            error: (reference.error.powi(2) + other.error.powi(2) - 2.0 * covariance)
                .max(0.0)
                .sqrt(),
        };
        let mut divergences: Vec<f64> = rows.iter().map(|row| row.divergence).collect();
        divergences.sort_by(f64::total_cmp);
        let differences = || rows.iter().map(Row::probability_difference);
        let squares = Moments::of(differences().map(|difference| difference * difference));
        let rms = squares.mean.sqrt();
        let same = rows.iter().filter(|row| row.same_top).count() as f64 / rows.len().max(1) as f64;
        Self {
            chunks,
            ctx,
            tokens: rows.len(),
            reference_perplexity: reference.exponential(),
            perplexity: other.exponential(),
            ratio: PerplexityRatio {
                value: logarithm.value.exp(),
                error: logarithm.value.exp() * logarithm.error,
                logarithm,
            },
            divergence: Divergence {
                mean: Moments::of(divergences.iter().copied()).estimate(),
                median: percentile(&divergences, 0.5),
                percentile_90: percentile(&divergences, 0.9),
                percentile_99: percentile(&divergences, 0.99),
                max: percentile(&divergences, 1.0),
            },
            same_top: Estimate {
                value: same,
                error: (same * (1.0 - same) / rows.len().saturating_sub(1).max(1) as f64).sqrt(),
            },
            probability: Moments::of(differences()).estimate(),
            probability_rms: Estimate {
                value: rms,
                error: if rms > 0.0 { 0.5 / rms * squares.error } else { 0.0 },
            },
        }
    }
}

/// A mean, and how sure it is.
struct Moments {
    mean: f64,
    error: f64,
}

impl Moments {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let count = values.clone().count().max(1) as f64;
        let mean = values.clone().sum::<f64>() / count;
        let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        Self {
            mean,
            error: (variance / (count - 1.0).max(1.0)).sqrt(),
        }
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            value: self.mean,
            error: self.error,
        }
    }

    fn exponential(&self) -> Estimate {
        Estimate {
            value: self.mean.exp(),
            error: self.mean.exp() * self.error,
        }
    }
}

/// Of the two means.
fn covariance(rows: &[Row], reference: f64, other: f64) -> f64 {
    let products = rows
        .iter()
        .map(|row| (row.reference - reference) * (row.other - other));
    let count = rows.len().max(1) as f64;
    products.sum::<f64>() / count / (count - 1.0).max(1.0)
}

/// Between the two nearest of the sorted values.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = fraction * last as f64;
    let below = place.floor() as usize;
    let part = place - below as f64;
    (1.0 - part) * sorted[below] + part * sorted[(below + 1).min(last)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }

    #[test]
    fn the_divergence_is_the_textbooks() {
        // Probabilities 1/2, 1/4, 1/4 against 1/4, 1/4, 1/2, with any constant added.
        let reference = [0.5f32, 0.25, 0.25].map(|p| p.ln() + 3.0);
        let other = [0.25f32, 0.25, 0.5].map(|p| p.ln() - 7.0);
        let row = Row::of(&reference, &other, 2).unwrap();
        close(row.divergence, 0.25 * 2f64.ln());
        close(row.reference, 4f64.ln());
        close(row.other, 2f64.ln());
        close(row.probability_difference(), 0.25);
        assert!(!row.same_top);
    }

    #[test]
    fn a_model_does_not_differ_from_itself() {
        let logits: Vec<f32> = (0..999).map(|i| ((i * 37) % 101) as f32 * 0.17).collect();
        let row = Row::of(&logits, &logits, 5).unwrap();
        assert_eq!((row.divergence, row.same_top), (0.0, true));
        assert_eq!(row.reference, row.other);
    }

    #[test]
    fn what_is_no_number_is_an_error_of_the_model_that_has_it() {
        let good = [1.0, 2.0, 3.0];
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(Row::of(&[1.0, bad, 3.0], &good, 0), Err(Side::Reference));
            assert_eq!(Row::of(&good, &[1.0, bad, 3.0], 0), Err(Side::Other));
        }
        // A token that only the other model rules out.
        let never = [1.0, f32::NEG_INFINITY, 3.0];
        assert_eq!(Row::of(&good, &never, 0), Err(Side::Other));
        assert!(Row::of(&never, &good, 0).is_ok());
    }

    #[test]
    fn means_errors_and_percentiles() {
        let row = |reference, other, divergence, same_top| Row {
            reference,
            other,
            divergence,
            same_top,
        };
        let rows = [
            row(1.0, 1.5, 0.1, true),
            row(2.0, 2.5, 0.3, true),
            row(3.0, 3.5, 0.2, false),
            row(4.0, 4.5, 0.8, true),
        ];
        let comparison = Comparison::of(&rows, 1, 8);
        close(comparison.reference_perplexity.value, 2.5f64.exp());
        close(comparison.perplexity.value, 3f64.exp());
        // The other is worse by the same factor everywhere: that is sure.
        close(comparison.ratio.value, 0.5f64.exp());
        close(comparison.ratio.error, 0.0);
        close(comparison.divergence.mean.value, 0.35);
        // The deviation 0.269258 by the root of 3.
        close(comparison.divergence.mean.error, 0.155_456);
        close(comparison.divergence.median, 0.25);
        close(comparison.divergence.percentile_99, 0.3 + 0.97 * 0.5);
        close(comparison.divergence.max, 0.8);
        close(comparison.same_top.value, 0.75);
        close(comparison.same_top.error, 0.25);
    }
}
