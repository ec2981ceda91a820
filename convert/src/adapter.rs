//! A PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

mod patterns;
mod peft;
mod to_gguf;
mod weights;

use std::collections::BTreeMap;

pub use patterns::{CompiledPatterns, PatternError, Patterns};
pub use peft::{AdapterError, PeftAdapter};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
pub use to_gguf::{GgufAdapter, GgufAdapterError};
pub use weights::{LoraModule, TokenRows};

/// `adapter_config.json` of a LoRA adapter, spelled as PEFT's `LoraConfig` spells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// Always `LORA` here.
    pub peft_type: String,
    /// `CAUSAL_LM` for language models.
    #[serde(default)]
    pub task_type: Option<String>,
    /// The checkpoint that the adapter was trained on.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// The rank: the inner dimension of `lora_b · lora_a`.
    pub r: usize,
    /// The scale is `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.
    pub lora_alpha: f64,
    /// The chance with which an input of `lora_a` is dropped while training.
    #[serde(default)]
    pub lora_dropout: f64,
    /// The modules that have an adapter: a list of name endings, or one regular expression.
    #[serde(default)]
    pub target_modules: Option<TargetModules>,
    /// Which biases are trained: `none`, `all` or `lora_only`.
    #[serde(default = "bias_none")]
    pub bias: String,
    /// Whether the weights are stored transposed (GPT-2's Conv1D).
    #[serde(default)]
    pub fan_in_fan_out: bool,
    /// Rank-stabilised scale, <https://arxiv.org/abs/2312.03732>.
    #[serde(default)]
    pub use_rslora: bool,
    /// Weight-decomposed LoRA, <https://arxiv.org/abs/2402.09353>.
    #[serde(default)]
    pub use_dora: bool,
    /// Ranks that differ from `r`, by a regular expression on the module's name.
    #[serde(default, deserialize_with = "null_is_default")]
    pub rank_pattern: Patterns<usize>,
    /// Alphas that differ from `lora_alpha`, by a regular expression on the module's name.
    #[serde(default, deserialize_with = "null_is_default")]
    pub alpha_pattern: Patterns<f64>,
    /// Modules that are trained and stored whole.
    #[serde(default)]
    pub modules_to_save: Option<Vec<String>>,
    /// Whether the adapter was saved for inference.
    #[serde(default)]
    pub inference_mode: bool,
    /// Every other field, kept as it stands.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// `target_modules`: name endings, or one regular expression that must match the whole name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Each entry matches a module of that name, or one whose name ends in `.` and the entry.
    Names(Vec<String>),
    /// `all-linear`, or a regular expression.
    Pattern(String),
}

fn bias_none() -> String {
    "none".to_owned()
}

fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}
