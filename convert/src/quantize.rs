//! Rows of f32 to rows of blocks and back, by ggml's own kernels, so that the bits are llama.cpp's.
//!
//! ggml asserts where we return errors, and a failed assert ends the process: everything is checked first. Which
//! tensor gets which type is the matter of [`Recipe`].

mod category;
mod file_type;
mod importance;
mod mix;
mod recipe;
mod repack;

pub use file_type::FileType;
pub use importance::Importance;
pub use mix::ModelFacts;
pub use recipe::{Candidate, Choice, Recipe, TypeOverride, tensor_type};
pub use repack::Repack;

use crate::gguf::TensorType;

/// What can be wrong with rows.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum QuantizeError {
    /// No such recipe is known.
    #[error("{name} is no type of llama-quantize\nhint: it knows {}", names(FileType::ALL.iter().map(|file| file.name())))]
    UnknownType {
        /// What was asked for.
        name: String,
    },
    /// A type of tensors, which llama-quantize does not make files of.
    #[error(
        "{kind} is a type of single tensors, not of files\nhint: -t Q8_0 --tensor-type '.*={kind}' gives it to all of them"
    )]
    NoRecipe {
        /// The type.
        kind: &'static str,
    },
    /// No such tensor type is known.
    #[error("{name} is no type of tensors\nhint: ggml quantises to {}", names(targets()))]
    UnknownTensorType {
        /// What was asked for.
        name: String,
    },
    /// ggml has the type for other purposes than weights.
    #[error("{name} is no type for weights\nhint: ggml quantises to {}", names(targets()))]
    NoTarget {
        /// What was asked for.
        name: &'static str,
    },
    /// A type for single tensors cannot be used.
    #[error("--tensor-type {text}: {why}")]
    Override {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// The rows are no whole blocks, and llama.cpp has no smaller type to take instead.
    #[error(
        "tensor {tensor} has rows of {columns} elements, no whole number of {kind} blocks, and llama.cpp knows no fallback\nhint: give it a type of its own with --tensor-type"
    )]
    NoFallback {
        /// The tensor.
        tensor: String,
        /// The length of a row.
        columns: u64,
        /// The type.
        kind: &'static str,
    },
    /// The kernel works only with an importance matrix.
    #[error(
        "it becomes {kind}, which needs an importance matrix\nhint: pipit-convert imatrix makes one, --imatrix F uses it"
    )]
    NeedsImatrix {
        /// The type.
        kind: &'static str,
    },
    /// The importance matrix has no weights for a tensor that needs them.
    #[error(
        "it becomes {kind}, which needs an importance matrix, and the one that was given has nothing for this tensor\nhint: was it made with this model? --tensor-type gives the tensor another type"
    )]
    NotInImatrix {
        /// The type.
        kind: &'static str,
    },
    /// The importance matrix cannot be used for this tensor.
    #[error("its importance matrix {why}")]
    Importance {
        /// What is wrong with it.
        why: String,
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
    /// Blocks of a quantised file hold NaN or infinity.
    #[error("its {kind} blocks hold NaN or infinity\nhint: the file is damaged, or its training diverged")]
    Blocks {
        /// The type.
        kind: &'static str,
    },
    /// An element is too large for the type.
    #[error(
        "element {index} is {value}, too large for {kind}\nhint: BF16 and F32 hold it; --tensor-type gives one tensor another type"
    )]
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

fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

fn targets() -> impl Iterator<Item = &'static str> {
    let all = TensorType::ALL.iter().copied();
    all.filter(|kind| is_target(*kind)).map(TensorType::name)
}

/// Whether weights can be written in this type (the cases of `ggml_quantize_chunk`).
pub fn is_target(kind: TensorType) -> bool {
    use TensorType as T;
    !matches!(
        kind,
        T::Q8_1 | T::Q8_K | T::I8 | T::I16 | T::I32 | T::I64 | T::F64
    )
}

/// The largest finite f16 is 65504; from 65520 on, rounding gives infinity.
const F16_OVERFLOW: f32 = 65520.0;

/// No block with an f16 scale holds more than this: 65504 · 128 · 32 is the most that Q6_K can say. The kernels that
/// search a codebook abort on the infinities that they would get from much larger values.
const BLOCK_OVERFLOW: f32 = (1u32 << 28) as f32;

/// The most that a sum over a row of weight · x³ may come to, so that no kernel gets infinities: less than f32's
/// largest by a factor of 2⁸, the length of a block.
const IMPORTANCE_OVERFLOW: f32 = 1e36;

