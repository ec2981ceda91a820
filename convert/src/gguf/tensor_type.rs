//! The types of tensors: how many elements make a block, and how many bytes a block takes.

use std::fmt;

/// A type that a tensor in a GGUF file can have.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorType(&'static Row);

#[derive(PartialEq, Eq, Hash)]
struct Row {
    id: u32,
    name: &'static str,
    block: u32,
    bytes: u32,
}

macro_rules! tensor_types {
    ($($ident:ident = $id:literal, $name:literal, $block:literal, $bytes:literal;)*) => {
        impl TensorType {
            $(
                #[doc = concat!("`", $name, "`: blocks of ", $block, " in ", $bytes, " bytes.")]
                pub const $ident: Self =
                    Self(&Row { id: $id, name: $name, block: $block, bytes: $bytes });
            )*
            /// All types, by their number in the file.
            pub const ALL: &[Self] = &[$(Self::$ident),*];
        }
    };
}

// ggml/src/ggml.c, type_traits; the test below compares the table with the ggml that is linked.
tensor_types! {
    F32 = 0, "F32", 1, 4;
    F16 = 1, "F16", 1, 2;
    Q4_0 = 2, "Q4_0", 32, 18;
    Q4_1 = 3, "Q4_1", 32, 20;
    Q5_0 = 6, "Q5_0", 32, 22;
    Q5_1 = 7, "Q5_1", 32, 24;
    Q8_0 = 8, "Q8_0", 32, 34;
    Q8_1 = 9, "Q8_1", 32, 36;
    Q2_K = 10, "Q2_K", 256, 84;
    Q3_K = 11, "Q3_K", 256, 110;
    Q4_K = 12, "Q4_K", 256, 144;
    Q5_K = 13, "Q5_K", 256, 176;
    Q6_K = 14, "Q6_K", 256, 210;
    Q8_K = 15, "Q8_K", 256, 292;
    IQ2_XXS = 16, "IQ2_XXS", 256, 66;
    IQ2_XS = 17, "IQ2_XS", 256, 74;
    IQ3_XXS = 18, "IQ3_XXS", 256, 98;
    IQ1_S = 19, "IQ1_S", 256, 50;
    IQ4_NL = 20, "IQ4_NL", 32, 18;
    IQ3_S = 21, "IQ3_S", 256, 110;
    IQ2_S = 22, "IQ2_S", 256, 82;
    IQ4_XS = 23, "IQ4_XS", 256, 136;
    I8 = 24, "I8", 1, 1;
    I16 = 25, "I16", 1, 2;
    I32 = 26, "I32", 1, 4;
    I64 = 27, "I64", 1, 8;
    F64 = 28, "F64", 1, 8;
    IQ1_M = 29, "IQ1_M", 256, 56;
    BF16 = 30, "BF16", 1, 2;
    TQ1_0 = 34, "TQ1_0", 256, 54;
    TQ2_0 = 35, "TQ2_0", 256, 66;
    MXFP4 = 39, "MXFP4", 32, 17;
    NVFP4 = 40, "NVFP4", 64, 36;
    Q1_0 = 41, "Q1_0", 128, 18;
    Q2_0 = 42, "Q2_0", 64, 18;
}

impl TensorType {
    /// The type with this number.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.id() == id)
    }

    /// The type with this name, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|kind| kind.name().eq_ignore_ascii_case(name))
    }

    /// The number that stands for the type in a file, ggml's `ggml_type`.
    pub fn id(self) -> u32 {
        self.0.id
    }

    /// The name, as llama.cpp spells it.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// The number of elements in a block. A row is a whole number of blocks.
    pub fn block_elements(self) -> u64 {
        self.0.block.into()
    }

    /// The number of bytes of a block.
    pub fn block_bytes(self) -> u64 {
        self.0.bytes.into()
    }

    /// The bytes of a row of `elements`; nothing when that is no whole number of blocks, or too many.
    pub fn row_bytes(self, elements: u64) -> Option<u64> {
        let block = self.block_elements();
        elements
            .is_multiple_of(block)
            .then(|| (elements / block).checked_mul(self.block_bytes()))?
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_ggmls() {
        for id in 0..llama_cpp_sys_2::GGML_TYPE_COUNT {
            // SAFETY: every number below GGML_TYPE_COUNT is a valid index of ggml's own table.
            #[expect(unsafe_code, reason = "asks the linked ggml")]
            let (block, bytes) = unsafe {
                (
                    llama_cpp_sys_2::ggml_blck_size(id),
                    llama_cpp_sys_2::ggml_type_size(id),
                )
            };
            let ours = TensorType::from_id(id).map(|kind| (kind.block_elements(), kind.block_bytes()));
            assert_eq!(
                ours,
                (block > 0).then_some((block as u64, bytes as u64)),
                "type {id}"
            );
        }
    }
}
