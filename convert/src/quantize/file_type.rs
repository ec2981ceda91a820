//! The types of a whole file, which are recipes: `Q4_K_M` is mostly Q4_K, with more bits where they pay.

use std::fmt;

use super::QuantizeError;
use crate::gguf::TensorType;

macro_rules! file_types {
    ($($ident:ident = $number:literal, $default:ident, $doc:literal;)*) => {
        /// What a file is quantised to, llama.cpp's `LLAMA_FTYPE_*` (include/llama.h), as `llama-quantize` spells it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[expect(non_camel_case_types, reason = "llama.cpp's own spelling")]
        pub enum FileType {
            $(#[doc = concat!($doc, ".")] $ident = $number,)*
        }

        impl FileType {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$ident),*];

            /// The name, as llama.cpp spells it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$ident => stringify!($ident),)* }
            }

            /// What most tensors get (`llama_ftype_get_default_type`).
            pub fn default_type(self) -> TensorType {
                match self { $(Self::$ident => TensorType::$default,)* }
            }

            /// One line about it.
            pub fn about(self) -> &'static str {
                match self { $(Self::$ident => $doc,)* }
            }
        }
    };
}

file_types! {
    F32 = 0, F32, "32-bit floating point";
    F16 = 1, F16, "16-bit floating point, to 65504";
    BF16 = 32, BF16, "16-bit floating point with the range of F32";
    Q8_0 = 7, Q8_0, "8.5 bits, blocks of 32";
    Q6_K = 18, Q6_K, "6.56 bits, blocks of 256";
    Q5_K_M = 17, Q5_K, "Q5_K, with Q6_K for half of attn_v and ffn_down";
    Q5_K_S = 16, Q5_K, "Q5_K";
    Q5_1 = 9, Q5_1, "6 bits, blocks of 32";
    Q5_0 = 8, Q5_0, "5.5 bits, blocks of 32";
    Q4_K_M = 15, Q4_K, "Q4_K, with Q6_K for half of attn_v and ffn_down";
    Q4_K_S = 14, Q4_K, "Q4_K, with Q5_K for the first attn_v and ffn_down";
    Q4_1 = 3, Q4_1, "5 bits, blocks of 32";
    Q4_0 = 2, Q4_0, "4.5 bits, blocks of 32";
    IQ4_NL = 25, IQ4_NL, "4.5 bits on a curve, blocks of 32";
    IQ4_XS = 30, IQ4_XS, "4.25 bits on a curve, blocks of 256";
    Q3_K_L = 13, Q3_K, "Q3_K, with Q5_K for attn_v, attn_output and ffn_down";
    Q3_K_M = 12, Q3_K, "Q3_K, with Q4_K or Q5_K for attn_v, attn_output and ffn_down";
    Q3_K_S = 11, Q3_K, "Q3_K";
    IQ3_M = 27, IQ3_S, "IQ3_S, with Q4_K for attn_v and attn_output";
    IQ3_S = 26, IQ3_S, "3.44 bits from a codebook, blocks of 256";
    IQ3_XS = 22, IQ3_S, "IQ3_S, with IQ3_XXS for attn_q, attn_k and the middle of the feed-forward part";
    IQ3_XXS = 23, IQ3_XXS, "3.06 bits from a codebook; needs an imatrix";
    Q2_K = 10, Q2_K, "Q2_K, with Q3_K or Q4_K for attn_v, attn_output and ffn_down";
    Q2_K_S = 21, Q2_K, "Q2_K; needs an imatrix";
    IQ2_M = 29, IQ2_S, "2.56 bits from a codebook, with IQ3_S for attn_v and attn_output; needs an imatrix";
    IQ2_S = 28, IQ2_XS, "2.31 bits from a codebook, with IQ3_S for attn_v and attn_output; needs an imatrix";
    IQ2_XS = 20, IQ2_XS, "2.31 bits from a codebook; needs an imatrix";
    IQ2_XXS = 19, IQ2_XXS, "2.06 bits from a codebook; needs an imatrix";
    IQ1_M = 31, IQ1_M, "1.75 bits from a codebook; needs an imatrix";
    IQ1_S = 24, IQ1_S, "1.56 bits from a codebook; needs an imatrix";
    TQ2_0 = 37, TQ2_0, "2.06 bits, for models that were trained with ternary weights";
    TQ1_0 = 36, TQ1_0, "1.69 bits, for models that were trained with ternary weights";
    Q2_0 = 41, Q2_0, "2.25 bits, blocks of 64";
    Q1_0 = 40, Q1_0, "1.125 bits, for models that were trained with binary weights";
    MXFP4_MOE = 38, MXFP4, "MXFP4 for experts; a model without any becomes Q8_0";
}

