//! Rows of f32 to rows of blocks and back, by ggml's own kernels, so that the bits are llama.cpp's.
//!
//! ggml asserts where we return errors, and a failed assert ends the process: everything is checked first.

use crate::gguf::TensorType;

/// The types that are written so far.
pub const TARGETS: &[TensorType] = &[
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q8_0,
];

/// What can be wrong with rows.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum QuantizeError {
    /// No such type is known.
    #[error("{name} is no type of llama.cpp\nhint: built so far: {}", targets())]
    UnknownType {
        /// What was asked for.
        name: String,
    },
    /// The type exists and is not written yet.
    #[error("{name} is not built yet\nhint: built so far: {}", targets())]
    NotBuilt {
        /// What was asked for.
        name: String,
    },
    /// ggml cannot turn this type into numbers.
    #[error("{name} cannot be turned into numbers")]
    Opaque {
        /// The type.
        name: &'static str,
    },
    /// A row is no whole number of blocks.
    #[error("a row of {row} elements is no whole number of blocks of {kind}")]
    Row {
        /// The length of the row.
        row: usize,
        /// The type.
        kind: &'static str,
    },
    /// An element is NaN or infinite.
    #[error("element {index} is {value}\nhint: the checkpoint is damaged, or its training diverged")]
    NotFinite {
        /// Which one, counted over the rows that were given.
        index: usize,
        /// Its value.
        value: String,
    },
    /// An element is too large for the type.
    #[error("element {index} is {value}, too large for {kind}\nhint: BF16 and F32 hold it")]
    Overflow {
        /// Which one, counted over the rows that were given.
        index: usize,
        /// Its value.
        value: String,
        /// The type.
        kind: &'static str,
    },
}

impl QuantizeError {
    /// The same error, with `elements` more before the rows that were given.
    pub fn after(mut self, elements: usize) -> Self {
        if let Self::NotFinite { index, .. } | Self::Overflow { index, .. } = &mut self {
            *index += elements;
        }
        self
    }
}

fn targets() -> String {
    TARGETS
        .iter()
        .map(|kind| kind.name())
        .collect::<Vec<_>>()
        .join(", ")
}

/// Names of mixes, which are no tensor types: `llama-quantize` knows them.
const MIXES: &[&str] = &[
    "Q2_K_S",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "IQ2_M",
    "IQ3_M",
    "IQ3_XS",
    "MXFP4_MOE",
];

/// The type that a user names, in any case.
pub fn target(name: &str) -> Result<TensorType, QuantizeError> {
    let kind = TensorType::from_name(name);
    match kind {
        Some(kind) if TARGETS.contains(&kind) => Ok(kind),
        _ if kind.is_some() || MIXES.iter().any(|mix| mix.eq_ignore_ascii_case(name)) => {
            Err(QuantizeError::NotBuilt {
                name: name.to_ascii_uppercase(),
            })
        }
        _ => Err(QuantizeError::UnknownType {
            name: name.to_owned(),
        }),
    }
}

/// The largest finite f16 is 65504; from 65520 on, rounding gives infinity.
const F16_OVERFLOW: f32 = 65520.0;

/// Appends `rows` of `row` elements each to `out`, in blocks of `kind`.
pub fn quantize(kind: TensorType, rows: &[f32], row: usize, out: &mut Vec<u8>) -> Result<(), QuantizeError> {
    if !TARGETS.contains(&kind) {
        return Err(QuantizeError::NotBuilt {
            name: kind.name().into(),
        });
    }
    let bytes = whole_rows(kind, rows.len(), row)?;
    if let Some(index) = rows.iter().position(|value| !value.is_finite()) {
        return Err(QuantizeError::NotFinite {
            index,
            value: rows[index].to_string(),
        });
    }
    if kind == TensorType::F16
        && let Some(index) = rows.iter().position(|value| value.abs() >= F16_OVERFLOW)
    {
        return Err(QuantizeError::Overflow {
            index,
            value: rows[index].to_string(),
            kind: kind.name(),
        });
    }
    let start = out.len();
    out.resize(start + bytes, 0);
    if rows.is_empty() {
        return Ok(());
    }
    // SAFETY: `out` has room for exactly the bytes that these rows take in this type (`whole_rows`; the table
    // of types is tested against ggml), the rows are whole blocks of finite numbers, and none of the target
    // types needs an importance matrix.
    #[expect(unsafe_code, reason = "ggml is C")]
    let written = unsafe {
        llama_cpp_sys_2::ggml_quantize_chunk(
            kind.id() as llama_cpp_sys_2::ggml_type,
            rows.as_ptr(),
            out[start..].as_mut_ptr().cast(),
            0,
            (rows.len() / row) as i64,
            row as i64,
            std::ptr::null(),
        )
    };
    debug_assert_eq!(written, bytes);
    Ok(())
}

