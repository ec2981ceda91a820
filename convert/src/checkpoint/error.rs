//! What can be wrong with a checkpoint folder.

use std::path::PathBuf;

use safetensors::Dtype;

/// What can be wrong with a checkpoint folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The path is not a folder with a `config.json` and safetensors.
    #[error(
        "{path} is no checkpoint: {why}\nhint: a checkpoint is a folder with config.json and model.safetensors (or shards with model.safetensors.index.json)"
    )]
    NoCheckpoint {
        /// The folder that was named.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// A file of the folder cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file does not parse, or does not hold what it must.
    #[error("{path}: {why}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A safetensors file breaks the format (truncated, ranges that overlap or leave the file, …).
    #[error("{path} is no valid safetensors file: {why}")]
    Shard {
        /// The file.
        path: PathBuf,
        /// What the format's reader said.
        why: String,
    },
    /// The index and the shards disagree, or a tensor stands in two shards.
    #[error("{path}: tensor {tensor}: {why}")]
    Index {
        /// The index, or the shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How they disagree.
        why: String,
    },
    /// A tensor that is needed is not there.
    #[error("{path} has no tensor {tensor}")]
    MissingTensor {
        /// The folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has a type that cannot be turned into numbers here.
    #[error(
        "tensor {tensor} has type {dtype:?}; F32, F16, BF16, F8_E4M3 and F8_E5M2 are read\nhint: a model that is quantised says how in quantization_config of config.json; one that is not has floating-point weights"
    )]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
    },
    /// The checkpoint is quantised in a way that is not read.
    #[error(
        "{path} is {how}, which is not read\nhint: convert the checkpoint that it was quantised from; FP8 with scales is read"
    )]
    Quantized {
        /// The folder.
        path: PathBuf,
        /// `quantised by METHOD`.
        how: String,
    },
    /// The scales of a quantised tensor are missing, or do not fit it.
    #[error("tensor {tensor}: {why}")]
    Scale {
        /// The tensor that holds the scales.
        tensor: String,
        /// What is wrong with it.
        why: String,
    },
    /// The weights are pickled.
    #[error(
        "{path} holds its weights as {file}: a pickle, and reading one runs whatever code is in it\nhint: in a place where you trust it, load it with transformers and write it again: `model.save_pretrained(DIR, safe_serialization=True)`"
    )]
    Pickle {
        /// The folder.
        path: PathBuf,
        /// The first such file.
        file: String,
    },
    /// The checkpoint brings code that decides what it computes.
    #[error(
        "{path}: `{key}` asks for Python code that came with the checkpoint; none is run here\nhint: where the model is its architecture's own (phi3 names code that transformers has built in), remove `{key}` from the file"
    )]
    Code {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
    },
    /// A file of the folder is a link to a place outside of it.
    #[error(
        "{path} is a link to {target}, outside of its folder\nhint: copy the file itself into the folder (cp -L); the links of Hugging Face's own cache are followed"
    )]
    Link {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
}