/// Other names for the same, as in `llama-quantize`.
const ALIASES: &[(&str, FileType)] = &[
    ("Q3_K", FileType::Q3_K_M),
    ("Q4_K", FileType::Q4_K_M),
    ("Q5_K", FileType::Q5_K_M),
];

impl FileType {
    /// The recipe that a user names, in any case.
    pub fn from_name(name: &str) -> Result<Self, QuantizeError> {
        let named = |candidate: &str| candidate.eq_ignore_ascii_case(name);
        let alias = || {
            ALIASES
                .iter()
                .find(|(alias, _)| named(alias))
                .map(|(_, kind)| *kind)
        };
        let known = Self::ALL.iter().copied().find(|kind| named(kind.name()));
        known.or_else(alias).ok_or_else(|| {
            match TensorType::from_name(name).filter(|kind| super::is_target(*kind)) {
                Some(kind) => QuantizeError::NoRecipe { kind: kind.name() },
                None => QuantizeError::UnknownType {
                    name: name.to_owned(),
                },
            }
        })
    }

    /// The number in `general.file_type`.
    pub fn number(self) -> u32 {
        self as u32
    }

    /// Whether the type of most tensors is a quantised one.
    pub fn is_quantised(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }
}

impl fmt::Display for FileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_spelled_in_any_case_and_others_are_named() {
        assert_eq!(FileType::from_name("q8_0"), Ok(FileType::Q8_0));
        assert_eq!(FileType::from_name("Bf16"), Ok(FileType::BF16));
        assert_eq!(FileType::from_name("q4_k"), Ok(FileType::Q4_K_M));
        assert_eq!(FileType::from_name("mxfp4_moe"), Ok(FileType::MXFP4_MOE));
        let unknown = |name: &str| Err(QuantizeError::UnknownType { name: name.into() });
        assert_eq!(FileType::from_name("Q9_9"), unknown("Q9_9"));
        assert_eq!(FileType::from_name("Q8_K"), unknown("Q8_K"));
        let tensor_type = FileType::from_name("nvfp4");
        assert_eq!(tensor_type, Err(QuantizeError::NoRecipe { kind: "NVFP4" }));
    }

    #[test]
    fn the_numbers_are_llama_cpps() {
        for kind in FileType::ALL {
            // SAFETY: takes a number and returns a static string, for any number.
            #[expect(unsafe_code, reason = "asks the linked llama.cpp")]
            let name = unsafe { std::ffi::CStr::from_ptr(llama_cpp_sys_2::llama_ftype_name(kind.number())) };
            let theirs = name.to_str().unwrap();
            // "Q4_K - Medium", "IQ2_XXS - 2.0625 bpw", "MXFP4 MoE", "F16", "all F32"
            let ours = kind.name();
            let (family, size) = match ours.rsplit_once('_') {
                Some((family, "S")) if family.ends_with("_K") => (family, " - Small"),
                Some((family, "M")) if family.ends_with("_K") => (family, " - Medium"),
                Some((family, "L")) if family.ends_with("_K") => (family, " - Large"),
                _ => (ours, ""),
            };
            let spelled = match kind {
                FileType::F32 => "all F32".into(),
                FileType::MXFP4_MOE => "MXFP4 MoE".into(),
                FileType::IQ3_M => "IQ3_S mix - 3.66 bpw".into(),
                _ => format!("{family}{size}"),
            };
            assert!(theirs.starts_with(&spelled), "{ours} is {theirs:?} there");
        }
    }
}
