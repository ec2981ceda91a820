//! The mixes: which tensors of a file get more or fewer bits than the rest.
//!
//! Source: llama.cpp, src/llama-quant.cpp, `llama_tensor_get_type_impl`, line by line in the same order. What only
//! models with experts, Falcon and GLM have there is left out: no architecture of this program is one of them.

use super::FileType::{self, *};
use super::category::Category;
use crate::gguf::TensorType as T;

/// What the mixes want to know of a model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelFacts {
    /// `general.architecture`.
    pub arch: String,
    /// `{arch}.block_count`.
    pub layers: usize,
    /// Query heads per key and value head in the first layer; 0 when that layer has no attention.
    pub gqa: usize,
    /// Whether heads share keys and values anywhere; tells Llama 2 70B from LLaMA 65B.
    pub grouped: bool,
}

impl ModelFacts {
    /// llama.cpp's `LLM_TYPE_70B` (src/models/llama.cpp and qwen2.cpp).
    fn is_70b(&self) -> bool {
        self.layers == 80 && (self.arch == "qwen2" || self.arch == "llama" && self.grouped)
    }
}

/// One file's mix. It counts the tensors that it has seen, so that their order matters.
#[derive(Debug)]
pub(super) struct Mix<'a> {
    pub(super) file: FileType,
    pub(super) facts: &'a ModelFacts,
    pub(super) has_imatrix: bool,
    /// There is no output.weight.
    pub(super) tied: bool,
    pub(super) output_type: Option<T>,
    pub(super) embedding_type: Option<T>,
    /// The number of attn_v tensors.
    pub(super) attn_v: usize,
    pub(super) seen: Seen,
}

/// How many tensors of a role came before.
#[derive(Debug, Default)]
pub(super) struct Seen {
    attn_v: usize,
    ffn_down: usize,
    ffn_gate: usize,
    ffn_up: usize,
}

/// The first eighth, the last eighth, and every third in between.
fn use_more_bits(layer: usize, layers: usize) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

