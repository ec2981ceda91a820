//! AdamW's moments in a byte a number, as bitsandbytes' `AdamW8bit` keeps them.
//!
//! A block of 256 numbers has one scale, its largest magnitude; each number is the code of the nearest of 256 values
//! between −1 and 1 (0 and 1 for squares, which have no sign) that lie the closer the smaller they are.
//!
//! Source: [Dettmers et al.](https://arxiv.org/abs/2110.02861); bitsandbytes 0.50.2, `functional.create_dynamic_map` and
//! `backends/cpu/ops.py`.

use std::sync::LazyLock;

use rayon::prelude::*;

/// Numbers with one scale.
const BLOCK: usize = 256;
/// Blocks that a thread takes at a time.
const BLOCKS: usize = 64;
/// Smaller tensors stay in f32, as bitsandbytes' `min_8bit_size` has it.
const SMALLEST: usize = 4096;

static SIGNED: LazyLock<Codes> = LazyLock::new(|| Codes::new(true));
static UNSIGNED: LazyLock<Codes> = LazyLock::new(|| Codes::new(false));

/// Whether the moments of a trained tensor of this name and so many numbers take eight bits: not those of an embedding,
/// whose rows get gradients far apart in size, which transformers' Trainer leaves in f32 too.
pub fn takes_eight_bits(name: &str, numbers: usize) -> bool {
    numbers >= SMALLEST && !name.ends_with("embed_tokens.weight")
}

/// The bytes of both moments of so many numbers.
pub fn bytes(numbers: u64) -> u64 {
    2 * (numbers + numbers.div_ceil(BLOCK as u64) * 4)
}

/// What the codes stand for, and how a code is found.
struct Codes {
    /// Rising.
    values: [f32; 256],
    /// What is larger than `borders[i]` is nearer to a value after the i-th; the last is infinite.
    borders: [f32; 256],
    /// The first code of the numbers up to 1, and down to −1 with signs, whose bits begin with these sixteen.
    first: Vec<u8>,
}

impl Codes {
    fn new(signed: bool) -> Self {
        let values = dynamic_map(signed);
        let mut borders = [f32::INFINITY; 256];
        for (border, pair) in borders.iter_mut().zip(values.windows(2)) {
            *border = f32::midpoint(pair[0], pair[1]);
        }
        let last = (if signed { -1.0f32 } else { 1.0 }).to_bits() >> 16;
        let first = (0..=last)
            .map(|bits| {
                // The smallest number that begins so: of negative ones the one with the largest magnitude.
                let rest = if bits & 0x8000 == 0 { 0 } else { 0xffff };
                let smallest = f32::from_bits(bits << 16 | rest);
                borders.partition_point(|border| *border < smallest) as u8
            })
            .collect();
        Self {
            values,
            borders,
            first,
        }
    }

    /// The code of the value that is nearest to x, which is between −1 and 1.
    fn nearest(&self, x: f32) -> u8 {
        let begin = (x.to_bits() >> 16) as usize;
        let mut code = self.first.get(begin).copied().unwrap_or(0);
        while x > self.borders[usize::from(code)] {
            code += 1;
        }
        code
    }

    fn decode(&self, codes: &[u8], scale: f32, out: &mut [f32]) {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = self.values[usize::from(*code)] * scale;
        }
    }

    /// Writes the codes of a block of numbers with this scale.
    fn encode(&self, numbers: &[f32], scale: f32, codes: &mut [u8]) {
        // A block of zeros has no scale.
        let by = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (code, x) in codes.iter_mut().zip(numbers) {
            *code = self.nearest((x * by).clamp(-1.0, 1.0));
        }
    }
}

/// The 256 values: zero, one, and in each of seven decades as many between a tenth and the whole of it as its codes have
/// bits for, with and without sign.
fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for (i, decade) in [1e-6f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
        .into_iter()
        .enumerate()
    {
        let count: usize = if signed { 1 << i } else { 2 << i };
        let step = (1.0f32 - 0.1) / count as f32;
        // From both ends, as torch.linspace counts.
        let border = |at: usize| match at < count.div_ceil(2) {
            true => 0.1 + step * at as f32,
            false => 1.0 - step * (count - at) as f32,
        };
        for at in 0..count {
            let value = decade * ((border(at) + border(at + 1)) / 2.0);
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    let mut map = [0.0; 256];
    map.copy_from_slice(&values);
    map
}

/// One moment of a tensor.
struct Moment {
    codes: Vec<u8>,
    /// One a block.
    scales: Vec<f32>,
    map: &'static Codes,
}

impl std::fmt::Debug for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Moment")
            .field("numbers", &self.codes.len())
            .finish_non_exhaustive()
    }
}

impl Moment {
    fn zeros(numbers: usize, map: &'static Codes) -> Self {
        Self {
            codes: vec![map.nearest(0.0); numbers],
            scales: vec![0.0; numbers.div_ceil(BLOCK)],
            map,
        }
    }

    fn numbers(&self) -> Vec<f32> {
        let mut numbers = vec![0.0; self.codes.len()];
        let blocks = numbers.chunks_mut(BLOCK).zip(self.codes.chunks(BLOCK));
        for ((out, codes), scale) in blocks.zip(&self.scales) {
            self.map.decode(codes, *scale, out);
        }
        numbers
    }

