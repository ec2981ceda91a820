//! Text through a model in llama.cpp, chunk by chunk: what importance matrices and comparisons are measured with.
//!
//! The text is cut as llama-imatrix and llama-perplexity cut it: tokenised in one go, without reading special tokens
//! in it, then into chunks of `ctx` tokens that know nothing of each other. Where the model wants a token at the
//! beginning of a text, it takes the place of each chunk's first token.

mod operation;
mod session;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

pub use operation::{Kind, Operand, Operation};
pub use session::{Observer, Session, Unobserved};

use crate::gguf::GgufError;
use crate::llama_cpp::LlamaCppError;

/// The shortest chunk. llama.cpp takes shorter batches than 16 another way, past the observer.
pub const MIN_CTX: usize = 32;
/// The longest run of tokens that is computed in one go.
pub(crate) const MAX_BATCH: usize = 512;

/// How a text is put through a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The number of tokens of a chunk.
    pub ctx: usize,
    /// So many chunks at most.
    pub chunks: Option<NonZeroUsize>,
    /// The number of threads; nothing for as many as everything else here uses.
    pub threads: Option<NonZeroUsize>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ctx: 512,
            chunks: None,
            threads: None,
        }
    }
}

impl Options {
    /// The number of tokens that are computed in one go: the same for all batches of a chunk, give or take one.
    fn batch(&self) -> usize {
        self.ctx.div_ceil(self.ctx.div_ceil(MAX_BATCH).max(1))
    }
}

/// Why a text cannot be put through a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// The file is no GGUF file, or broken.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The file is no language model.
    #[error("{path}: {why}")]
    NoModel {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        why: String,
    },
    /// llama.cpp does not take the model.
    #[error("{path}: {source}")]
    LlamaCpp {
        /// The model.
        path: PathBuf,
        /// What it said.
        source: LlamaCppError,
    },
    /// llama.cpp takes the model and cannot compute with it.
    #[error("{path}: llama.cpp cannot compute with the model: {why}")]
    Compute {
        /// The model.
        path: PathBuf,
        /// What it said.
        why: String,
    },
    /// The text cannot be read.
    #[error("cannot read {path}: {source}")]
    Text {
        /// The text.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not UTF-8.
    #[error("{path} is not UTF-8, from byte {byte} on\nhint: iconv -t UTF-8 converts texts")]
    NotUtf8 {
        /// The text.
        path: PathBuf,
        /// The first byte that is no part of a character.
        byte: usize,
    },
    /// The chunks are too short.
    #[error("chunks of {ctx} tokens are too short\nhint: --ctx {MIN_CTX} is the least")]
    Ctx {
        /// The asked length.
        ctx: usize,
    },
    /// The text is shorter than a chunk.
    #[error(
        "{path} has {tokens} tokens, which is less than one chunk of {ctx}\nhint: give a longer text, or shorter chunks with --ctx"
    )]
    TooShort {
        /// The text.
        path: PathBuf,
        /// Its tokens.
        tokens: usize,
        /// The tokens of a chunk.
        ctx: usize,
    },
    /// The user asked to stop.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

/// A text that was read from a file.
#[derive(Debug, Clone)]
pub struct Text {
    /// The file.
    pub path: PathBuf,
    text: String,
}

impl Text {
    /// Reads a text. Its last line break is no part of it, as in llama.cpp's programs.
    pub fn open(path: &Path) -> Result<Self, EvaluateError> {
        let bytes = std::fs::read(path).map_err(|source| EvaluateError::Text {
            path: path.to_path_buf(),
            source,
        })?;
        let mut text = String::from_utf8(bytes).map_err(|e| EvaluateError::NotUtf8 {
            path: path.to_path_buf(),
            byte: e.utf8_error().valid_up_to(),
        })?;
        if text.ends_with('\n') {
            text.pop();
        }
        Ok(Self {
            path: path.to_path_buf(),
            text,
        })
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The chunks of the text, for the model of this session.
    pub fn chunks<O: Observer>(
        &self,
        session: &Session<O>,
        options: &Options,
    ) -> Result<Chunks, EvaluateError> {
        let tokens = session.tokenize(&self.text)?;
        let count = tokens.len() / options.ctx.max(1);
        if count == 0 {
            return Err(EvaluateError::TooShort {
                path: self.path.clone(),
                tokens: tokens.len(),
                ctx: options.ctx,
            });
        }
        Ok(Chunks {
            start: session.start_token(),
            ctx: options.ctx,
            count: options.chunks.map_or(count, |most| count.min(most.get())),
            tokens,
        })
    }
}

/// The tokens of a text in chunks of one length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunks {
    tokens: Vec<i32>,
    /// What stands in the place of each chunk's first token.
    start: Option<i32>,
    ctx: usize,
    count: usize,
}

impl Chunks {
    /// The number of chunks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The tokens of a chunk as they stand in the text.
    pub fn text(&self, chunk: usize) -> &[i32] {
        &self.tokens[chunk * self.ctx..][..self.ctx]
    }

    /// The tokens of a chunk as the model is given them.
    pub fn input(&self, chunk: usize) -> Vec<i32> {
        let mut tokens = self.text(chunk).to_vec();
        if let (Some(start), Some(first)) = (self.start, tokens.first_mut()) {
            *first = start;
        }
        tokens
    }

    /// The first place where two texts in chunks differ.
    pub fn first_difference(&self, other: &Self) -> Option<usize> {
        if self.start != other.start {
            return Some(0);
        }
        let longer = self.tokens.len().max(other.tokens.len());
        (0..longer).find(|at| self.tokens.get(*at) != other.tokens.get(*at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_of_a_chunk_have_one_length() {
        let batch = |ctx| {
            let options = Options {
                ctx,
                ..Options::default()
            };
            options.batch()
        };
        assert_eq!([32, 512, 513, 1024, 1030].map(batch), [32, 512, 257, 512, 344]);
    }

    #[test]
    fn a_chunk_starts_with_the_start_token_and_keeps_its_text() {
        let chunks = Chunks {
            tokens: (10..20).collect(),
            start: Some(1),
            ctx: 4,
            count: 2,
        };
        assert_eq!(chunks.input(1), [1, 15, 16, 17]);
        assert_eq!(chunks.text(1), [14, 15, 16, 17]);
        let mut other = chunks.clone();
        assert_eq!(chunks.first_difference(&other), None);
        other.tokens.pop();
        assert_eq!(chunks.first_difference(&other), Some(9));
        other.start = None;
        assert_eq!(chunks.first_difference(&other), Some(0));
    }
}
