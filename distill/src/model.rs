//! Trainable models: their configuration, their weights, and the forward pass with gradients.

mod adapted;
mod block;
mod cache;
mod config;
mod decoder;
mod embedding;
mod gemma3;
mod head;
mod linear;
mod llama;
mod load;
mod lora;
mod norm;
pub mod ops;
mod parameter;
mod parts;
pub mod quantized;
mod qwen2;
mod qwen3;
mod source;
mod virtual_tokens;
mod weight;

use std::path::PathBuf;

pub use adapted::Module;
pub use block::Pass;
pub use cache::KvCache;
pub use config::{Architecture, Config, Rope, Scaling};
pub use decoder::Model;
pub use embedding::Embedding;
pub use head::{HEAD, Head};
pub use linear::Linear;
pub use load::Keep;
pub use lora::{EmbeddingLora, Lora, Magnitude};
pub use parameter::{Mode, Parameter};
use pipit_convert::checkpoint::CheckpointError;
use pipit_convert::import::ImportError;
use pipit_convert::quantize::QuantizeError;
pub use virtual_tokens::{Prefix, PrefixBlock, Projection, VirtualTokens};
pub use weight::{QuantizedRows, Weight};

/// What to do about a `model_type` that cannot be trained.
fn instead_of(model_type: &str) -> String {
    match model_type {
        "gemma3" => "it has a vision tower, which is not built; save its text model alone (transformers' \
                     Gemma3ForCausalLM, model_type gemma3_text) and train that"
            .into(),
        _ => {
            let known = Architecture::ALL.map(Architecture::model_type).join(", ");
            format!("these can: {known}")
        }
    }
}

/// What can be wrong with a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The folder cannot be read as a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The GGUF file cannot be read as a checkpoint.
    #[error(transparent)]
    Gguf(#[from] ImportError),
    /// All weights of a GGUF file are to be trained.
    #[error(
        "{path}: the blocks of a GGUF file cannot be trained\nhint: --method lora trains an adapter over them; pipit-convert import {path} -o FOLDER makes a checkpoint for --method full"
    )]
    Blocks {
        /// The file.
        path: PathBuf,
    },
    /// A tensor of a GGUF file cannot be turned into numbers.
    #[error("{path}: tensor {tensor}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The tensor, by its name in a checkpoint.
        tensor: String,
        /// Why.
        source: QuantizeError,
    },
    /// A tensor that has to be a matrix is none.
    #[error("{path}: tensor {tensor} is no matrix")]
    NoMatrix {
        /// The folder or file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The model is of an architecture that cannot be trained here.
    #[error("{path}: model_type {found:?} cannot be trained\nhint: {}", instead_of(.found))]
    Architecture {
        /// The `config.json`.
        path: PathBuf,
        /// Its `model_type`.
        found: String,
    },
    /// A key of `config.json` is missing, or has a value that is not supported.
    #[error("{path}: `{key}`: {why}")]
    Config {
        /// The `config.json`.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A tensor has not the shape that the configuration gives it.
    #[error("{path}: tensor {tensor} has shape {found:?}, config.json makes it {expected:?}")]
    Shape {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that it should have.
        expected: Vec<usize>,
    },
    /// A tensor holds NaN or infinity.
    #[error("{path}: tensor {tensor} holds NaN or infinity")]
    NotFinite {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The checkpoint has tensors that the architecture does not know; to train without them would be wrong.
    #[error("{path} has tensors that {model_type} does not use: {}", .tensors.join(", "))]
    UnusedTensors {
        /// The checkpoint.
        path: PathBuf,
        /// The `model_type`.
        model_type: String,
        /// Their names.
        tensors: Vec<String>,
    },
    /// The arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
