//! Weights: read from the mapped file as they are, or copied by ggml into an order that suits the CPU's kernels.
//!
//! Source: llama.cpp src/llama-model-loader.cpp (create_tensor: the first kind of buffer that supports what is done
//! with a tensor), ggml/src/ggml-cpu/repack.cpp (ggml_repack_get_optimal_repack_type) and amx/amx.cpp.

use crate::model::{Header, Tensor};

/// The kernels that have an order of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repack {
    avx2: bool,
    avx512: bool,
    amx: bool,
    dotprod: bool,
    i8mm: bool,
}

impl Repack {
    /// Those that `built_in` says were compiled; it is asked for macros of the C compiler.
    pub fn of(built_in: impl Fn(&str) -> bool) -> Self {
        let repack = built_in("GGML_USE_CPU_REPACK");
        Self {
            avx2: repack && built_in("__AVX2__"),
            avx512: repack && built_in("__AVX512F__"),
            amx: built_in("__AMX_INT8__") && built_in("__AVX512VNNI__"),
            dotprod: repack && built_in("__ARM_FEATURE_DOTPROD"),
            i8mm: repack && built_in("__ARM_FEATURE_MATMUL_INT8"),
        }
    }

    /// Whether a matrix of this type and size gets another order.
    fn copies(self, tensor: &Tensor) -> bool {
        let [columns, rows, ..] = tensor.shape;
        let arm = self.dotprod || self.i8mm;
        let amx = self.amx
            && tensor.dimensions() == 2
            && rows % 32 == 0
            && match tensor.kind.0 {
                2 | 3 | 8 => columns % 32 == 0,
                12 | 13 | 14 | 23 => columns % 256 == 0,
                _ => false,
            };
        amx || match tensor.kind.0 {
            // Q4_0
            2 => self.avx2 && rows % 8 == 0 || arm && rows % 4 == 0,
            // Q4_K
            12 => (self.avx2 || arm) && rows % 8 == 0,
            // Q2_K
            10 => self.avx512 && rows % 8 == 0,
            // Q5_K and Q6_K
            13 | 14 => arm && rows % 8 == 0,
            // IQ4_NL and MXFP4
            20 | 39 => self.avx2 && rows % 8 == 0 || self.dotprod && rows % 4 == 0,
            // Q8_0
            8 => arm && rows % 4 == 0,
            _ => false,
        }
    }
}

/// Bytes of the weights.
pub(super) struct Weights {
    /// Used where the file is mapped.
    pub(super) mapped: u64,
    /// Used from a copy.
    pub(super) copied: u64,
    /// Tensors with a copy instead of their place in the file.
    pub(super) copies: usize,
    /// Bytes of the file that only the copying reads.
    pub(super) read_once: u64,
}

pub(super) fn weights(header: &Header, repack: Repack) -> Weights {
    let mut weights = Weights {
        mapped: 0,
        copied: 0,
        copies: 0,
        read_once: 0,
    };
    let tied = !header.tensors.iter().any(|tensor| tensor.name == "output.weight");
    for tensor in &header.tensors {
        let bytes = tensor.bytes;
        if multiplied(tensor) && repack.copies(tensor) {
            weights.copied = weights.copied.saturating_add(bytes);
            weights.copies += 1;
            weights.read_once = weights.read_once.saturating_add(bytes);
            continue;
        }
        weights.mapped = weights.mapped.saturating_add(bytes);
        // Rows are looked up in the file, and the same matrix makes the logits from a copy.
        if tied && tensor.name == "token_embd.weight" && repack.copies(tensor) {
            weights.copied = weights.copied.saturating_add(bytes);
        }
    }
    weights
}

/// Whether a tensor is only ever multiplied with: a matrix, or the matrices of experts.
fn multiplied(tensor: &Tensor) -> bool {
    let looked_up = [
        "token_embd",
        "per_layer_token_embd",
        "position_embd",
        "token_types",
    ];
    let name = tensor.name.strip_suffix(".weight").unwrap_or_default();
    match tensor.dimensions() {
        2 => {
            !name.is_empty()
                && !looked_up.contains(&name)
                && !name.ends_with("_conv1d")
                && !name.ends_with(".conv")
        }
        3 => name.ends_with("_exps") || name.ends_with("_chexps"),
        _ => false,
    }
}
