//! NF4, the four-bit type of QLoRA (<https://arxiv.org/abs/2305.14314>), bit for bit as bitsandbytes 0.50 makes it
//! on the CPU with one thread: `functional.quantize_4bit(…, quant_type="nf4", blocksize=64)`.
//!
//! Blocks run over the flattened matrix, so a row may begin inside a block. A block has the largest magnitude of
//! its 64 elements as its scale (`absmax`); with double quantisation these scales are themselves stored in eight
//! bits, see [`Scales`].

use std::ops::Range;

use rayon::prelude::*;

use super::scales::{Scales, torch_inverse};
use crate::model::QuantizedRows;

/// Elements that share a scale.
const BLOCK: usize = 64;

/// The values of the sixteen codes: bitsandbytes/backends/utils.py, `_NF4_QUANT_TABLE`.
const CODES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The borders between neighbouring codes.
const BORDERS: [f32; 15] = {
    let mut borders = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        borders[i] = (CODES[i] + CODES[i + 1]) / 2.0;
        i += 1;
    }
    borders
};

/// The two values of every byte, the high nibble's first.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODES[byte >> 4], CODES[byte & 15]];
        byte += 1;
    }
    pairs
};

/// A matrix in NF4.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4 {
    name: String,
    dims: [usize; 2],
    /// Two codes a byte, the first in the high nibble. An odd last one is followed by the code of zero.
    packed: Vec<u8>,
    scales: Scales,
}

impl Nf4 {
    /// Quantises a matrix `[out, in]` of finite numbers; `double_quant` stores the scales in eight bits.
    ///
    /// # Panics
    /// When there are not `out · in` values.
    pub fn quantize(name: String, values: &[f32], dims: [usize; 2], double_quant: bool) -> Self {
        assert_eq!(values.len(), dims[0] * dims[1], "as many values as the shape has");
        let mut packed = vec![0; values.len().div_ceil(2)];
        let absmax: Vec<f32> = packed
            .par_chunks_mut(BLOCK / 2)
            .zip(values.par_chunks(BLOCK))
            .map(|(packed, values)| quantize_block(values, packed))
            .collect();
        Self {
            name,
            dims,
            packed,
            scales: Scales::new(absmax, double_quant),
        }
    }

    /// The codes, two a byte: bitsandbytes' `weight`.
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The blocks' scales.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// Elements `start..start + out.len()` of the flattened matrix.
    fn read(&self, start: usize, out: &mut [f32]) {
        let mut at = start;
        let mut rest = out;
        while !rest.is_empty() {
            let block = at / BLOCK;
            let count = rest.len().min((block + 1) * BLOCK - at);
            let (now, later) = rest.split_at_mut(count);
            self.read_within(at, self.scales.get(block), now);
            (at, rest) = (at + count, later);
        }
    }

    /// Elements of one block, at least one.
    fn read_within(&self, start: usize, scale: f32, out: &mut [f32]) {
        let bytes = &self.packed[start / 2..(start + out.len()).div_ceil(2)];
        // A row of odd length may begin in the middle of a byte.
        let odd = start % 2;
        let (first, rest) = out.split_at_mut(odd);
        if let [out] = first {
            *out = PAIRS[usize::from(bytes[0])][1] * scale;
        }
        let (pairs, last) = rest.as_chunks_mut::<2>();
        for (out, byte) in pairs.iter_mut().zip(&bytes[odd..]) {
            let [high, low] = PAIRS[usize::from(*byte)];
            *out = [high * scale, low * scale];
        }
        if let ([out], Some(byte)) = (last, bytes.last()) {
            *out = PAIRS[usize::from(*byte)][0] * scale;
        }
    }
}

/// Writes a block's codes and returns its scale. bitsandbytes/backends/default/ops.py, `quantize_4bit`: a whole
/// block is multiplied by the inverse of its scale, the short one at the end is divided by it.
fn quantize_block(values: &[f32], packed: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let whole = values.len() == BLOCK;
    let scale = if whole { largest } else { largest.max(1e-38) };
    let inverse = torch_inverse(largest);
    let code = |x: f32| {
        let x = if whole { x * inverse } else { x / scale };
        nearest(x.clamp(-1.0, 1.0))
    };
    for (byte, pair) in packed.iter_mut().zip(values.chunks(2)) {
        let low = pair.get(1).map_or(nearest(0.0), |x| code(*x));
        *byte = code(pair[0]) << 4 | low;
    }
    scale
}

/// The nearest code; a number on the border between two gets the lower one.
fn nearest(x: f32) -> u8 {
    BORDERS.iter().map(|border| u8::from(x > *border)).sum()
}

impl QuantizedRows for Nf4 {
    fn name(&self) -> &str {
        &self.name
    }

    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn dequantize(&self, rows: Range<usize>, out: &mut [f32]) {
        debug_assert_eq!(out.len(), rows.len() * self.dims[1]);
        self.read(rows.start * self.dims[1], out);
    }

    fn bytes(&self) -> usize {
        self.packed.len() + self.scales.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_its_own_nearest_and_a_border_gets_the_lower() {
        for (code, value) in (0..).zip(CODES) {
            assert_eq!(nearest(value), code);
        }
        for (code, border) in (0..).zip(BORDERS) {
            assert_eq!(nearest(border), code);
            assert_eq!(nearest(border.next_up()), code + 1);
        }
    }

    #[test]
    fn rows_that_begin_inside_a_block_or_a_byte_are_those_of_the_whole() {
        for dims in [[9, 64], [11, 50], [13, 7], [1, 1], [3, 129]] {
            let values: Vec<f32> = (0..dims[0] * dims[1]).map(|i| (i as f32 * 0.37).sin()).collect();
            for double_quant in [false, true] {
                let matrix = Nf4::quantize("w".into(), &values, dims, double_quant);
                let mut whole = vec![f32::NAN; values.len()];
                matrix.dequantize(0..dims[0], &mut whole);
                for start in 0..dims[0] {
                    let mut row = vec![f32::NAN; dims[1]];
                    matrix.dequantize(start..start + 1, &mut row);
                    assert_eq!(row, whole[start * dims[1]..][..dims[1]], "{dims:?}, row {start}");
                }
                let largest = whole
                    .iter()
                    .zip(&values)
                    .fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
                assert!(largest < 0.2, "{dims:?}: off by {largest}");
            }
        }
    }
}