/// A type, and the rule that gave it; no rule where it is the file's own type.
pub(super) type Ruled = (T, Option<&'static str>);

impl Mix<'_> {
    /// The type of a tensor with rows of `columns` elements, before its shape is looked at.
    pub(super) fn choose(&mut self, category: Category, columns: u64) -> Ruled {
        let default = self.file.default_type();
        let output = category == Category::Output || self.tied && category == Category::TokenEmbd;
        let chosen = if output {
            self.output(columns)
        } else if self.file == MXFP4_MOE {
            Some((T::Q8_0, "MXFP4_MOE: only experts are MXFP4"))
        } else if category == Category::TokenEmbd {
            self.embeddings()
        } else if matches!(self.file, IQ2_XXS | IQ2_XS | IQ1_S | IQ2_S | IQ2_M | IQ1_M) {
            self.lowest(category)
        } else {
            match category {
                Category::AttnV => self.attn_v(),
                Category::AttnK | Category::AttnQ => match self.file {
                    IQ3_XS => Some((T::IQ3_XXS, "attn_q and attn_k: fewer bits")),
                    IQ3_XXS => Some((T::IQ2_S, "attn_q and attn_k: fewer bits")),
                    _ => None,
                },
                Category::FfnDown => self.ffn_down(),
                Category::AttnOutput => self.attn_output(),
                Category::FfnGate => self.ffn_gate_or_up(category),
                Category::FfnUp => self.ffn_gate_or_up(category),
                Category::TokenEmbd | Category::Output | Category::Other => None,
            }
        };
        chosen.map_or((default, None), |(kind, rule)| {
            (kind, (kind != default).then_some(rule))
        })
    }

    /// output.weight, or the token embeddings where they are the output too.
    fn output(&self, columns: u64) -> Option<(T, &'static str)> {
        let default = self.file.default_type();
        if let Some(kind) = self.output_type {
            return Some((kind, "--output-tensor-type"));
        }
        let rule = if self.tied {
            "embeddings that are the output too"
        } else {
            "output"
        };
        let kind = if self.file == MXFP4_MOE || !columns.is_multiple_of(default.block_elements()) {
            T::Q8_0
        } else if matches!(
            self.file,
            IQ2_XXS | IQ2_XS | IQ3_XXS | IQ1_S | IQ2_S | IQ2_M | IQ1_M
        ) {
            T::Q5_K
        } else if default != T::Q8_0 {
            T::Q6_K
        } else {
            default
        };
        Some((kind, rule))
    }

    /// Embeddings that are not the output.
    fn embeddings(&self) -> Option<(T, &'static str)> {
        if let Some(kind) = self.embedding_type {
            return Some((kind, "--token-embedding-type"));
        }
        let kind = match self.file {
            IQ2_XXS | IQ2_XS | IQ1_S | IQ1_M => T::Q2_K,
            IQ2_S | IQ2_M | IQ3_XXS => T::IQ3_S,
            TQ1_0 | TQ2_0 | Q2_0 => T::Q4_K,
            _ => return None,
        };
        Some((kind, "embeddings"))
    }

    /// Files of one and two bits.
    fn lowest(&mut self, category: Category) -> Option<(T, &'static str)> {
        let two_m = matches!(self.file, IQ2_S | IQ2_M);
        match category {
            Category::AttnV => {
                self.seen.attn_v += 1;
                Some(if self.facts.gqa >= 4 {
                    (T::Q4_K, "attn_v that 4 or more heads share")
                } else if two_m {
                    (T::IQ3_S, "attn_v: more bits")
                } else {
                    (T::Q2_K, "attn_v: more bits")
                })
            }
            Category::FfnDown => {
                let early = self.seen.ffn_down < self.facts.layers / 8;
                self.seen.ffn_down += 1;
                let kind = if two_m { T::IQ3_S } else { T::Q2_K };
                early.then_some((kind, "ffn_down: more bits in the first eighth of the layers"))
            }
            Category::AttnOutput if matches!(self.file, IQ1_S | IQ1_M) => {
                Some((T::IQ2_XXS, "attn_output: more bits"))
            }
            Category::AttnOutput if two_m => Some((T::IQ3_S, "attn_output: more bits")),
            _ => None,
        }
    }

    fn attn_v(&mut self) -> Option<(T, &'static str)> {
        let layer = self.seen.attn_v;
        self.seen.attn_v += 1;
        let shared = self.facts.gqa >= 4;
        const SHARED: &str = "attn_v that 4 or more heads share";
        const MORE: &str = "attn_v: more bits";
        let chosen = match self.file {
            Q2_K if shared => Some((T::Q4_K, SHARED)),
            Q2_K => Some((T::Q3_K, MORE)),
            Q2_K_S if shared => Some((T::Q4_K, SHARED)),
            IQ3_XXS if shared => Some((T::Q4_K, SHARED)),
            IQ3_XXS if !self.has_imatrix => Some((T::IQ3_S, "attn_v: more bits without an imatrix")),
            IQ3_XS | IQ3_S if shared => Some((T::Q4_K, SHARED)),
            IQ3_M => Some((T::Q4_K, MORE)),
            Q3_K_M if layer < 2 => Some((T::Q5_K, "attn_v: more bits in the first 2 layers")),
            Q3_K_M => Some((T::Q4_K, MORE)),
            Q3_K_L => Some((T::Q5_K, MORE)),
            IQ4_NL | IQ4_XS if shared => Some((T::Q5_K, SHARED)),
            Q4_K_M | Q5_K_M if use_more_bits(layer, self.attn_v) => {
                Some((T::Q6_K, "attn_v: more bits in half of the layers"))
            }
            Q4_K_S if layer < 4 => Some((T::Q5_K, "attn_v: more bits in the first 4 layers")),
            _ => None,
        };
        let kind = chosen.map_or(self.file.default_type(), |(kind, _)| kind);
        if self.facts.is_70b() && matches!(kind, T::Q3_K | T::Q4_K) {
            return Some((T::Q5_K, "attn_v that 8 heads share in a model of 70B"));
        }
        chosen
    }

    fn ffn_down(&mut self) -> Option<(T, &'static str)> {
        let (layer, layers) = (self.seen.ffn_down, self.facts.layers);
        self.seen.ffn_down += 1;
        const MORE: &str = "ffn_down: more bits";
        const FIRST: &str = "ffn_down: more bits in the first eighth of the layers";
        const HALF: &str = "ffn_down: more bits in half of the layers";
        let first = layer < layers / 8;
        match self.file {
            Q2_K => Some((T::Q3_K, MORE)),
            Q2_K_S if first => Some((T::Q4_K, FIRST)),
            IQ3_XXS if !self.has_imatrix && first => Some((T::Q4_K, FIRST)),
            IQ3_XXS if !self.has_imatrix => Some((T::Q3_K, "ffn_down: more bits without an imatrix")),
            Q3_K_M if layer < layers / 16 => Some((
                T::Q5_K,
                "ffn_down: more bits in the first sixteenth of the layers",
            )),
            Q3_K_M => Some((T::Q4_K, MORE)),
            IQ3_M if first => Some((T::Q4_K, FIRST)),
            Q3_K_L => Some((T::Q5_K, MORE)),
            Q4_K_M | Q5_K_M if use_more_bits(layer, layers) => Some((T::Q6_K, HALF)),
            IQ4_NL | IQ4_XS if first && !self.has_imatrix => Some((T::Q5_K, FIRST)),
            Q4_K_S if first => Some((T::Q5_K, FIRST)),
            Q4_0 if first && self.has_imatrix => Some((T::Q4_1, FIRST)),
            Q5_0 if first && self.has_imatrix => Some((T::Q5_1, FIRST)),
            _ => None,
        }
    }

    fn attn_output(&self) -> Option<(T, &'static str)> {
        let kind = match self.file {
            Q2_K => T::Q3_K,
            IQ3_XXS => T::IQ3_S,
            Q3_K_M | IQ3_M => T::Q4_K,
            Q3_K_L => T::Q5_K,
            _ => return None,
        };
        Some((kind, "attn_output: more bits"))
    }

    fn ffn_gate_or_up(&mut self, category: Category) -> Option<(T, &'static str)> {
        let seen = match category {
            Category::FfnGate => &mut self.seen.ffn_gate,
            _ => &mut self.seen.ffn_up,
        };
        let (layer, layers) = (*seen, self.facts.layers);
        *seen += 1;
        let middle = layer >= layers / 8 && layer < 7 * layers / 8;
        (self.file == IQ3_XS && middle).then_some((
            T::IQ3_XXS,
            "ffn_gate and ffn_up: fewer bits in the middle of the layers",
        ))
    }
}
