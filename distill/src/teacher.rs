//! Teachers: whatever says how probable it finds each next token of a text.

pub mod cache;
mod checkpoint;
pub mod gguf;
pub mod routed;
pub mod served;
mod spec;
pub mod vocabulary;

use std::ops::Range;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use pipit_convert::evaluate::EvaluateError;

pub(crate) use checkpoint::copy_logits;
pub use checkpoint::{BaseTeacher, CheckpointTeacher};
pub use spec::Spec;

use crate::adapter::AdapterError;
use crate::data::DataError;
use crate::model::ModelError;
use served::ServedError;

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

impl Asked<'_> {
    /// Refuses a sequence that is longer than a teacher takes.
    fn check_length(&self, longest: usize, teacher: impl FnOnce() -> String) -> Result<(), TeacherError> {
        match self.ids.len() {
            tokens if tokens > longest => Err(TeacherError::TooLong {
                teacher: teacher(),
                tokens,
                longest,
            }),
            _ => Ok(()),
        }
    }
}

/// The places of the labelled tokens of a sequence, which stand at their own token: never the first.
pub(crate) fn label_places(labels: &[i64]) -> impl Iterator<Item = usize> {
    let labels = labels.iter().enumerate().skip(1);
    labels.filter(|(_, label)| **label >= 0).map(|(place, _)| place)
}

/// Logits of many rows that need not exist all at once.
pub trait LogitRows: Send + Sync {
    /// The number of rows.
    fn rows(&self) -> usize;
    /// The number of logits in a row.
    fn vocab_size(&self) -> usize;
    /// Fills `out`, `[rows, vocab_size]`.
    fn read(&self, rows: Range<usize>, out: &mut [f32]) -> candle_core::Result<()>;
    /// The same as a tensor on a device, `[rows, vocab_size]`.
    fn there(&self, rows: Range<usize>, device: &Device) -> candle_core::Result<Tensor> {
        let shape = (rows.len(), self.vocab_size());
        let mut logits = vec![0.0; shape.0 * shape.1];
        self.read(rows, &mut logits)?;
        Tensor::from_vec(logits, shape, device)
    }
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
    /// Its GGUF file cannot be used.
    #[error(transparent)]
    Gguf(#[from] EvaluateError),
    /// Its server cannot be used.
    #[error(transparent)]
    Served(#[from] ServedError),
    /// A sequence is longer than it takes.
    #[error(
        "a sequence has {tokens} tokens, and the teacher {teacher} takes {longest}\nhint: shorten prompts with --max-length, or answers with --max-new-tokens"
    )]
    TooLong {
        /// The teacher.
        teacher: String,
        /// The tokens of the sequence.
        tokens: usize,
        /// The most tokens that the teacher takes.
        longest: usize,
    },
    /// Its tokenizer is not the student's.
    #[error(
        "the teacher {teacher} has another tokenizer than the student {student}: {why}\nhint: pipit-distill generate lets it answer, and pipit-distill sft trains on the answers; that needs no common tokenizer"
    )]
    Tokenizer {
        /// The teacher.
        teacher: String,
        /// The student.
        student: String,
        /// Where they differ.
        why: String,
    },
    /// The file of a cache cannot be read or written.
    #[error("{path}: {source}")]
    CacheFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A cache belongs to something else.
    #[error(
        "{path} holds scores of another {what}: {found}, not {wanted}\nhint: name another folder, or remove this one"
    )]
    ForeignCache {
        /// The folder.
        path: PathBuf,
        /// What is different.
        what: &'static str,
        /// What it is there.
        found: String,
        /// What it is here.
        wanted: String,
    },
    /// A folder that is no cache.
    #[error(
        "{path} is no cache of scores: {why}\nhint: name a new folder, or one that pipit-distill has made"
    )]
    NoCache {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// What is to be cached has no most probable tokens.
    #[error(
        "{teacher} tells the probability of single tokens only, and a cache keeps the most probable ones\nhint: ask it for its top k"
    )]
    NothingToCache {
        /// The teacher.
        teacher: String,
    },
    /// An adapter over something that takes none.
    #[error("the adapter {adapter} can stand on a checkpoint only\nhint: pipit-convert model --adapter merges it into a GGUF file; a server takes adapters where it is started", adapter = .adapter.display())]
    AdapterHere {
        /// The adapter.
        adapter: PathBuf,
    },
    /// No teacher at all.
    #[error("there is no teacher")]
    NoTeacher,
    /// Two teachers for one route.
    #[error("two teachers for the route {route:?}")]
    RouteTwice {
        /// The route.
        route: String,
    },
    /// A row names a teacher that is not there.
    #[error("a row names {route}, which is no teacher\nhint: there are {known}")]
    Route {
        /// What the row says.
        route: String,
        /// The routes that are there.
        known: String,
    },
    /// Several teachers answer differently.
    #[error(
        "the teachers give scores of more than one kind: all logits, the top k, or single tokens\nhint: take either servers only, or files and checkpoints only"
    )]
    MixedScores,
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
