//! The GGUF file format, version 3: own types, a bounds-checked reader and a streaming writer.
//!
//! Source: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> and ggml/src/gguf.cpp.

mod files;
mod read;
pub mod split;
mod tensor_type;
mod value;
mod write;

use std::path::PathBuf;

pub use files::{FilesWriter, Unnamed, WrittenFile};
pub use read::{Gguf, TensorInfo};
pub use tensor_type::TensorType;
pub use value::{Array, Value};
pub use write::{Header, TensorPlan, Writer};

/// The first four bytes of every file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written. Version 2, which has the same layout, is read too.
pub const VERSION: u32 = 3;
/// Tensors start at multiples of this, unless `general.alignment` says otherwise.
pub const ALIGNMENT: u64 = 32;
/// The longest name of a tensor in bytes, as ggml has it (`GGML_MAX_NAME - 1`).
pub const MAX_TENSOR_NAME: usize = 63;
/// The largest number of dimensions of a tensor.
pub const MAX_DIMENSIONS: usize = 4;
/// The longest dimension: much that computes with a file counts in 32 bits.
pub const MAX_DIMENSION: u64 = i32::MAX as u64;

/// What can be wrong with a GGUF file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The file cannot be opened or mapped.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file does not start as a GGUF file does.
    #[error(
        "{path} is no GGUF file: it starts with {start:02x?}\nhint: a GGUF file starts with the four letters GGUF; is this a download page, or another format?"
    )]
    NotGguf {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        start: Vec<u8>,
    },
    /// The file has a version that is not read here.
    #[error("{path} is a GGUF file of version {version}; versions 2 and 3 are read, little-endian")]
    Version {
        /// The file.
        path: PathBuf,
        /// The version that stands in it.
        version: u32,
    },
    /// The file ends before what its header promises.
    #[error("{path} is truncated: {what}\nhint: the download or copy was cut short; fetch the file again")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
    /// The header breaks a rule of the format.
    #[error("{path} is a broken GGUF file: {why}")]
    Broken {
        /// The file.
        path: PathBuf,
        /// The rule that it breaks.
        why: String,
    },
    /// A key that is needed is not there, or has another type.
    #[error("{path}: the key {key} {why}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// `is missing`, or what it should have been.
        why: String,
    },
    /// A tensor that is needed is not there.
    #[error("{path} has no tensor {tensor}")]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A part of a split file does not belong to the others, or one is missing.
    #[error("{path}: {why}")]
    Part {
        /// The part.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Something that is about to be written breaks a rule of the format.
    #[error("cannot write this as GGUF: {0}")]
    Unwritable(String),
    /// The system could not write.
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
}

/// For errors that name the file themselves.
impl From<GgufError> for std::io::Error {
    fn from(error: GgufError) -> Self {
        match error {
            GgufError::Write(error) => error,
            other => Self::other(other),
        }
    }
}
