//! The proof that llama.cpp reads a vocabulary as the checkpoint's own tokenizer does.
//!
//! In: a [`Vocab`] that was read from a folder. A GGUF file of it without tensors goes through llama.cpp, the folder's
//! `tokenizer.json` through the tokenizers crate (the code under transformers' fast tokenizers), and both must give the
//! same identifiers for every text of a corpus. Nothing else shows that the name in `tokenizer.ggml.pre` is right: it
//! stands for regular expressions and flags that only llama.cpp's source knows.

mod corpus;
mod reference;
mod shrink;

use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token_type::LlamaTokenAttr;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tokenizers::{AddedToken, Tokenizer};

use super::{CONTROL, Limit, UNKNOWN, USER_DEFINED, Vocab, is_phi3};
use crate::checksum;
use crate::gguf::{GgufError, Header, Value, Writer};
use crate::llama_cpp::{self, LlamaCppError};

/// What is written of a proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// The number of texts that were compared.
    pub texts: usize,
    /// The number of ordinary tokens whose text is among them: of a large vocabulary, an even choice.
    pub pieces: usize,
    /// The sha256 of the texts, each ended by a zero byte.
    pub sha256: String,
}

/// Why a vocabulary is not proved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError {
    /// llama.cpp gives other identifiers for a text.
    #[error(
        "{path}: llama.cpp would read this tokenizer otherwise\n  text          {text:?}\n  tokenizer     {tokenizer:?}\n  llama.cpp     {llama_cpp:?}\nhint: llama.cpp has no pre-tokenizer that does the same; --no-tokenizer-proof writes the file all the same, and the model will read text worse than it could"
    )]
    Differs {
        /// The tokenizer's file.
        path: PathBuf,
        /// The first text that differs, cut down to what makes the difference.
        text: String,
        /// The identifiers that the checkpoint's tokenizer gives.
        tokenizer: Vec<u32>,
        /// Those of llama.cpp.
        llama_cpp: Vec<u32>,
    },
    /// The tokenizers crate does not take the folder's tokenizer.
    #[error("{path}: the tokenizers library does not read it: {why}")]
    Reference {
        /// The file.
        path: PathBuf,
        /// What it said.
        why: String,
    },
    /// llama.cpp does not take the vocabulary.
    #[error("{path}: {source}")]
    LlamaCpp {
        /// The tokenizer's file.
        path: PathBuf,
        /// What it said.
        source: LlamaCppError,
    },
    /// The vocabulary cannot be written to a temporary file.
    #[error("the vocabulary cannot be written to a temporary file: {0}")]
    Write(#[from] GgufError),
}

impl Proof {
    /// The keys `pipit.tokenizer.proof.*`.
    pub fn to_metadata(&self) -> Vec<(String, Value)> {
        let number = |n: usize| Value::from(u32::try_from(n).unwrap_or(u32::MAX));
        vec![
            ("pipit.tokenizer.proof.texts".to_owned(), number(self.texts)),
            ("pipit.tokenizer.proof.pieces".to_owned(), number(self.pieces)),
            (
                "pipit.tokenizer.proof.sha256".to_owned(),
                self.sha256.as_str().into(),
            ),
        ]
    }
}

impl Vocab {
    /// Compares llama.cpp with the tokenizer of `dir`, of which this vocabulary was read. `name` is what will stand in
    /// `general.name`: llama.cpp gives the added tokens of a model that is called Phi-3 another meaning. What was
    /// listed in [`Vocab::limits`] and turns out to be no limit is taken from there.
    pub fn prove(&mut self, dir: &Path, name: &str) -> Result<Proof, ProofError> {
        if is_phi3(name) {
            self.limits.retain(|limit| *limit != Limit::Strip);
        }
        let (theirs, reference) = rayon::join(|| load(self, dir, name), || reference::load(self, dir));
        let (tokenizer, aliases) = reference?;
        let mut pair = Pair {
            llama_cpp: theirs?,
            tokenizer,
            aliases,
        };
        let overridden = pair.overridden(self);
        if !overridden.is_empty() {
            self.limits.push(Limit::Overridden);
            pair.take_whole(dir, &overridden)?;
        }
        let corpus::Corpus { texts, pieces } = corpus::of(self);
        // Around a text stand the tokens that begin and end it; that needs few texts.
        let around = |at: usize| at < corpus::FIXED;
        let differs = |(at, text): (usize, &String)| {
            pair.differs(text, false) || (around(at) && pair.differs(text, true))
        };
        if let Some(at) = texts.par_iter().enumerate().position_first(differs) {
            return Err(pair.explain(dir, &texts[at]));
        }
        let mut hash = Sha256::new();
        for text in &texts {
            hash.update(text.as_bytes());
            hash.update([0]);
        }
        Ok(Proof {
            texts: texts.len(),
            pieces,
            sha256: checksum::hex(&hash.finalize()),
        })
    }
}

