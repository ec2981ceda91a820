//! How far one model is from another: perplexity and Kullback-Leibler divergence on a text.
//!
//! Data in: two GGUF files with the same vocabulary, and a text. Data out: a [`Comparison`]. Both models are put
//! through each piece of text one after the other, so that no file of logits is needed. What is counted is what
//! llama-perplexity counts: of each chunk the second half, without the token after its end.
//!
//! llama-perplexity keeps the reference's logarithms of probabilities in 16 bits. Here nothing is rounded.

mod statistics;

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use statistics::Row;
pub use statistics::{Comparison, Divergence, Estimate, PerplexityRatio};

use crate::evaluate::{Chunks, EvaluateError, Options, Session, Text, Unobserved};
use crate::gguf::Gguf;
use crate::progress::Progress;

/// Why two models cannot be compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// The text cannot be put through one of them.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// They have different vocabularies.
    #[error(
        "{reference} and {other} have different vocabularies: {why}\nhint: only models that read and write the same tokens can be compared"
    )]
    Vocabulary {
        /// The one model.
        reference: PathBuf,
        /// The other one.
        other: PathBuf,
        /// The difference.
        why: String,
    },
    /// A model computes numbers that are none.
    #[error(
        "{path}: the model computes numbers that are not finite, in chunk {chunk}\nhint: its weights overflow, or are broken"
    )]
    NotFinite {
        /// The model.
        path: PathBuf,
        /// The chunk, from 1.
        chunk: usize,
    },
}

/// Puts a text through both models. The reference is the one that the other should be like.
pub fn compare(
    reference: &Path,
    other: &Path,
    text: &Text,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Comparison, CompareError> {
    check_vocabulary(reference, other)?;
    let mut pair = Pair {
        reference: Session::open(reference, options, Unobserved)?,
        other: Session::open(other, options, Unobserved)?,
    };
    let chunks = pair.chunks(text, options)?;
    let bytes = text.as_str().len() as u64 / chunks.count() as u64;
    progress.start("comparing", bytes * chunks.count() as u64);
    let mut rows = Vec::new();
    for chunk in 0..chunks.count() {
        pair.chunk(&chunks, chunk, &mut rows, progress)?;
        progress.advance(bytes);
    }
    Ok(Comparison::of(&rows, chunks.count(), options.ctx))
}

/// Both files must list the same tokens.
fn check_vocabulary(reference: &Path, other: &Path) -> Result<(), CompareError> {
    let (one, two) = (open(reference)?, open(other)?);
    let (tokens, others) = (tokens(&one)?, tokens(&two)?);
    let longer = tokens.len().max(others.len());
    let Some(at) = (0..longer).find(|at| tokens.get(*at) != others.get(*at)) else {
        return Ok(());
    };
    let name = |tokens: &[String]| tokens.get(at).map_or("none".into(), |token| format!("{token:?}"));
    Err(CompareError::Vocabulary {
        reference: reference.to_path_buf(),
        other: other.to_path_buf(),
        why: format!(
            "token {at} is {} in the one and {} in the other",
            name(tokens),
            name(others)
        ),
    })
}

fn open(path: &Path) -> Result<Gguf, EvaluateError> {
    Ok(Gguf::open(path)?)
}

fn tokens(gguf: &Gguf) -> Result<&[String], EvaluateError> {
    Ok(gguf.strings("tokenizer.ggml.tokens")?)
}

struct Pair {
    reference: Session<Unobserved>,
    other: Session<Unobserved>,
}

impl Pair {
    /// The chunks of the text, which must be the same for both.
    fn chunks(&self, text: &Text, options: &Options) -> Result<Chunks, CompareError> {
        let different = |why: String| CompareError::Vocabulary {
            reference: self.reference.path().to_path_buf(),
            other: self.other.path().to_path_buf(),
            why,
        };
        let chunks = text.chunks(&self.reference, options)?;
        let others = text.chunks(&self.other, options)?;
        match chunks.first_difference(&others) {
            None => Ok(chunks),
            Some(at) => {
                let path = text.path.display();
                Err(different(format!("token {at} of {path} is not the same")))
            }
        }
    }

    fn chunk(
        &mut self,
        chunks: &Chunks,
        chunk: usize,
        rows: &mut Vec<Row>,
        progress: &dyn Progress,
    ) -> Result<(), CompareError> {
        self.reference.clear();
        self.other.clear();
        let text = chunks.text(chunk);
        let counted = text.len() / 2..text.len() - 1;
        let input = chunks.input(chunk);
        let length = self.reference.batch();
        for (start, tokens) in (0..).step_by(length).zip(input.chunks(length)) {
            if progress.cancelled() {
                return Err(EvaluateError::Interrupted.into());
            }
            let wanted = |at: usize| counted.contains(&(start + at));
            self.reference.decode(tokens, wanted)?;
            self.other.decode(tokens, wanted)?;
            let here = counted.start.max(start)..counted.end.min(start + tokens.len());
            rows.extend(self.rows(&text[here.start + 1..here.end.max(here.start) + 1], chunk)?);
        }
        Ok(())
    }

    /// What both models make of the tokens that follow in the text.
    fn rows(&self, next: &[i32], chunk: usize) -> Result<Vec<Row>, CompareError> {
        let width = self.reference.vocabulary().max(1);
        let (reference, other) = (self.reference.logits()?, self.other.logits()?);
        let rows: Vec<_> = (
            reference.par_chunks_exact(width),
            other.par_chunks_exact(width),
            next,
        )
            .into_par_iter()
            .map(|(reference, other, next)| Row::of(reference, other, *next))
            .collect();
        rows.into_iter()
            .map(|row| {
                row.map_err(|side| CompareError::NotFinite {
                    path: match side {
                        statistics::Side::Reference => self.reference.path().to_path_buf(),
                        statistics::Side::Other => self.other.path().to_path_buf(),
                    },
                    chunk: chunk + 1,
                })
            })
            .collect()
    }
}
