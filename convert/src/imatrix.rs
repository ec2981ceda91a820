//! Importance matrices: how much each column of each matrix matters, measured on a text.
//!
//! Data in: a model and a text, or a file that llama-imatrix wrote. Data out: a GGUF file as llama-imatrix writes
//! it, or the weights that the quantisation kernels are given ([`Imatrix::importance`]).
//!
//! Source: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp of llama.cpp.

mod collect;
mod read;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use collect::{Settings, measure};

use crate::checksum::sha256;
use crate::evaluate::EvaluateError;
use crate::gguf::{Array, FilesWriter, GgufError, Header, TensorPlan, TensorType, Value};
use crate::quantize::Importance;

/// What stands behind a tensor's name in the file: the sums of the squares, and what they are divided by.
const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
const DATASETS: &str = "imatrix.datasets";
const CHUNK_COUNT: &str = "imatrix.chunk_count";
const CHUNK_SIZE: &str = "imatrix.chunk_size";

/// Why there is no importance matrix.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImatrixError {
    /// The text cannot be put through the model.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is a broken GGUF file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The file is not what llama-imatrix writes.
    #[error(
        "{path} is no importance matrix: {why}\nhint: pipit-convert imatrix and llama-imatrix write them"
    )]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The model chooses among experts: their columns are counted another way.
    #[error(
        "{path}: {tensor} is chosen token by token, and mixtures of experts are not measured here\nhint: llama-imatrix can, and its files are read here"
    )]
    Experts {
        /// The model.
        path: PathBuf,
        /// The first such tensor.
        tensor: String,
    },
    /// The model computes numbers that are none.
    #[error(
        "{path}: what {tensor} is multiplied with is not finite\nhint: the model is broken; pipit-convert inspect says what it was made of"
    )]
    NotFinite {
        /// The model.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor is used in two ways that do not agree.
    #[error("{path}: {tensor} is multiplied with {found} columns here and {wanted} there")]
    Inconsistent {
        /// The model.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The columns of this use.
        found: usize,
        /// The columns of an earlier one.
        wanted: usize,
    },
    /// The file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: GgufError,
    },
}

/// What was measured for many tensors.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Imatrix {
    /// By the tensor's name in the GGUF file.
    pub entries: BTreeMap<String, Entry>,
    /// The texts.
    pub datasets: Vec<String>,
    /// The number of chunks of text.
    pub chunks: u32,
    /// The number of tokens of a chunk; 0 in files of the older format.
    pub chunk_size: u32,
}

/// What was measured for one tensor.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Entry {
    /// For each column, the sum of the squares of what it was multiplied with; one matrix after the other.
    pub sums: Vec<f32>,
    /// For each matrix, the number of the squares in a sum.
    pub counts: Vec<i64>,
}

impl Entry {
    /// The weight of each column: the mean square, and 1 throughout a matrix that nothing was multiplied with.
    pub fn weights(&self) -> Vec<f32> {
        let columns = self.sums.len() / self.counts.len().max(1);
        let mut weights = self.sums.clone();
        for (weights, count) in weights.chunks_mut(columns.max(1)).zip(&self.counts) {
            for weight in weights {
                *weight = if *count > 0 { *weight / *count as f32 } else { 1.0 };
            }
        }
        weights
    }
}

impl Imatrix {
    /// Reads a file of llama-imatrix: GGUF, or the older format without a name (`.dat`).
    pub fn open(path: &Path) -> Result<Self, ImatrixError> {
        read::open(path)
    }

    /// The weights as llama-quantize hands them to the kernels. `file` is what the quantised file will call them.
    pub fn importance(&self, file: &str) -> Importance {
        let weights = self.entries.iter();
        Importance {
            weights: weights
                .map(|(name, entry)| (name.clone(), entry.weights()))
                .collect(),
            file: file.to_owned(),
            datasets: self.datasets.clone(),
            chunks: self.chunks,
        }
    }

    /// Writes a GGUF file as llama-imatrix does. `keys` are added to those that it has.
    pub fn write(&self, path: &Path, keys: Vec<(String, Value)>) -> Result<(), ImatrixError> {
        let error = |source| ImatrixError::Write {
            path: path.to_path_buf(),
            source,
        };
        let mut header = Header {
            metadata: vec![
                ("general.type".into(), "imatrix".into()),
                (
                    DATASETS.into(),
                    Value::Array(Array::String(self.datasets.clone())),
                ),
                (CHUNK_COUNT.into(), self.chunks.into()),
                (CHUNK_SIZE.into(), self.chunk_size.into()),
            ],
            tensors: Vec::new(),
        };
        header.metadata.extend(keys);
        let mut values = Vec::new();
        for (name, entry) in &self.entries {
            let matrices = entry.counts.len();
            let columns = entry.sums.len() / matrices.max(1);
            let counts = entry.counts.iter().map(|count| *count as f32).collect();
            let parts = [(SUMS, columns, entry.sums.clone()), (COUNTS, 1, counts)];
            for (ending, columns, numbers) in parts {
                let mut dimensions = vec![columns as u64];
                if matrices > 1 {
                    dimensions.push(matrices as u64);
                }
                header.tensors.push(TensorPlan {
                    name: format!("{name}{ending}"),
                    dimensions,
                    kind: TensorType::F32,
                });
                values.push(numbers);
            }
        }
        let mut writer = FilesWriter::create(path, &header, None).map_err(error)?;
        for (tensor, numbers) in header.tensors.iter().zip(values) {
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            writer.append(&tensor.name, &bytes).map_err(error)?;
        }
        writer.commit().map_err(error)?;
        Ok(())
    }
}

/// The keys that say what a matrix was measured with, besides llama-imatrix's: the program, and the sha256 sums of
/// the model's files and of the text. Reads all of them once.
pub fn provenance(model: &Path, text: &Path) -> Result<Vec<(String, Value)>, ImatrixError> {
    let sum = |path: &Path| {
        sha256(path).map_err(|source| ImatrixError::Read {
            path: path.to_path_buf(),
            source,
        })
    };
    let gguf = crate::gguf::Gguf::open(model)?;
    let models = gguf.paths().map(sum).collect::<Result<Vec<_>, _>>()?;
    Ok(vec![
        ("pipit.version".into(), env!("CARGO_PKG_VERSION").into()),
        ("pipit.source.sha256".into(), Value::Array(Array::String(models))),
        ("pipit.text.sha256".into(), sum(text)?.as_str().into()),
    ])
}

#[cfg(test)]
mod tests;