impl Vocab {
    /// Tells the user of what llama.cpp will not do for this vocabulary.
    pub fn warn_of_limits(&self) {
        for limit in &self.limits {
            tracing::warn!("tokenizer: {}", limit.meaning());
        }
    }
}

/// Writes a GGUF file without tensors, and lets llama.cpp read it.
fn load(vocab: &Vocab, dir: &Path, name: &str) -> Result<LlamaModel, ProofError> {
    let mut metadata = vec![
        ("general.architecture".to_owned(), "llama".into()),
        ("general.name".to_owned(), name.into()),
    ];
    metadata.extend(vocab.to_metadata());
    let header = Header {
        metadata,
        tensors: Vec::new(),
    };
    let file = tempfile::NamedTempFile::new().map_err(GgufError::Write)?;
    let out = BufWriter::new(file.as_file());
    Writer::new(out, &header)?
        .finish()?
        .flush()
        .map_err(GgufError::Write)?;
    drop(header);
    let params = LlamaModelParams::default().with_vocab_only(true);
    llama_cpp::load(file.path(), &params).map_err(|source| ProofError::LlamaCpp {
        path: reference::path(dir),
        source,
    })
}

/// The two that must agree.
struct Pair {
    llama_cpp: LlamaModel,
    tokenizer: Tokenizer,
    /// Identifiers that stand for others in it.
    aliases: HashMap<u32, u32>,
}

impl Pair {
    /// The identifiers that llama.cpp gives. `around`: with the tokens that begin and end a text.
    fn llama_cpp(&self, text: &str, around: bool) -> Vec<u32> {
        let tokens = self.llama_cpp.vocab().tokenize(text.as_bytes(), around, true);
        tokens.iter().map(|token| token.0.cast_unsigned()).collect()
    }

    /// Those of the checkpoint's tokenizer; none where it fails, which llama.cpp never does.
    fn tokenizer(&self, text: &str, around: bool) -> Option<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, around).ok()?;
        let own = |id: &u32| *self.aliases.get(id).unwrap_or(id);
        Some(encoding.get_ids().iter().map(own).collect())
    }

    /// Ordinary tokens that llama.cpp takes for control tokens, by a list of texts in its source.
    fn overridden(&self, vocab: &Vocab) -> Vec<String> {
        let theirs = self.llama_cpp.vocab();
        let whole = [CONTROL, USER_DEFINED, UNKNOWN];
        let tokens = vocab.tokens.iter().zip(&vocab.kinds).zip(0..);
        tokens
            .filter(|((_, kind), _)| !whole.contains(*kind))
            .filter(|(_, id)| theirs.attr(LlamaToken(*id)).contains(LlamaTokenAttr::Control))
            .map(|((token, _), _)| token.clone())
            .collect()
    }

    /// Lets the tokenizer find these tokens whole, too.
    fn take_whole(&mut self, dir: &Path, tokens: &[String]) -> Result<(), ProofError> {
        let tokens = tokens.iter().map(|token| AddedToken::from(token.clone(), true));
        let done = self.tokenizer.add_special_tokens(tokens);
        done.map(|_| ()).map_err(|why| ProofError::Reference {
            path: reference::path(dir),
            why: why.to_string(),
        })
    }

    fn differs(&self, text: &str, around: bool) -> bool {
        self.tokenizer(text, around) != Some(self.llama_cpp(text, around))
    }

    fn explain(&self, dir: &Path, text: &str) -> ProofError {
        let around = !self.differs(text, false);
        let text = shrink::shrink(text, |text| self.differs(text, around));
        ProofError::Differs {
            path: reference::path(dir),
            tokenizer: self.tokenizer(&text, around).unwrap_or_default(),
            llama_cpp: self.llama_cpp(&text, around),
            text,
        }
    }
}
