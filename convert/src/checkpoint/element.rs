//! Elements on disk to f32, exactly: every type that is read here is a subset of f32.

use half::{bf16, f16};
use safetensors::Dtype;

/// The types whose elements are numbers as they stand.
const PLAIN: [Dtype; 5] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::F8_E4M3,
    Dtype::F8_E5M2,
];

/// Whether elements of this type can be read. Eight-bit integers are numbers only together with a scale.
pub(super) fn readable(dtype: Dtype, scaled: bool) -> bool {
    PLAIN.contains(&dtype) || (scaled && dtype == Dtype::I8)
}

/// Reads `out.len()` elements from number `start` on.
///
/// # Panics
/// When the range leaves the bytes. The type must be [`readable`].
pub(super) fn read(dtype: Dtype, bytes: &[u8], start: usize, out: &mut [f32]) {
    match dtype {
        Dtype::F32 => convert(bytes, start, out, f32::from_le_bytes),
        Dtype::F16 => convert(bytes, start, out, |raw| f16::from_le_bytes(raw).to_f32()),
        Dtype::BF16 => convert(bytes, start, out, |raw| bf16::from_le_bytes(raw).to_f32()),
        Dtype::F8_E4M3 => convert(bytes, start, out, |[raw]| E4M3[usize::from(raw)]),
        // Five bits of exponent and two of mantissa: the upper half of an f16.
        Dtype::F8_E5M2 => convert(bytes, start, out, |[raw]| {
            f16::from_bits(u16::from(raw) << 8).to_f32()
        }),
        _ => convert(bytes, start, out, |raw| f32::from(i8::from_le_bytes(raw))),
    }
}

fn convert<const N: usize>(bytes: &[u8], start: usize, out: &mut [f32], from: impl Fn([u8; N]) -> f32) {
    let (chunks, _) = bytes[start * N..(start + out.len()) * N].as_chunks::<N>();
    for (value, raw) in out.iter_mut().zip(chunks) {
        *value = from(*raw);
    }
}

/// OCP's E4M3 (`torch.float8_e4m3fn`): a sign, four bits of exponent with bias 7, three of mantissa, no infinity,
/// and NaN where all seven bits are set. Source: OCP 8-bit Floating Point Specification 1.0, table 1.
const E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut bits = 0;
    while bits < 256 {
        let (exponent, mantissa) = ((bits >> 3) & 15, (bits & 7) as f32);
        let size = if bits & 127 == 127 {
            f32::NAN
        } else if exponent == 0 {
            mantissa / 512.0
        } else {
            (8.0 + mantissa) * (1u32 << exponent) as f32 / 1024.0
        };
        table[bits] = if bits >= 128 { -size } else { size };
        bits += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    fn one(dtype: Dtype, bits: u8) -> f32 {
        let mut out = [0.0];
        read(dtype, &[bits], 0, &mut out);
        out[0]
    }

    #[test]
    fn eight_bits_are_the_numbers_of_the_specification() {
        for (bits, value) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7e, 448.0),
            (0xb8, -1.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(one(Dtype::F8_E4M3, bits), value, "{bits:#x}");
        }
        assert!(one(Dtype::F8_E4M3, 0x7f).is_nan() && one(Dtype::F8_E4M3, 0xff).is_nan());
        assert!(one(Dtype::F8_E4M3, 0x80).is_sign_negative());
        for (bits, value) in [
            (0x01, 0.000_015_258_789),
            (0x3c, 1.0),
            (0x7b, 57344.0),
            (0x7c, f32::INFINITY),
            (0xbc, -1.0),
        ] {
            assert_eq!(one(Dtype::F8_E5M2, bits), value, "{bits:#x}");
        }
        assert!(one(Dtype::F8_E5M2, 0x7d).is_nan());
        assert_eq!(one(Dtype::I8, 0x80), -128.0);
    }
}
