//! Which tensors llama.cpp rearranges for ARM's dot products when it loads a model.
//!
//! Source: ggml/src/ggml-cpu/repack.cpp, `ggml_repack_get_optimal_repack_type`, for a core with dotprod and without
//! i8mm (Cortex-A55, A76, A78). Cores without dotprod (A53, A72) use none of it. A rearranged tensor is a copy in
//! memory, not a view of the file, and is multiplied several rows at a time.

use super::category::{self, Category};
use crate::gguf::TensorType;

/// What becomes of a tensor on a core with dotprod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Repack {
    /// It is rearranged.
    Yes,
    /// It is used as it stands in the file.
    No,
    /// Rows are looked up in it as it stands, and it is rearranged into a second copy for the output.
    Copy,
}

impl Repack {
    /// Whether the tensor is rearranged; nothing for tensors that no matrix is multiplied with.
    pub fn of(name: &str, dimensions: &[u64], kind: TensorType, tied: bool) -> Option<Self> {
        let &[_, rows] = dimensions else { return None };
        if category::kept(name, dimensions).is_some() {
            return None;
        }
        let rearranged = rows_at_a_time(kind).is_some_and(|n| rows.is_multiple_of(n));
        match Category::of(name) {
            Category::TokenEmbd if !tied || name != "token_embd.weight" => None,
            Category::TokenEmbd if rearranged => Some(Self::Copy),
            _ if rearranged => Some(Self::Yes),
            _ => Some(Self::No),
        }
    }
}

/// The number of rows that are rearranged together. They must divide the number of rows of the tensor.
fn rows_at_a_time(kind: TensorType) -> Option<u64> {
    use TensorType as T;
    match kind {
        T::Q4_0 | T::IQ4_NL | T::MXFP4 | T::Q8_0 | T::Q1_0 => Some(4),
        T::Q4_K | T::Q5_K | T::Q6_K => Some(8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_types_and_shapes_of_the_kernels() {
        let of = |name, rows, kind| Repack::of(name, &[256, rows], kind, true);
        assert_eq!(of("blk.0.attn_q.weight", 64, TensorType::Q4_K), Some(Repack::Yes));
        assert_eq!(of("blk.0.attn_q.weight", 60, TensorType::Q4_K), Some(Repack::No));
        assert_eq!(of("blk.0.attn_q.weight", 60, TensorType::Q4_0), Some(Repack::Yes));
        assert_eq!(of("blk.0.attn_q.weight", 64, TensorType::Q5_0), Some(Repack::No));
        assert_eq!(of("blk.0.attn_q_norm.weight", 64, TensorType::F32), None);
        assert_eq!(of("token_embd.weight", 64, TensorType::Q8_0), Some(Repack::Copy));
        let untied = Repack::of("token_embd.weight", &[256, 64], TensorType::Q8_0, false);
        assert_eq!(untied, None);
    }
}