/// Turns rows of blocks into numbers: `out` has room for whole rows of `row` elements, `data` holds them.
pub fn dequantize(kind: TensorType, data: &[u8], row: usize, out: &mut [f32]) -> Result<(), QuantizeError> {
    let bytes = whole_rows(kind, out.len(), row)?;
    if data.len() != bytes {
        return Err(QuantizeError::Row {
            row,
            kind: kind.name(),
        });
    }
    if kind == TensorType::F32 {
        let (chunks, _) = data.as_chunks::<4>();
        for (value, bytes) in out.iter_mut().zip(chunks) {
            *value = f32::from_le_bytes(*bytes);
        }
        return Ok(());
    }
    // SAFETY: the number is one of ggml's own types (tested), for which the table always has a row.
    #[expect(unsafe_code, reason = "ggml is C")]
    let to_float =
        unsafe { (*llama_cpp_sys_2::ggml_get_type_traits(kind.id() as llama_cpp_sys_2::ggml_type)).to_float };
    let Some(to_float) = to_float else {
        return Err(QuantizeError::Opaque { name: kind.name() });
    };
    if out.is_empty() {
        return Ok(());
    }
    // SAFETY: `data` holds exactly the blocks of `out.len()` elements, a whole number of them. The blocks are
    // plain bytes read at an alignment of at most 2 (GGUF aligns tensors to 32, and rows are whole blocks of an
    // even size) or, for the odd-sized MXFP4, 1.
    #[expect(unsafe_code, reason = "ggml is C")]
    unsafe {
        to_float(data.as_ptr().cast(), out.as_mut_ptr(), out.len() as i64);
    }
    Ok(())
}

/// The bytes of whole rows.
fn whole_rows(kind: TensorType, elements: usize, row: usize) -> Result<usize, QuantizeError> {
    let error = QuantizeError::Row {
        row,
        kind: kind.name(),
    };
    if row == 0 || !elements.is_multiple_of(row) {
        return Err(error);
    }
    let bytes = kind.row_bytes(row as u64).ok_or(error)?;
    Ok(elements / row * bytes as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_spelled_in_any_case_and_others_are_named() {
        assert_eq!(target("q8_0"), Ok(TensorType::Q8_0));
        assert_eq!(target("Bf16"), Ok(TensorType::BF16));
        assert_eq!(
            target("q4_k_m"),
            Err(QuantizeError::NotBuilt {
                name: "Q4_K_M".into()
            })
        );
        assert_eq!(
            target("IQ4_NL"),
            Err(QuantizeError::NotBuilt {
                name: "IQ4_NL".into()
            })
        );
        assert_eq!(
            target("Q9_9"),
            Err(QuantizeError::UnknownType { name: "Q9_9".into() })
        );
    }

    #[test]
    fn what_ggml_would_abort_on_or_spoil_is_an_error() {
        let mut out = Vec::new();
        let rows = vec![0.5; 64];
        assert!(matches!(
            quantize(TensorType::Q8_0, &rows, 48, &mut out),
            Err(QuantizeError::Row { .. })
        ));
        assert!(matches!(
            quantize(TensorType::Q8_0, &rows, 16, &mut out),
            Err(QuantizeError::Row { .. })
        ));
        assert!(matches!(
            quantize(TensorType::Q4_K, &rows, 64, &mut out),
            Err(QuantizeError::NotBuilt { .. })
        ));
        let mut bad = rows.clone();
        bad[7] = f32::NAN;
        assert!(matches!(
            quantize(TensorType::F32, &bad, 64, &mut out),
            Err(QuantizeError::NotFinite { index: 7, .. })
        ));
        bad[7] = 70000.0;
        assert!(matches!(
            quantize(TensorType::F16, &bad, 64, &mut out),
            Err(QuantizeError::Overflow { .. })
        ));
        quantize(TensorType::BF16, &bad, 64, &mut out).unwrap();
        assert!(matches!(
            dequantize(TensorType::Q8_1, &[0; 36], 32, &mut [0.0; 32]),
            Err(QuantizeError::Opaque { .. })
        ));
    }

    #[test]
    fn q8_0_comes_back_within_half_a_step() {
        let rows: Vec<f32> = (0..256).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut blocks = Vec::new();
        quantize(TensorType::Q8_0, &rows, 64, &mut blocks).unwrap();
        let mut back = vec![0.0; 256];
        dequantize(TensorType::Q8_0, &blocks, 64, &mut back).unwrap();
        for (a, b) in rows.iter().zip(&back) {
            assert!((a - b).abs() < 0.6 / 127.0, "{a} {b}");
        }
    }
}
