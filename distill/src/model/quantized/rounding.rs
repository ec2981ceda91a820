//! How llama.cpp rounds what a quantised matrix is multiplied with: its CPU kernels turn every row of activations
//! into blocks of eight bits first, and multiply integers. Source: ggml/src/ggml-cpu/ggml-cpu.c (`vec_dot_type`),
//! ggml/src/ggml-quants.c (`quantize_row_q8_0_ref`, `quantize_row_q8_K_ref`).

use half::{bf16, f16};
use pipit_convert::gguf::TensorType;

/// The type that activations get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Half precision.
    F16,
    /// Brain float.
    Bf16,
    /// Eight bits in blocks of 32, with a scale in f16.
    Q8_0,
    /// Eight bits in blocks of 256, with a scale in f32.
    Q8K,
}

impl Rounding {
    /// What activations get before they are multiplied with blocks of this type; nothing for f32.
    pub fn of(kind: TensorType) -> Option<Self> {
        match kind {
            TensorType::F32 => None,
            TensorType::F16 => Some(Self::F16),
            TensorType::BF16 => Some(Self::Bf16),
            kind if kind.block_elements() == 256 => Some(Self::Q8K),
            // Q8_1, which some of these get, is Q8_0 with the sums of its blocks beside it.
            _ => Some(Self::Q8_0),
        }
    }

    /// Rounds a row, which is whole blocks as the matrix's rows are.
    pub fn apply(self, row: &mut [f32]) {
        match self {
            Self::F16 => row.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
            Self::Bf16 => row.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
            Self::Q8_0 => row.chunks_mut(32).for_each(|block| {
                let largest = block.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                let scale = largest / 127.0;
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                let scale = f16::from_f32(scale).to_f32();
                for x in block {
                    *x = (*x * inverse).round_ties_even() * scale;
                }
            }),
            Self::Q8K => row.chunks_mut(256).for_each(|block| {
                // The number of largest magnitude, with its sign, becomes −127.
                let largest = block
                    .iter()
                    .fold(0.0f32, |max, x| if x.abs() > max.abs() { *x } else { max });
                let inverse = if largest == 0.0 { 0.0 } else { -127.0 / largest };
                let scale = if largest == 0.0 { 0.0 } else { 1.0 / inverse };
                for x in block {
                    *x = (*x * inverse).round_ties_even().min(127.0) * scale;
                }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use pipit_convert::quantize;

    use super::*;

    fn row() -> Vec<f32> {
        (0..512)
            .map(|i| (i as f32 * 0.37).sin() * (1.0 + (i / 32) as f32))
            .collect()
    }

    #[test]
    fn q8_0_is_ggmls() {
        let (mut blocks, mut theirs, mut ours) = (Vec::new(), vec![0.0; 512], row());
        quantize::quantize(TensorType::Q8_0, &ours, 512, None, &mut blocks).unwrap();
        quantize::dequantize(TensorType::Q8_0, &blocks, 512, &mut theirs).unwrap();
        Rounding::Q8_0.apply(&mut ours);
        assert_eq!(ours, theirs);
    }

    #[test]
    fn q8_k_is_within_half_a_step_and_keeps_the_largest() {
        let (before, mut after) = (row(), row());
        after[300] = -40.0;
        Rounding::Q8K.apply(&mut after);
        assert!((after[300] + 40.0).abs() < 1e-5);
        for (block, (before, after)) in before.chunks(256).zip(after.chunks(256)).enumerate() {
            let largest = after.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            for (i, (a, b)) in before.iter().zip(after).enumerate() {
                assert!(
                    (block, i) == (1, 44) || (a - b).abs() <= 0.5001 * largest / 127.0,
                    "{a} {b}"
                );
            }
        }
        let mut zero = vec![0.0; 256];
        Rounding::Q8K.apply(&mut zero);
        assert!(zero.iter().all(|x| *x == 0.0));
    }

    #[test]
    fn every_type_of_blocks_has_one() {
        for (kind, rounding) in [
            (TensorType::F32, None),
            (TensorType::BF16, Some(Rounding::Bf16)),
            (TensorType::Q4_1, Some(Rounding::Q8_0)),
            (TensorType::IQ4_NL, Some(Rounding::Q8_0)),
            (TensorType::Q4_K, Some(Rounding::Q8K)),
            (TensorType::IQ4_XS, Some(Rounding::Q8K)),
        ] {
            assert_eq!(Rounding::of(kind), rounding, "{kind}");
        }
    }
}
