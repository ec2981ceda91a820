//! Prompt tuning and prefix tuning as PEFT has them: what `adapter_config.json` says, and a stored adapter put on a
//! model. Source: peft/config.py (`PromptLearningConfig`), peft/utils/other.py (`_prepare_prompt_learning_config`).

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use pipit_convert::adapter::PeftAdapter;
use pipit_convert::checkpoint::TensorFiles;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::AdapterError;
use crate::model::{Config, Model, Parameter, Prefix, PrefixBlock, VirtualTokens};

/// The only tensor of such an adapter.
pub(super) const TENSOR: &str = "prompt_embeddings";

/// Which of the two it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VirtualTokensType {
    /// Embeddings before those of every sequence.
    #[serde(rename = "PROMPT_TUNING")]
    Prompt,
    /// Keys and values before those of every block.
    #[serde(rename = "PREFIX_TUNING")]
    Prefix,
}

/// What the embeddings of a soft prompt start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[value(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PromptTuningInit {
    /// Numbers from N(0, 1).
    Random,
    /// The embeddings of a text's tokens, again and again where it is short.
    Text,
    /// The embeddings of random tokens.
    SampleVocab,
}

/// `adapter_config.json` of prompt or prefix tuning, spelled as PEFT spells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VirtualTokensConfig {
    /// Which of the two it is.
    pub peft_type: VirtualTokensType,
    /// `CAUSAL_LM` for language models.
    #[serde(default)]
    pub task_type: Option<String>,
    /// The checkpoint that it was trained on.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// How many rows stand before every sequence.
    pub num_virtual_tokens: usize,
    /// `hidden_size`, or with a prefix the width of a row of keys.
    #[serde(default)]
    pub token_dim: Option<usize>,
    /// 1 for a decoder.
    #[serde(default)]
    pub num_transformer_submodules: Option<usize>,
    /// The heads of a row: with a prefix those of the keys.
    #[serde(default)]
    pub num_attention_heads: Option<usize>,
    /// The blocks.
    #[serde(default)]
    pub num_layers: Option<usize>,
    /// What the embeddings started from (prompt tuning).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tuning_init: Option<PromptTuningInit>,
    /// The text that they started from (prompt tuning).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tuning_init_text: Option<String>,
    /// The tokenizer of that text (prompt tuning).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_name_or_path: Option<String>,
    /// Whether keys and values were made by two layers from embeddings (prefix tuning).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_projection: Option<bool>,
    /// The width between those layers (prefix tuning).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoder_hidden_size: Option<usize>,
    /// Whether it was saved for inference.
    #[serde(default)]
    pub inference_mode: bool,
    /// Every other field, kept as it stands.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// Fields that say how the adapter was trained or found, and change nothing of what it does.
const HARMLESS: [&str; 5] = [
    "auto_mapping",
    "revision",
    "peft_version",
    "init_weights",
    "tokenizer_kwargs",
];

impl VirtualTokensConfig {
    /// Of a new adapter on a model.
    pub(super) fn new(
        peft_type: VirtualTokensType,
        num_virtual_tokens: usize,
        model: &Config,
        base: &str,
    ) -> Self {
        let heads = model.heads(0);
        let prompt = peft_type == VirtualTokensType::Prompt;
        Self {
            peft_type,
            task_type: Some("CAUSAL_LM".into()),
            base_model_name_or_path: Some(base.to_owned()),
            num_virtual_tokens,
            token_dim: Some(if prompt {
                model.hidden_size
            } else {
                heads.kv_width()
            }),
            num_transformer_submodules: Some(1),
            num_attention_heads: Some(if prompt { heads.heads } else { heads.kv_heads }),
            num_layers: Some(model.num_hidden_layers),
            prompt_tuning_init: None,
            prompt_tuning_init_text: None,
            tokenizer_name_or_path: None,
            prefix_projection: None,
            encoder_hidden_size: None,
            inference_mode: true,
            other: BTreeMap::new(),
        }
    }

    /// Refuses by name what this implementation does not have.
    pub(super) fn check(&self, path: &Path) -> Result<(), AdapterError> {
        let unsupported = |key: &str, value: String| {
            let (path, key) = (path.to_path_buf(), key.to_owned());
            Err(pipit_convert::adapter::AdapterError::Unsupported { path, key, value }.into())
        };
        if let Some(count) = self.num_transformer_submodules.filter(|count| *count != 1) {
            return unsupported("num_transformer_submodules", count.to_string());
        }
        if self.num_virtual_tokens == 0 {
            return unsupported("num_virtual_tokens", "0".into());
        }
        for (key, value) in &self.other {
            let active = match value {
                Value::Null | Value::Bool(false) => false,
                Value::Array(items) => !items.is_empty(),
                Value::Object(items) => !items.is_empty(),
                _ => true,
            };
            if active && !HARMLESS.contains(&key.as_str()) {
                return unsupported(key, value.to_string());
            }
        }
        Ok(())
    }
}

/// Puts the stored tensor of such an adapter on a model; it can be trained further. A projected prefix goes on without
/// its projection, which PEFT does not store.
pub(super) fn apply(model: &mut Model, config: &VirtualTokensConfig, dir: &Path) -> Result<(), AdapterError> {
    let path = PeftAdapter::weights_path(dir);
    let files = TensorFiles::open(&path).map_err(pipit_convert::adapter::AdapterError::from)?;
    let other_base = |why: String| AdapterError::OtherBase {
        path: dir.to_path_buf(),
        module: TENSOR.to_owned(),
        why,
        base: config.base_model_name_or_path.clone(),
    };
    if let Some(unknown) = files.names().find(|name| *name != TENSOR) {
        return Err(other_base(format!("the file has a tensor {unknown} beside it")));
    }
    let view = files
        .tensor(TENSOR)
        .ok_or_else(|| other_base("the file has no such tensor".into()))?;
    let (n, sizes) = (config.num_virtual_tokens, model.config());
    let (layers, kv) = (sizes.num_hidden_layers, sizes.heads(0).kv_width());
    let width = match config.peft_type {
        VirtualTokensType::Prompt => sizes.hidden_size,
        VirtualTokensType::Prefix => 2 * layers * kv,
    };
    if view.shape != [n, width] {
        return Err(other_base(format!(
            "is [{n}, {width}] here, {:?} in the adapter",
            view.shape
        )));
    }
    let values = view
        .to_f32()
        .map_err(pipit_convert::adapter::AdapterError::from)?;
    if !values.iter().all(|value| value.is_finite()) {
        return Err(other_base("it holds NaN or infinity".into()));
    }
    let tensor = Tensor::from_vec(values, (n, width), &Device::Cpu)?;
    model.set_virtual_tokens(match config.peft_type {
        VirtualTokensType::Prompt => VirtualTokens::Prompt(Parameter::trained(TENSOR.into(), &tensor)?),
        VirtualTokensType::Prefix => {
            let block = |i: usize| {
                let columns = tensor.narrow(1, i * 2 * kv, 2 * kv)?.contiguous()?;
                Ok(PrefixBlock::Plain(Parameter::trained(block_name(i), &columns)?))
            };
            VirtualTokens::Prefix(Prefix {
                num_virtual_tokens: n,
                blocks: (0..layers).map(block).collect::<candle_core::Result<_>>()?,
                projection: None,
            })
        }
    });
    Ok(())
}

/// The name of the part that belongs to a block; PEFT has all blocks in one tensor.
pub(super) fn block_name(block: usize) -> String {
    format!("{TENSOR}.layers.{block}")
}