    /// Takes numbers, with the scales that they had or their own.
    fn set(&mut self, numbers: &[f32], scales: Option<Vec<f32>>) {
        self.scales = scales.unwrap_or_else(|| numbers.chunks(BLOCK).map(largest).collect());
        let blocks = numbers.chunks(BLOCK).zip(self.codes.chunks_mut(BLOCK));
        for ((numbers, codes), scale) in blocks.zip(&self.scales) {
            self.map.encode(numbers, *scale, codes);
        }
    }
}

fn largest(numbers: &[f32]) -> f32 {
    numbers.iter().fold(0.0, |largest, x| x.abs().max(largest))
}

/// Both moments of a tensor.
#[derive(Debug)]
pub(super) struct EightBitMoments {
    mean: Moment,
    square: Moment,
}

impl EightBitMoments {
    pub(super) fn zeros(numbers: usize) -> Self {
        Self {
            mean: Moment::zeros(numbers, &SIGNED),
            square: Moment::zeros(numbers, &UNSIGNED),
        }
    }

    /// What the codes stand for.
    pub(super) fn numbers(&self) -> [Vec<f32>; 2] {
        [self.mean.numbers(), self.square.numbers()]
    }

    /// The scale of each block.
    pub(super) fn scales(&self) -> [Vec<f32>; 2] {
        [self.mean.scales.clone(), self.square.scales.clone()]
    }

    /// Takes moments. With the scales that they had the codes are those that they were made of: the largest number of a
    /// block alone does not tell, since −1 has no code.
    pub(super) fn set(&mut self, [mean, square]: &[Vec<f32>; 2], scales: Option<[Vec<f32>; 2]>) {
        let (means, squares) = scales.map_or((None, None), |[mean, square]| (Some(mean), Some(square)));
        self.mean.set(mean, means);
        self.square.set(square, squares);
    }

    /// Lets `step` move weights by gradients and moments (weights, gradients, means, squares), a block at a time.
    pub(super) fn step(
        &mut self,
        weights: &mut [f32],
        gradient: &[f32],
        step: impl Fn(&mut [f32], &[f32], &mut [f32], &mut [f32]) + Sync,
    ) {
        const CHUNK: usize = BLOCK * BLOCKS;
        let (mean, square) = (&mut self.mean, &mut self.square);
        let (signed, unsigned) = (mean.map, square.map);
        weights
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(
                mean.codes
                    .par_chunks_mut(CHUNK)
                    .zip(mean.scales.par_chunks_mut(BLOCKS)),
            )
            .zip(
                square
                    .codes
                    .par_chunks_mut(CHUNK)
                    .zip(square.scales.par_chunks_mut(BLOCKS)),
            )
            .for_each(
                |(((weights, gradient), (means, mean_scales)), (squares, square_scales))| {
                    let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
                    let weights = weights.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK));
                    let means = means.chunks_mut(BLOCK).zip(mean_scales);
                    let squares = squares.chunks_mut(BLOCK).zip(square_scales);
                    for (((weights, gradient), (means, mean_scale)), (squares, square_scale)) in
                        weights.zip(means).zip(squares)
                    {
                        let (m, v) = (&mut m[..weights.len()], &mut v[..weights.len()]);
                        signed.decode(means, *mean_scale, m);
                        unsigned.decode(squares, *square_scale, v);
                        step(weights, gradient, m, v);
                        (*mean_scale, *square_scale) = (largest(m), largest(v));
                        signed.encode(m, *mean_scale, means);
                        unsigned.encode(v, *square_scale, squares);
                    }
                },
            );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_stand_for_what_they_do_in_bitsandbytes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/optimizer.json");
        let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for (name, signed) in [("signed", true), ("unsigned", false)] {
            let theirs: Vec<f32> = serde_json::from_value(golden["maps"][name].clone()).unwrap();
            for (ours, theirs) in dynamic_map(signed).into_iter().zip(theirs) {
                assert!(
                    (ours - theirs).abs() <= 2e-7 * theirs.abs(),
                    "{name}: {ours}, {theirs}"
                );
            }
        }
    }

    #[test]
    fn a_code_is_the_nearest_value_s() {
        for codes in [&*SIGNED, &*UNSIGNED] {
            assert!(codes.values.is_sorted());
            for (code, value) in codes.values.iter().enumerate() {
                assert_eq!(usize::from(codes.nearest(*value)), code, "{value}");
            }
            for at in -40_000..=40_000 {
                let x = (f64::from(at) / 40_000.0).powi(3) as f32;
                if x < codes.values[0] {
                    continue;
                }
                let error = |value: f32| (f64::from(value) - f64::from(x)).abs();
                let best = codes.values.iter().map(|value| error(*value)).fold(1.0, f64::min);
                let found = error(codes.values[usize::from(codes.nearest(x))]);
                assert!(found <= best + 1e-7 * f64::from(x.abs()), "{x}: {found}, {best}");
            }
        }
    }

    #[test]
    fn moments_that_are_read_and_put_back_have_the_same_codes() {
        let mut moments = EightBitMoments::zeros(600);
        let numbers = |step: f32| {
            (0..600)
                .map(|i| ((i as f32) * step).sin() - 0.3)
                .collect::<Vec<_>>()
        };
        let squares = numbers(0.7).iter().map(|x| x * x).collect();
        moments.set(&[numbers(0.9), squares], None);
        let mut again = EightBitMoments::zeros(600);
        again.set(&moments.numbers(), Some(moments.scales()));
        assert_eq!(again.mean.codes, moments.mean.codes);
        assert_eq!(again.square.codes, moments.square.codes);
        assert_eq!(again.scales(), moments.scales());
    }
}
