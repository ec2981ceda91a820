//! LoRA adapters on a model: which layers, with what numbers to start from, and PEFT's files.

mod lora;
mod targets;

use std::io;
use std::path::PathBuf;

pub use lora::{LoraOptions, add, apply, save};
use pipit_convert::adapter::AdapterError as FolderError;
pub use targets::select;

/// What can be wrong with an adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The folder cannot be read as an adapter.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// `target_modules` names nothing that the model has.
    #[error("target_modules {wanted:?} matches no linear layer of the model\nhint: the nearest names are {}", .nearest.join(", "))]
    NoTarget {
        /// What was asked for.
        wanted: String,
        /// Names that the model has, the most similar first.
        nearest: Vec<String>,
    },
    /// `target_modules` asks for a layer that cannot carry an adapter here.
    #[error("target_modules {module:?}: an adapter on the embedding or the output layer is not supported")]
    Head {
        /// What was asked for.
        module: String,
    },
    /// `target_modules` is no regular expression.
    #[error("target_modules {pattern:?} is no regular expression: {why}")]
    Pattern {
        /// What was asked for.
        pattern: String,
        /// What the expression's parser said.
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