/// Appends `rows` of `row` elements each to `out`, in blocks of `kind`.
///
/// `importance` has the weight of every column (llama.cpp's importance matrix), one row long. Without it the kernels
/// weigh by magnitude. F32, F16, BF16, the ternary types and MXFP4 do not look at it.
pub fn quantize(
    kind: TensorType,
    rows: &[f32],
    row: usize,
    importance: Option<&[f32]>,
    out: &mut Vec<u8>,
) -> Result<(), QuantizeError> {
    if !is_target(kind) {
        return Err(QuantizeError::NoTarget { name: kind.name() });
    }
    let bytes = whole_rows(kind, rows.len(), row)?;
    let largest = largest(rows)?;
    let overflow = || {
        let index = rows.iter().position(|value| value.abs() == largest).unwrap_or(0);
        QuantizeError::Overflow {
            index,
            value: rows[index].to_string(),
            kind: kind.name(),
        }
    };
    let limit = match kind {
        TensorType::F16 => F16_OVERFLOW,
        TensorType::F32 | TensorType::BF16 | TensorType::MXFP4 => f32::INFINITY,
        _ => BLOCK_OVERFLOW,
    };
    if largest >= limit {
        return Err(overflow());
    }
    match importance {
        Some(importance) => check_importance(importance, row, largest)?,
        None if matches!(kind, TensorType::IQ2_XXS | TensorType::IQ2_XS | TensorType::IQ1_S) => {
            return Err(QuantizeError::NeedsImatrix { kind: kind.name() });
        }
        None => {}
    }
    if rows.is_empty() {
        return Ok(());
    }
    let start = out.len();
    out.resize(start + bytes, 0);
    let id = kind.id() as llama_cpp_sys_2::ggml_type;
    // SAFETY: `out` has room for exactly the bytes that these rows take in this type (`whole_rows`; the table
    // of types is tested against ggml), the rows are whole blocks of finite numbers, and the importance is a row
    // long, or null where the kernel can do without.
    #[expect(unsafe_code, reason = "ggml is C")]
    let written = unsafe {
        llama_cpp_sys_2::ggml_quantize_chunk(
            id,
            rows.as_ptr(),
            out[start..].as_mut_ptr().cast(),
            0,
            (rows.len() / row) as i64,
            row as i64,
            importance.map_or(std::ptr::null(), <[f32]>::as_ptr),
        )
    };
    debug_assert_eq!(written, bytes);
    check_blocks(kind, &out[start..]).map_err(|_| overflow())
}

/// Checks that whole blocks hold finite numbers, as llama.cpp does before it uses a file.
pub fn check_blocks(kind: TensorType, blocks: &[u8]) -> Result<(), QuantizeError> {
    // SAFETY: reads the bytes as blocks of a type that ggml knows, at any alignment, and only whole ones: it
    // checks the length first.
    #[expect(unsafe_code, reason = "ggml is C")]
    let valid = unsafe {
        let id = kind.id() as llama_cpp_sys_2::ggml_type;
        llama_cpp_sys_2::ggml_validate_row_data(id, blocks.as_ptr().cast(), blocks.len())
    };
    if valid {
        return Ok(());
    }
    Err(QuantizeError::Blocks { kind: kind.name() })
}

/// The largest magnitude. An element that is not finite is an error.
fn largest(rows: &[f32]) -> Result<f32, QuantizeError> {
    let mut largest = 0.0f32;
    for (at, chunk) in rows.chunks(1024).enumerate() {
        // NaN compares false with everything, so both ways of being not finite leave `finite` false.
        let mut finite = true;
        for value in chunk {
            let size = value.abs();
            finite &= size < f32::INFINITY;
            largest = if size > largest { size } else { largest };
        }
        if !finite && let Some(within) = chunk.iter().position(|value| !value.is_finite()) {
            return Err(QuantizeError::NotFinite {
                index: at * 1024 + within,
                value: chunk[within].to_string(),
            });
        }
    }
    Ok(largest)
}

fn check_importance(importance: &[f32], row: usize, largest: f32) -> Result<(), QuantizeError> {
    let bad = |why: String| Err(QuantizeError::Importance { why });
    if importance.len() != row {
        return bad(format!("has {} columns, the tensor {row}", importance.len()));
    }
    if let Some(at) = importance
        .iter()
        .position(|weight| !(weight.is_finite() && *weight >= 0.0))
    {
        return bad(format!("has {} at column {at}", importance[at]));
    }
    let most = importance.iter().copied().fold(0.0, f32::max);
    if most * largest.max(1.0).powi(3) > IMPORTANCE_OVERFLOW {
        return bad(format!("has {most:e}, too much for weights of {largest:e}"));
    }
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
    fn what_ggml_would_abort_on_or_spoil_is_an_error() {
        let mut out = Vec::new();
        let rows = vec![0.5; 64];
        assert!(matches!(
            quantize(TensorType::Q8_0, &rows, 48, None, &mut out),
            Err(QuantizeError::Row { .. })
        ));
        assert!(matches!(
            quantize(TensorType::Q8_0, &rows, 16, None, &mut out),
            Err(QuantizeError::Row { .. })
        ));
        assert!(matches!(
            quantize(TensorType::Q8_K, &rows, 64, None, &mut out),
            Err(QuantizeError::NoTarget { .. })
        ));
        let mut bad = rows.clone();
        bad[7] = f32::NAN;
        assert!(matches!(
            quantize(TensorType::F32, &bad, 64, None, &mut out),
            Err(QuantizeError::NotFinite { index: 7, .. })
        ));
        bad[7] = 70000.0;
        assert!(matches!(
            quantize(TensorType::F16, &bad, 64, None, &mut out),
            Err(QuantizeError::Overflow { .. })
        ));
        quantize(TensorType::BF16, &bad, 64, None, &mut out).unwrap();
        assert!(matches!(
            dequantize(TensorType::Q8_1, &[0; 36], 32, &mut [0.0; 32]),
            Err(QuantizeError::Opaque { .. })
        ));
    }

    #[test]
    fn q8_0_comes_back_within_half_a_step() {
        let rows: Vec<f32> = (0..256).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut blocks = Vec::new();
        quantize(TensorType::Q8_0, &rows, 64, None, &mut blocks).unwrap();
        let mut back = vec![0.0; 256];
        dequantize(TensorType::Q8_0, &blocks, 64, &mut back).unwrap();
        for (a, b) in rows.iter().zip(&back) {
            assert!((a - b).abs() < 0.6 / 127.0, "{a} {b}");
        }
    }
}
