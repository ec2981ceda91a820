//! Llama 3's scaling: long wavelengths are divided by a factor, short ones are not, those between them partly.
//!
//! Source: transformers modeling_rope_utils.py (`_compute_llama3_parameters`), llama.cpp conversion/llama.py
//! (`generate_extra_tensors`).

use crate::arch::decoder::shortest;

/// Two f32 are taken for the same when at most so many others lie between them: powers differ that much between
/// mathematical libraries.
const ULPS: u32 = 3;

/// Constants that models were trained with: low and high frequency factor, context.
const USUAL: &[(f64, f64, f64)] = &[(1.0, 4.0, 8192.0)];

/// So many contexts are tried where the factors do not determine one.
const TRIES: usize = 4096;

/// The four constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::arch) struct Llama3 {
    pub(in crate::arch) factor: f64,
    /// Wavelengths above `context / low` are divided by the whole factor.
    pub(in crate::arch) low: f64,
    /// Wavelengths below `context / high` are not divided.
    pub(in crate::arch) high: f64,
    /// The number of positions before the scaling.
    pub(in crate::arch) context: f64,
}

impl Llama3 {
    /// By how much each frequency of the rotation is divided, `head_dim / 2` values. The steps are those of torch
    /// in llama.cpp's converter, in f32, where a number over a tensor is the number times the reciprocal.
    pub(in crate::arch) fn factors(&self, head_dim: usize, theta: f64) -> Vec<f32> {
        let (factor, low) = (self.factor as f32, self.low as f32);
        let (high, context) = (self.high as f32, self.context as f32);
        let exponents = (0..head_dim).step_by(2).map(|i| i as f32 / head_dim as f32);
        exponents
            .map(|exponent| {
                let frequency = 1.0 / (theta as f32).powf(exponent);
                let wavelength = 1.0 / frequency * std::f32::consts::TAU;
                if wavelength < context / high {
                    1.0
                } else if wavelength > context / low {
                    factor
                } else {
                    let smooth = (1.0 / wavelength * context - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            })
            .collect()
    }

    /// Constants whose factors are `values`. Different constants may give the same factors, and then any of them
    /// makes the same model: the usual ones are tried first, then those that solve the equations.
    pub(in crate::arch) fn recover(values: &[f32], theta: f64) -> Option<Self> {
        // The last frequency is the lowest one: if any is divided by the whole factor, it is.
        let factor = shortest(*values.last()?);
        let matches = |(low, high, context): &(f64, f64, f64)| {
            let constants = Self {
                factor,
                low: *low,
                high: *high,
                context: *context,
            };
            let ours = constants.factors(2 * values.len(), theta);
            ours.iter()
                .zip(values)
                .all(|(a, b)| a.to_bits().abs_diff(b.to_bits()) <= ULPS)
                .then_some(constants)
        };
        let solved = solve(values, theta, factor);
        USUAL.iter().chain(&solved).find_map(matches)
    }
}

/// Candidates for low and high frequency factor and context.
///
/// A factor v between 1 and F has `(1/v − 1/F) / (1 − 1/F) = (context/wavelength − low) / (high − low)`: a line
/// in `1/wavelength`. All three constants times anything give the same line.
fn solve(values: &[f32], theta: f64, factor: f64) -> Vec<(f64, f64, f64)> {
    let n = values.len() as f64;
    let points: Vec<_> = values
        .iter()
        .enumerate()
        .map(|(i, value)| {
            let wavelength = std::f64::consts::TAU * theta.powf(i as f64 / n);
            let smooth = (1.0 / f64::from(*value) - 1.0 / factor) / (1.0 - 1.0 / factor);
            (wavelength, smooth)
        })
        .collect();
    let partly = |(_, smooth): &&(f64, f64)| (1e-6..1.0 - 1e-6).contains(smooth);
    let between: Vec<_> = points.iter().filter(partly).collect();
    let whole = points.iter().find(|(_, smooth)| *smooth < 1e-6);
    let first_whole = whole.map_or(f64::MAX, |(wavelength, _)| *wavelength);
    let nice = |high: f64| (high * 4.0).round() / 4.0;
    let mut found = Vec::new();
    match (between.first(), between.last()) {
        (Some((x0, y0)), Some((x1, y1))) if between.len() > 1 => {
            let slope = (y1 - y0) / (1.0 / x1 - 1.0 / x0);
            let at_zero = y0 - slope / x0;
            let (high, context) = (1.0 - 1.0 / at_zero, -slope / at_zero);
            for low in [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 16.0, 32.0] {
                found.push((low, nice(high * low), (context * low).round()));
            }
        }
        (Some((wavelength, smooth)), _) => {
            // One equation: any context between this wavelength and the next one, and the high factor that fits.
            for context in contexts(*wavelength, first_whole) {
                let high = 1.0 + (context / wavelength - 1.0) / smooth;
                found.extend([nice(high), high].map(|high| (1.0, high, context)));
            }
            found.sort_by_key(|(_, high, _)| nice(*high) != *high);
        }
        // No equation: nothing may lie between the two limits.
        _ => {
            let undivided = points.iter().rev().find(|(_, smooth)| *smooth > 1.0 - 1e-6);
            let shorter = undivided.map_or(0.0, |(wavelength, _)| *wavelength);
            for context in contexts(shorter, first_whole) {
                found.extend([4.0, 2.0, 1.5, 1.1, 1.01].map(|high| (1.0, high, context)));
            }
        }
    }
    found.retain(|(low, high, context)| high > low && *context >= 1.0 && context.is_finite());
    found
}

/// Whole numbers between two wavelengths, powers of two first.
fn contexts(from: f64, to: f64) -> impl Iterator<Item = f64> {
    let inside = move |context: &f64| *context > from && *context < to;
    let powers = (4..24).map(|power| f64::from(1u32 << power));
    let step = ((to.min(1e9) - from) / TRIES as f64).ceil().max(1.0);
    let all = (1..=TRIES).map(move |i| (from + i as f64 * step).floor());
    powers.chain(all).filter(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_those_of_llama_cpps_converter_bit_for_bit() {
        #[derive(serde::Deserialize)]
        struct Case {
            head_dim: usize,
            theta: f64,
            factor: f64,
            low: f64,
            high: f64,
            context: f64,
            bits: Vec<u32>,
        }
        let cases = include_str!("../../../tests/fixtures/llama3_factors.json");
        for case in serde_json::from_str::<Vec<Case>>(cases).unwrap() {
            let constants = Llama3 {
                factor: case.factor,
                low: case.low,
                high: case.high,
                context: case.context,
            };
            let ours = constants.factors(case.head_dim, case.theta);
            assert_eq!(
                ours.iter().map(|f| f.to_bits()).collect::<Vec<_>>(),
                case.bits,
                "{constants:?}"
            );
        }
    }

    #[test]
    fn constants_that_give_the_same_factors_are_found() {
        let constants = |factor, low, high, context| Llama3 {
            factor,
            low,
            high,
            context,
        };
        for (head_dim, theta, given) in [
            (64, 500_000.0, constants(32.0, 1.0, 4.0, 8192.0)),
            (128, 500_000.0, constants(8.0, 1.0, 4.0, 8192.0)),
            (32, 5000.0, constants(6.0, 2.0, 5.0, 96.0)),
            (128, 10_000.0, constants(2.5, 1.0, 3.75, 1000.0)),
            (64, 1_000_000.0, constants(16.0, 4.0, 8.0, 65536.0)),
            (12, 500_000.0, constants(32.0, 1.0, 4.0, 8192.0)),
            (12, 500_000.0, constants(32.0, 1.0, 2.0, 4096.0)),
            (4, 10_000.0, constants(4.0, 1.0, 4.0, 256.0)),
        ] {
            let values = given.factors(head_dim, theta);
            let found = Llama3::recover(&values, theta).unwrap_or_else(|| panic!("{given:?}: {values:?}"));
            assert_eq!(found.factors(head_dim, theta), values, "{given:?} {found:?}");
        }
    }

    #[test]
    fn factors_of_another_kind_have_no_constants() {
        let mut values = vec![1.0, 1.0, 1.3, 2.0, 2.1, 8.0, 8.0, 8.0];
        assert_eq!(Llama3::recover(&values, 10_000.0), None);
        values.reverse();
        assert_eq!(Llama3::recover(&values, 10_000.0), None);
        assert_eq!(Llama3::recover(&[], 10_000.0), None);
    }
}
