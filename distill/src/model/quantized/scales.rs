//! The scales of NF4's blocks, plain or quantised a second time, as bitsandbytes 0.50 does it on the CPU.
//!
//! Double quantisation: the mean of all scales is taken off, and what is left is stored in eight bits of a signed
//! dynamic type (a few bits of exponent, the rest fraction; <https://arxiv.org/abs/1511.04561>) in blocks of 256
//! with one f32 each. Four and a half bits a weight become 4.127.

use std::sync::LazyLock;

use rayon::prelude::*;

/// Scales that share a scale of their own.
const NESTED_BLOCK: usize = 256;

/// One scale for each block of a matrix.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// As they are: bitsandbytes' `absmax`.
    Plain(Vec<f32>),
    /// In eight bits: scale i is `dynamic_map()[codes[i]] · nested[i / 256] + offset`.
    Double {
        /// bitsandbytes' `absmax` of a nested state.
        codes: Vec<u8>,
        /// bitsandbytes' `nested_absmax`.
        nested: Vec<f32>,
        /// bitsandbytes' `nested_offset`.
        offset: f32,
    },
}

impl Scales {
    /// From the blocks' largest magnitudes.
    pub(super) fn new(absmax: Vec<f32>, double_quant: bool) -> Self {
        if !double_quant {
            return Self::Plain(absmax);
        }
        let offset = torch_mean(&absmax);
        let mut codes = vec![0; absmax.len()];
        let nested = codes
            .par_chunks_mut(NESTED_BLOCK)
            .zip(absmax.par_chunks(NESTED_BLOCK))
            .map(|(codes, absmax)| quantize_nested(absmax, offset, codes))
            .collect();
        Self::Double {
            codes,
            nested,
            offset,
        }
    }

    /// The scale of a block.
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[block],
            Self::Double {
                codes,
                nested,
                offset,
            } => DYNAMIC_MAP[usize::from(codes[block])] * nested[block / NESTED_BLOCK] + offset,
        }
    }

    /// The memory that they take.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len() * 4,
            Self::Double { codes, nested, .. } => codes.len() + nested.len() * 4 + 4,
        }
    }
}

/// 1 / x as bitsandbytes takes it, which keeps the smallest numbers from becoming infinite.
pub(super) fn torch_inverse(x: f32) -> f32 {
    1.0 / x.max(1e-38)
}

/// Writes the codes of `absmax − offset` and returns their scale. csrc/cpu_ops.cpp, `quantize_cpu_impl`.
fn quantize_nested(absmax: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    let largest = absmax.iter().fold(0.0f32, |max, x| max.max((x - offset).abs()));
    if largest == 0.0 {
        codes.fill(0);
        return 0.0;
    }
    let inverse = 1.0 / largest;
    for (code, x) in codes.iter_mut().zip(absmax) {
        let x = ((x - offset) * inverse).clamp(-1.0, 1.0);
        *code = DYNAMIC_CODES[((x + 1.0) * 32767.5 + 0.5) as usize];
    }
    largest
}

/// bitsandbytes/functional.py, `create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)`: 0, 1, and for
/// each power of ten from 10⁻⁶ to 1 twice as many fractions as for the one before, with either sign. Sorted.
pub fn dynamic_map() -> &'static [f32; 256] {
    &DYNAMIC_MAP
}

static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut map = [0.0; 256];
    map[1] = 1.0;
    let mut at = 2;
    for exponent in 0..7 {
        let power = 10f64.powi(exponent - 6) as f32;
        let borders = linspace(1 << exponent);
        for pair in borders.windows(2) {
            let mean = (pair[0] + pair[1]) / 2.0 * power;
            (map[at], map[at + 1]) = (mean, -mean);
            at += 2;
        }
    }
    map.sort_by(f32::total_cmp);
    map
});

/// The codes of 65,536 numbers from −1 to 1. bitsandbytes looks a number up at the nearest of these, so that what
/// is much smaller than 2⁻¹⁶ gets the code of ±2⁻¹⁶.
static DYNAMIC_CODES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let nearest = |i: usize| {
        let x = i as f32 / 65535.0 * 2.0 - 1.0;
        let above = DYNAMIC_MAP.partition_point(|value| *value < x).min(255);
        let below = above.saturating_sub(1);
        let lower = (x - DYNAMIC_MAP[below]).abs() <= (x - DYNAMIC_MAP[above]).abs();
        (if lower { below } else { above }) as u8
    };
    (0..=65535).map(nearest).collect()
});

