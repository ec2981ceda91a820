//! Training and evaluation data: rows become token sequences with labels on the answers.

mod encode;
mod parquet;
mod report;
mod rows;

use std::io;
use std::path::PathBuf;

pub use encode::{Encoder, Prompt, Sample};
use pipit_convert::checkpoint::CheckpointError;
use pipit_convert::import::ImportError;
pub use report::DataReport;
pub use rows::{Content, ReadRow, Row, Rows, read_rows};

/// What can be wrong with data, a tokenizer or a chat template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is a Parquet file, which this program was built without.
    #[error(
        "{path}: this program was built without Parquet\nhint: build it with `cargo build --release -p pipit-distill --features parquet`, or write the rows as JSONL"
    )]
    NoParquet {
        /// The file.
        path: PathBuf,
    },
    /// A Parquet file is damaged, or of a kind that is not supported.
    #[error("{path} cannot be read as Parquet: {why}")]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A JSON file of the checkpoint cannot be read.
    #[error(transparent)]
    Json(#[from] CheckpointError),
    /// The vocabulary of a GGUF file cannot be read.
    #[error(transparent)]
    Gguf(#[from] ImportError),
    /// There is no place for the tokenizer of a GGUF file.
    #[error("cannot make a temporary folder: {source}")]
    Scratch {
        /// What the system said.
        source: io::Error,
    },
    /// The tokenizer cannot be loaded, or refuses a text.
    #[error("{path}: {why}")]
    Tokenizer {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The tokenizer knows tokens that the embedding does not have.
    #[error(
        "{path} has token {token}, but the model's embedding ends at {vocab_size}\nhint: tokenizer and model are not of one checkpoint"
    )]
    Vocabulary {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// Its largest token id.
        token: u32,
        /// The number of rows of the embedding.
        vocab_size: usize,
    },
    /// There is no token that ends an answer.
    #[error(
        "{path}: no end-of-sequence token: neither generation_config.json nor config.json has an eos_token_id"
    )]
    NoEos {
        /// The checkpoint.
        path: PathBuf,
    },
    /// The chat template does not parse, or refuses a conversation.
    #[error("the chat template fails: {why}")]
    Template {
        /// What the template engine said.
        why: String,
    },
    /// The chat template refuses a row.
    #[error(
        "{path}, line {line}: the chat template refuses this conversation: {why}\nhint: does the model's template know all roles of the data, in this order?"
    )]
    Refused {
        /// The data.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the template said.
        why: String,
    },
    /// The data are conversations, and the checkpoint has no chat template.
    #[error(
        "{path}, line {line}: `messages` needs a chat template, and the checkpoint has none\nhint: use a checkpoint with chat_template.jinja, or rows with `prompt` and `completion`"
    )]
    NoTemplate {
        /// The data.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// No row can be used.
    #[error(
        "{path} has no usable row: {why}\nhint: each line is a JSON object with `messages`, or `prompt` and `completion`, or `text`"
    )]
    Nothing {
        /// The data.
        path: PathBuf,
        /// What became of the rows.
        why: String,
    },
}
