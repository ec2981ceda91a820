//! `--method`, and the options that go with it.

use serde::{Deserialize, Serialize};

/// How weights are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Every weight.
    Full,
    /// Low-rank adapters on frozen weights.
    Lora,
    /// The same on weights of four bits: NF4, or the blocks of a GGUF file.
    Qlora,
    /// Embeddings before every sequence.
    Prompt,
    /// Keys and values before those of every block.
    Prefix,
}

impl Method {
    /// Whether an option that says what an adapter looks like is for this method.
    pub(super) fn takes(self, key: &str) -> bool {
        match self {
            Self::Full => false,
            Self::Lora => LORA.contains(&key),
            Self::Qlora => LORA.contains(&key) || QLORA.contains(&key),
            Self::Prompt => PROMPT.contains(&key),
            Self::Prefix => PREFIX.contains(&key),
        }
    }

    /// As `--method` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Lora => "lora",
            Self::Qlora => "qlora",
            Self::Prompt => "prompt",
            Self::Prefix => "prefix",
        }
    }
}

/// The options that say what an adapter looks like, by method.
const LORA: [&str; 16] = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "bias",
    "lora_bias",
    "modules_to_save",
    "adapter",
];
const QLORA: [&str; 2] = ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant"];
const PROMPT: [&str; 4] = [
    "num_virtual_tokens",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "adapter",
];
const PREFIX: [&str; 4] = [
    "num_virtual_tokens",
    "prefix_projection",
    "encoder_hidden_size",
    "adapter",
];

/// Whether an option says what an adapter looks like.
pub(super) fn is_of_adapters(key: &str) -> bool {
    [&LORA[..], &QLORA, &PROMPT, &PREFIX]
        .iter()
        .any(|keys| keys.contains(&key))
}