/// `torch.linspace(0.1, 1, intervals + 1)` in f32: the second half is counted from the end.
fn linspace(intervals: usize) -> Vec<f32> {
    let step = (1.0f32 - 0.1) / intervals as f32;
    let from_start = |i: usize| step.mul_add(i as f32, 0.1);
    let from_end = |i: usize| (-step).mul_add((intervals - i) as f32, 1.0);
    let half = intervals.div_ceil(2);
    (0..=intervals)
        .map(|i| if i < half { from_start(i) } else { from_end(i) })
        .collect()
}

/// torch's `mean` of f32 on a CPU with vectors of eight and one thread, to the last bit: the offset decides every
/// code after it. aten/src/ATen/native/cpu/SumKernel.cpp, `vectorized_inner_sum`.
fn torch_mean(values: &[f32]) -> f32 {
    let sum = if values.len() < 8 {
        row_sum::<1>(values.as_chunks().0)[0]
    } else {
        let (vectors, rest) = values.as_chunks::<8>();
        let lanes = row_sum(vectors);
        let rest = rest.iter().fold(0.0, |sum, x| sum + x);
        lanes.iter().fold(rest, |sum, x| sum + x)
    };
    sum / values.len() as f32
}

fn add<const N: usize>(to: &mut [f32; N], from: &[f32; N]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

/// `row_sum`: vectors go to four sums in turn.
fn row_sum<const N: usize>(vectors: &[[f32; N]]) -> [f32; N] {
    let (fours, rest) = vectors.as_chunks::<4>();
    let mut sums = cascade(fours);
    for vector in rest {
        add(&mut sums[0], vector);
    }
    let [mut sum, others @ ..] = sums;
    for other in &others {
        add(&mut sum, other);
    }
    sum
}

/// `multi_row_sum`: sums of sums over four levels, so that a long row adds up without a loss.
fn cascade<const N: usize>(fours: &[[[f32; N]; 4]]) -> [[f32; N]; 4] {
    const LEVELS: usize = 4;
    let log2 = fours.len().max(1).next_power_of_two().ilog2() as usize;
    let power = (log2 / LEVELS).max(4);
    let step = 1 << power;
    let mut levels = [[[0.0; N]; 4]; LEVELS];
    let add_four = |level: &mut [[f32; N]; 4], four: &[[f32; N]; 4]| {
        for (sum, vector) in level.iter_mut().zip(four) {
            add(sum, vector);
        }
    };
    let whole = fours.chunks_exact(step);
    let rest = whole.remainder();
    for (done, chunk) in (1usize..).zip(whole) {
        for four in chunk {
            add_four(&mut levels[0], four);
        }
        // The sum of 2^power sums moves one level up.
        for level in 1..LEVELS {
            let below = std::mem::replace(&mut levels[level - 1], [[0.0; N]; 4]);
            add_four(&mut levels[level], &below);
            if (done << power) & ((step - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    let [mut sum, upper @ ..] = levels;
    for four in rest {
        add_four(&mut sum, four);
    }
    for level in &upper {
        add_four(&mut sum, level);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_sorted_with_zero_in_the_middle() {
        let map = dynamic_map();
        assert!(map.is_sorted_by(|a, b| a < b));
        assert_eq!((map[127], map[255]), (0.0, 1.0));
    }

    /// The numbers are the hash that references/nf4.py makes; so are the means.
    #[test]
    fn the_mean_is_torchs_to_the_last_bit() {
        let recorded = include_str!("../../../tests/fixtures/torch_means.json");
        for (length, mean) in serde_json::from_str::<Vec<(u32, u32)>>(recorded).unwrap() {
            let values: Vec<f32> = (0..length)
                .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 16_777_216.0)
                .collect();
            assert_eq!(torch_mean(&values).to_bits(), mean, "{length} numbers");
        }
    }
}
