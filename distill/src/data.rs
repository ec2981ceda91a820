//! Training and evaluation data: JSONL rows become token sequences with labels on the answers.

mod encode;
mod rows;

use std::io;
use std::path::PathBuf;

pub use encode::{Encoder, Prompt, Sample};
use pipit_convert::checkpoint::CheckpointError;
use pipit_convert::import::ImportError;
pub use rows::{Content, ReadRow, Row, read_rows};
use serde::Serialize;

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

/// What became of the rows of a file. Lines are counted from 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DataReport {
    /// Lines that are not empty.
    pub rows: usize,
    /// Rows that are used.
    pub used: usize,
    /// Tokens of the rows that are used.
    pub tokens: usize,
    /// Tokens that are trained on.
    pub trained_tokens: usize,
    /// Left out: lines that are no row, with what is wrong.
    pub broken: Vec<(usize, String)>,
    /// Left out: rows whose answer is empty.
    pub empty_answers: Vec<usize>,
    /// Left out: rows of which no token is trained on, after truncation too.
    pub without_trained_token: Vec<usize>,
    /// Used, but cut to the largest length.
    pub truncated: Vec<usize>,
    /// Used, but the prompt's tokens change where the answer is added to it.
    pub uneven_boundary: Vec<usize>,
}

impl DataReport {
    /// One line for every kind of row that was left out or changed.
    pub fn warnings(&self) -> Vec<String> {
        let mut out = Vec::new();
        if let Some((line, why)) = self.broken.first() {
            out.push(format!(
                "{} rows left out, not readable: line {line}: {why}{}",
                self.broken.len(),
                more(self.broken.len())
            ));
        }
        for (what, lines) in [
            ("rows left out, the answer is empty", &self.empty_answers),
            ("rows left out, no token to train on", &self.without_trained_token),
            ("rows cut to the largest length", &self.truncated),
            (
                "rows whose prompt is tokenised otherwise once the answer follows",
                &self.uneven_boundary,
            ),
        ] {
            if !lines.is_empty() {
                let shown: Vec<String> = lines.iter().take(5).map(usize::to_string).collect();
                out.push(format!(
                    "{} {what}: lines {}{}",
                    lines.len(),
                    shown.join(", "),
                    if lines.len() > 5 { ", …" } else { "" }
                ));
            }
        }
        out
    }
}

fn more(count: usize) -> &'static str {
    if count > 1 { ", …" } else { "" }
}
