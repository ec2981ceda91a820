//! Teachers: whatever says how probable it finds each next token of a text.

mod checkpoint;

use std::ops::Range;

pub use checkpoint::{BaseTeacher, CheckpointTeacher};

use crate::adapter::AdapterError;
use crate::data::DataError;
use crate::model::ModelError;

/// A sequence whose labelled tokens a teacher is asked about.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Prompt and answer.
    pub ids: &'a [u32],
    /// A label stands at its own token; -100 is not asked about. The first token's is never.
    pub labels: &'a [i64],
    /// Which of several teachers answers, where there are several.
    pub route: Option<&'a str>,
}

/// Logits of many rows that need not exist all at once.
pub trait LogitRows: Send + Sync {
    /// The number of rows.
    fn rows(&self) -> usize;
    /// The number of logits in a row.
    fn vocab_size(&self) -> usize;
    /// Fills `out`, `[rows, vocab_size]`.
    fn read(&self, rows: Range<usize>, out: &mut [f32]) -> candle_core::Result<()>;
}

/// The k most probable tokens of every row; all others together are the tail, 1 − Σ exp(logprobs).
#[derive(Debug, Clone, PartialEq)]
pub struct TopK {
    /// The number of tokens of a row.
    pub k: usize,
    /// Tokens, `[rows, k]`, the most probable first.
    pub ids: Vec<u32>,
    /// Their natural logarithms of probability at temperature 1, `[rows, k]`.
    pub logprobs: Vec<f32>,
}

/// What a teacher says about the labelled tokens of a batch, in the order of `Batch::targets`: a row for each.
pub enum Scores {
    /// Every logit.
    Full(Box<dyn LogitRows>),
    /// The most probable tokens.
    Top(TopK),
    /// log p of the labels themselves, natural logarithm.
    Label(Vec<f32>),
}

/// What can go wrong with a teacher.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TeacherError {
    /// Its checkpoint cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Its adapter cannot be used.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The student's base is to teach it, and is trained itself.
    #[error(
        "{tensor} of the student is trained, so that its base is no teacher\nhint: name the checkpoint that it starts from as teacher"
    )]
    BaseIsTrained {
        /// The tensor.
        tensor: String,
    },
    /// Its tokenizer or template cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// A model that scores texts. Scores of equal texts are equal: the preflight asks twice.
pub trait Teacher {
    /// What it is, for messages and reports.
    fn name(&self) -> String;
    /// The number of tokens that its scores tell apart.
    fn vocab_size(&self) -> usize;
    /// A row for every labelled token of the sequences, in their order.
    fn score(&mut self, sequences: &[Asked<'_>]) -> Result<Scores, TeacherError>;
}
