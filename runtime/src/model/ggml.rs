//! Numbers of ggml and their names: types of tensors (ggml/src/ggml.c, type_traits) and of files (include/llama.h,
//! llama_ftype).

/// A type of tensors, as its number in a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgmlType(pub u32);

impl GgmlType {
    /// 32-bit floats.
    pub const F32: Self = Self(0);
    /// 16-bit floats.
    pub const F16: Self = Self(1);

    /// Elements and bytes of a block. A type that is not known here counts as nothing.
    pub fn block(self) -> (u64, u64) {
        match self.0 {
            0 | 26 => (1, 4),
            1 | 25 | 30 => (1, 2),
            2 | 20 => (32, 18),
            3 => (32, 20),
            6 => (32, 22),
            7 => (32, 24),
            8 => (32, 34),
            9 => (32, 36),
            10 => (256, 84),
            11 | 21 => (256, 110),
            12 => (256, 144),
            13 => (256, 176),
            14 => (256, 210),
            15 => (256, 292),
            16 | 35 => (256, 66),
            17 => (256, 74),
            18 => (256, 98),
            19 => (256, 50),
            22 => (256, 82),
            23 => (256, 136),
            24 => (1, 1),
            27 | 28 => (1, 8),
            29 => (256, 56),
            34 => (256, 54),
            39 => (32, 17),
            _ => (1, 0),
        }
    }

    /// Bytes of a number of elements, whole blocks of them.
    pub fn bytes(self, elements: u64) -> u64 {
        let (block, bytes) = self.block();
        (elements / block).saturating_mul(bytes)
    }

    /// The type of a KV cache by the name that llama.cpp's tools and our configuration give it.
    pub fn of_cache(name: &str) -> Option<Self> {
        Some(Self(match name {
            "f32" => 0,
            "f16" => 1,
            "bf16" => 30,
            "q4_0" => 2,
            "q4_1" => 3,
            "q5_0" => 6,
            "q5_1" => 7,
            "q8_0" => 8,
            "iq4_nl" => 20,
            _ => return None,
        }))
    }
}

/// Name of a `llama_ftype`.
pub(super) fn file_type(number: u64) -> String {
    let name = match number {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4",
        other => return format!("file type {other}"),
    };
    name.to_owned()
}
