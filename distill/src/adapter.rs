//! Adapters on a model, in PEFT's forms and files: LoRA on chosen layers, soft prompts, prefixes.

mod kept;
pub mod lora;
pub mod prefix;
pub mod prompt;
mod save;
mod start;
mod stored;
mod targets;
mod virtual_tokens;

use std::io;
use std::path::{Path, PathBuf};

pub use lora::{Bias, InitLoraWeights, LoraOptions};
use pipit_convert::adapter::{AdapterConfig, AdapterError as FolderError, PeftAdapter};
use pipit_convert::checkpoint::CheckpointError;
pub use prefix::PrefixOptions;
pub use prompt::{PromptOptions, PromptStart};
use serde_json::Value;
pub use targets::Targets;
pub use virtual_tokens::{PromptTuningInit, VirtualTokensConfig, VirtualTokensType};

use crate::model::Model;

/// What kind of adapter a model carries, as `adapter_config.json` says it.
#[derive(Debug, Clone, PartialEq)]
pub enum Adapter {
    /// Low-rank adapters.
    Lora(AdapterConfig),
    /// A soft prompt or a prefix.
    VirtualTokens(VirtualTokensConfig),
}

impl Adapter {
    /// Reads an adapter folder that PEFT or this program wrote, and puts the adapter on the model. It can be trained
    /// further.
    pub fn load(model: &mut Model, dir: &Path) -> Result<Self, AdapterError> {
        let path = dir.join("adapter_config.json");
        let bad = |e: serde_json::Error| FolderError::Config {
            path: path.clone(),
            why: e.to_string(),
        };
        if path.is_file() {
            let read = |source| CheckpointError::Read {
                path: path.clone(),
                source,
            };
            let bytes = pipit_convert::json::read_bytes(&path)
                .map_err(read)
                .map_err(FolderError::from)?;
            let json: Value = pipit_convert::json::from_slice(&bytes).map_err(bad)?;
            match json["peft_type"].as_str() {
                Some("PROMPT_TUNING" | "PREFIX_TUNING") => {
                    let config: VirtualTokensConfig = serde_json::from_value(json).map_err(bad)?;
                    config.check(&path)?;
                    virtual_tokens::apply(model, &config, dir)?;
                    return Ok(Self::VirtualTokens(config));
                }
                Some("LORA") | None => {}
                Some(other) => {
                    let (key, value) = ("peft_type".to_owned(), other.to_owned());
                    return Err(FolderError::Unsupported { path, key, value }.into());
                }
            }
        }
        let adapter = PeftAdapter::open(dir)?;
        stored::apply(model, &adapter)?;
        Ok(Self::Lora(adapter.config().clone()))
    }

    /// The same with the checkpoint that it is on now.
    pub fn of_base(mut self, base: &str) -> Self {
        match &mut self {
            Self::Lora(config) => config.base_model_name_or_path = Some(base.to_owned()),
            Self::VirtualTokens(config) => config.base_model_name_or_path = Some(base.to_owned()),
        }
        self
    }
}

/// What can be wrong with an adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The folder cannot be read as an adapter.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// An option names nothing that the model has.
    #[error("{option}: {wanted:?} matches no layer that it can be for\nhint: the nearest names are {}", .nearest.join(", "))]
    NoTarget {
        /// The option.
        option: &'static str,
        /// What was asked for.
        wanted: String,
        /// Names that the model has, the most similar first.
        nearest: Vec<String>,
    },
    /// All that `target_modules` names was excluded again.
    #[error(
        "target_modules {target_modules:?}: no module is left\nhint: exclude_modules, modules_to_save and layers_to_transform take modules away"
    )]
    NothingLeft {
        /// What was asked for.
        target_modules: String,
    },
    /// An option is no regular expression.
    #[error(
        "{option}: {pattern:?} is no regular expression: {why}\nhint: look-around is not supported; exclude_modules takes modules away"
    )]
    Pattern {
        /// The option.
        option: &'static str,
        /// What was given.
        pattern: String,
        /// What the expression's parser said.
        why: String,
    },
    /// Options that do not go together.
    #[error("{why}")]
    Conflict {
        /// Which ones.
        why: String,
    },
    /// The adapter has a module that the model has not, or one of another shape.
    #[error("{path} does not fit this model: {module}: {why}\nhint: an adapter belongs to the base it was trained on{}", .base.as_ref().map(|base| format!(", here {base}")).unwrap_or_default())]
    OtherBase {
        /// The adapter's folder.
        path: PathBuf,
        /// The module.
        module: String,
        /// What does not fit.
        why: String,
        /// `base_model_name_or_path`.
        base: Option<String>,
    },
    /// The files cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
