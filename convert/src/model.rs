//! A checkpoint folder or a GGUF file, with adapters merged into it, becomes a GGUF file.
//!
//! Data in: a [`SourceModel`] and LoRA adapters. Data out: a GGUF file whose tensors are bit for bit those of
//! llama.cpp's own conversion. First comes a [`Plan`] (every tensor's name, type, shape and place), then the
//! tensors are streamed through it in slabs of rows, so that memory does not grow with the model.

mod general;
mod merged;
mod plan;
mod provenance;
mod slab;
mod source;
mod stream;

use std::path::PathBuf;

pub use plan::{ChosenType, Plan, PlannedTensor, tensor_types};
pub use provenance::Provenance;
pub use source::SourceModel;

use crate::arch::ArchError;
use crate::checkpoint::CheckpointError;
use crate::import::ImportError;
use crate::merge::MergeError;
use crate::quantize::QuantizeError;
use crate::vocab::VocabError;
use crate::vocab::proof::ProofError;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The GGUF file that the model comes from cannot be used.
    #[error(transparent)]
    File(#[from] ImportError),
    /// The architecture is not built, or the configuration does not make sense.
    #[error("{path}: {source}")]
    Arch {
        /// The checkpoint.
        path: PathBuf,
        /// Why.
        source: ArchError,
    },
    /// The vocabulary is not built, or broken.
    #[error(transparent)]
    Vocab(#[from] VocabError),
    /// llama.cpp would read the vocabulary otherwise than the checkpoint's own tokenizer.
    #[error(transparent)]
    Proof(#[from] ProofError),
    /// An adapter does not fit the checkpoint.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The checkpoint lacks tensors that its configuration promises.
    #[error("{path} lacks tensors that a {arch} model must have: {}{hint}", names.join(", "))]
    Missing {
        /// The checkpoint.
        path: PathBuf,
        /// The architecture.
        arch: &'static str,
        /// The tensors.
        names: Vec<String>,
        /// What may be the reason.
        hint: &'static str,
    },
    /// The checkpoint has tensors that the architecture does not know: they would be lost.
    #[error("{path} holds tensors that a {arch} model does not have: {}\nhint: nothing is left out silently; is config.json the one of these weights?", names.join(", "))]
    Unknown {
        /// The checkpoint.
        path: PathBuf,
        /// The architecture.
        arch: &'static str,
        /// The tensors.
        names: Vec<String>,
    },
    /// A tensor's shape is not the one that the configuration gives.
    #[error("{path}: tensor {tensor} has the shape {found:?}, where config.json says {wanted:?}")]
    Shape {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that it should have.
        wanted: Vec<usize>,
    },
    /// A tensor cannot be quantised.
    #[error("tensor {tensor}: {source}")]
    Quantize {
        /// The tensor.
        tensor: String,
        /// Why.
        source: QuantizeError,
    },
    /// The types of the tensors cannot be chosen.
    #[error(transparent)]
    Recipe(QuantizeError),
    /// A file of the checkpoint or of an adapter cannot be read again for its checksum.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The user asked to stop.
    #[error("interrupted; nothing was written")]
    Interrupted,
}
