//! A checkpoint folder or a GGUF file, with adapters merged into it, becomes a GGUF file.
//!
//! Data in: a [`SourceModel`] and LoRA adapters. Data out: a GGUF file whose tensors are bit for bit those of
//! llama.cpp's own conversion. First comes a [`Plan`] (every tensor's name, type, shape and place), then the
//! tensors are streamed through it in slabs of rows, so that memory does not grow with the model.

mod metadata;
mod source;
mod stream;

use std::path::PathBuf;

pub use source::SourceModel;

use crate::arch::{self, ArchError, Architecture, TensorRule};
use crate::checkpoint::CheckpointError;
use crate::gguf::{GgufError, Header, TensorPlan, TensorType};
use crate::import::ImportError;
use crate::merge::{Merge, MergeError, ScaledAdapter};
use crate::quantize::QuantizeError;
use crate::vocab::VocabError;

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

/// All that is known before a tensor is touched.
#[derive(Debug)]
pub struct Plan<'a> {
    model: &'a SourceModel,
    merge: Merge<'a>,
    jobs: Vec<Job>,
    /// The header of the file.
    pub header: Header,
    /// The architecture.
    pub architecture: &'static Architecture,
}

/// One tensor on its way.
#[derive(Debug)]
struct Job {
    source: Source,
    kind: TensorType,
    /// The length of a row, and the number of rows, as they are streamed.
    columns: usize,
    rows: usize,
}

#[derive(Debug)]
enum Source {
    Checkpoint(TensorRule),
    Extra { gguf: String, values: Vec<f32> },
}

impl Job {
    fn name(&self) -> &str {
        match &self.source {
            Source::Checkpoint(rule) => &rule.gguf,
            Source::Extra { gguf, .. } => gguf,
        }
    }
}

/// One row of the plan's table.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PlannedTensor {
    /// The name in the GGUF file.
    pub name: String,
    /// The name in the checkpoint, if it comes from there.
    pub from: Option<String>,
    /// The dimensions in ggml's order.
    pub dimensions: Vec<u64>,
    /// The type.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The number of bytes.
    pub bytes: u64,
    /// Whether an adapter is merged into it.
    pub merged: bool,
}

impl<'a> Plan<'a> {
    /// Plans the file: reads configuration and vocabulary, and pairs every tensor of the checkpoint with its place.
    /// Matrices get the type `kind`, vectors F32.
    pub fn new(
        model: &'a SourceModel,
        adapters: &'a [ScaledAdapter],
        kind: TensorType,
    ) -> Result<Self, ModelError> {
        let path = || model.path().to_path_buf();
        let arch_error = |source| ModelError::Arch { path: path(), source };
        let config = model.config();
        let arch = arch::of_config(config).map_err(arch_error)?;
        let rules = (arch.tensors)(config).map_err(arch_error)?;
        model.check_tensors(arch, &rules)?;
        let vocab = model.vocab()?;
        let merge = Merge::new(adapters, &rules)?;
        let mut jobs = Vec::new();
        for tensor in (arch.extra_tensors)(config).map_err(arch_error)? {
            let (columns, source) = (
                tensor.values.len(),
                Source::Extra {
                    gguf: tensor.gguf,
                    values: tensor.values,
                },
            );
            jobs.push(Job {
                source,
                kind: TensorType::F32,
                columns,
                rows: 1,
            });
        }
        for rule in rules {
            let (rows, columns) = rule.rows_and_columns();
            let kind = if rule.quantisable() {
                fitting(kind, &rule.gguf, columns)
            } else {
                TensorType::F32
            };
            jobs.push(Job {
                source: Source::Checkpoint(rule),
                kind,
                columns,
                rows,
            });
        }
        let parameters = jobs.iter().map(|job| (job.rows * job.columns) as u64).sum();
        let mut keys = metadata::general(model, arch, kind, parameters)?;
        keys.extend((arch.metadata)(config).map_err(arch_error)?);
        keys.extend(vocab.to_metadata());
        let tensors = jobs.iter().map(Job::plan).collect();
        let header = Header {
            metadata: keys,
            tensors,
        };
        Ok(Self {
            model,
            merge,
            jobs,
            header,
            architecture: arch,
        })
    }

    /// Adds the `pipit.*` keys: which files this was made of, by sha256. Reads them all once.
    pub fn add_provenance(&mut self, adapters: &[ScaledAdapter]) -> Result<(), ModelError> {
        self.header
            .metadata
            .extend(metadata::provenance(self.model, adapters)?);
        Ok(())
    }

    /// What will be written, tensor by tensor.
    pub fn table(&self) -> Vec<PlannedTensor> {
        let rows = self.jobs.iter().zip(&self.header.tensors);
        rows.map(|(job, tensor)| {
            let from = match &job.source {
                Source::Checkpoint(rule) => Some(rule.hf.clone()),
                Source::Extra { .. } => None,
            };
            PlannedTensor {
                name: tensor.name.clone(),
                merged: from.as_deref().is_some_and(|name| self.merge.changes(name)),
                from,
                dimensions: tensor.dimensions.clone(),
                kind: tensor.kind.name(),
                bytes: tensor.size().unwrap_or(0),
            }
        })
        .collect()
    }

    /// The size that the file will have.
    pub fn file_size(&self) -> Result<u64, GgufError> {
        self.header.file_size()
    }
}

impl Job {
    fn plan(&self) -> TensorPlan {
        let dimensions = match &self.source {
            Source::Checkpoint(rule) => rule.dimensions(),
            Source::Extra { values, .. } => vec![values.len() as u64],
        };
        TensorPlan {
            name: self.name().to_owned(),
            dimensions,
            kind: self.kind,
        }
    }
}

/// `kind`, or F16 where a row is no whole number of its blocks (as in both of llama.cpp's tools).
fn fitting(kind: TensorType, name: &str, columns: usize) -> TensorType {
    if kind.row_bytes(columns as u64).is_some() {
        return kind;
    }
    tracing::warn!(
        "{name} has rows of {columns} elements, no whole number of {kind} blocks: it is written as F16"
    );
    TensorType::F16
}
