//! A vocabulary: the one thing that `tokenizer.json` (or `tokenizer.model`) and a GGUF file's `tokenizer.*` keys
//! both say, in their own ways.
//!
//! Data in: a GGUF file, or a checkpoint folder. Data out: the other one. Source: llama.cpp conversion/base.py
//! (`get_vocab_base`, `_create_vocab_sentencepiece`), gguf-py/gguf/vocab.py (`SpecialVocab`), src/llama-vocab.cpp.

mod added;
mod byte_level;
mod check;
mod from_folder;
mod metadata;
pub mod pre;
pub mod proof;
mod sentencepiece;
mod special;
mod template;
mod to_folder;
mod tokenizer_json;

use std::path::PathBuf;

pub(crate) use metadata::copied;
use pre::PreTokenizer;
pub use special::SpecialIds;
pub use template::{TemplateError, Templates};
pub(crate) use to_folder::pretty;

use crate::checkpoint::CheckpointError;
use crate::gguf::GgufError;

/// `tokenizer.ggml.token_type` of an ordinary token.
pub const NORMAL: i32 = 1;
/// Of the token that stands for what has none.
pub const UNKNOWN: i32 = 2;
/// Of a token that steers: never made from plain text, not shown.
pub const CONTROL: i32 = 3;
/// Of a token that was added and is found in plain text as a whole.
pub const USER_DEFINED: i32 = 4;
/// Of an identifier that stands for nothing.
pub const UNUSED: i32 = 5;
/// Of a token that is one byte, `<0x0A>`.
pub const BYTE: i32 = 6;

/// SentencePiece's spelling of a space.
const SPACE: char = '\u{2581}';

/// What can be wrong with a vocabulary.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VocabError {
    /// The tokenizer has another algorithm, or a part that is not built.
    #[error(
        "{path}: {what} is not supported\nhint: byte-level BPE is built, split as {} split it, and SentencePiece's BPE with byte fallback",
        pre::names()
    )]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The part, with its value.
        what: String,
    },
    /// The tokenizer's file says something that cannot be.
    #[error("{path}: {why}")]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A chat template is hostile, endless, or no Jinja.
    #[error("{path}: the chat template {name:?} {source}")]
    Template {
        /// The file.
        path: PathBuf,
        /// The template's name.
        name: String,
        /// What is wrong.
        source: TemplateError,
    },
    /// A file of the folder cannot be read.
    #[error(transparent)]
    Folder(#[from] CheckpointError),
    /// A key of the GGUF file is missing or has another type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

/// A vocabulary with all that is needed to use it.
#[derive(Debug, Clone)]
pub struct Vocab {
    /// How text becomes tokens.
    pub model: Model,
    /// The token of each identifier. Byte-level BPE spells bytes as letters (`Ġthe`), SentencePiece a space as
    /// U+2581; tokens that were added stand as they are.
    pub tokens: Vec<String>,
    /// [`NORMAL`], [`UNKNOWN`], [`CONTROL`], [`USER_DEFINED`], [`UNUSED`] or [`BYTE`], per identifier.
    pub kinds: Vec<i32>,
    /// The special tokens that have a role.
    pub special: SpecialIds,
    /// Whether encoding a text puts the begin-of-sequence token before it.
    pub add_bos: bool,
    /// Whether encoding a text puts the end-of-sequence token after it.
    pub add_eos: bool,
    /// Whether encoding a text puts a space before it, where the source says so at all. Byte-level BPE in llama.cpp
    /// carries the flag and does not act on it.
    pub add_space_prefix: Option<bool>,
    /// Whether added tokens swallow the white space behind them, as llama.cpp has it for models that are called Phi-3.
    pub strips: bool,
    /// The chat templates.
    pub templates: Templates,
    /// What the checkpoint's tokenizer does and llama.cpp does not.
    pub limits: Vec<Limit>,
}

/// How text becomes tokens.
#[derive(Debug, Clone)]
pub enum Model {
    /// `gpt2`: text is cut, its bytes are spelled as letters, and pairs are merged in the order of a list.
    Bpe {
        /// How text is cut.
        pre: &'static PreTokenizer,
        /// The merges in their order, each `left right`.
        merges: Vec<String>,
    },
    /// `llama`: neighbours are merged whose joint token has the highest score; what has no token becomes bytes.
    SentencePiece {
        /// A score for each identifier.
        scores: Vec<f32>,
        /// `tokenizer.ggml.remove_extra_whitespaces`, where the source says so. llama.cpp carries it.
        remove_extra_whitespaces: Option<bool>,
    },
}

impl Model {
    /// The value of `tokenizer.ggml.model`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bpe { .. } => "gpt2",
            Self::SentencePiece { .. } => "llama",
        }
    }

    /// The value of `tokenizer.ggml.pre`.
    pub fn pre(&self) -> &'static str {
        match self {
            Self::Bpe { pre, .. } => pre.name,
            Self::SentencePiece { .. } => "default",
        }
    }
}

/// Something that a checkpoint's tokenizer does to text and llama.cpp cannot: it is left out, and said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// Text is brought to Unicode's form NFC first.
    Nfc,
    /// A space is put only before the first stretch of text, and only if there is none; llama.cpp puts one before
    /// every stretch that follows a special token.
    SpaceOnce,
    /// Runs of spaces are tokens that users defined. llama.cpp takes the longest first, as SentencePiece itself does;
    /// the tokenizers library merges them, which ends otherwise for runs longer than the longest.
    Runs,
    /// Words are cut where small letters turn large in any script; llama.cpp knows only those of ASCII.
    Case,
    /// llama.cpp takes ordinary tokens for control tokens because of their text (`</s>` in Qwen's vocabulary).
    Overridden,
    /// Added tokens swallow white space beside them (`lstrip`, `rstrip`).
    Strip,
    /// Added tokens are found only as whole words (`single_word`).
    SingleWord,
}

impl Limit {
    /// The name in `pipit.tokenizer.limits`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nfc => "nfc",
            Self::SpaceOnce => "space_once",
            Self::Runs => "runs",
            Self::Case => "case",
            Self::Overridden => "overridden",
            Self::Strip => "strip",
            Self::SingleWord => "single_word",
        }
    }

    /// What a user should know of it.
    fn meaning(self) -> &'static str {
        match self {
            Self::Nfc => {
                "the tokenizer normalises text to NFC and llama.cpp does not: give it text that is in NFC, as nearly all text is"
            }
            Self::SpaceOnce => {
                "the tokenizer puts a space before a text that has none; llama.cpp puts one before every text, and after every special token"
            }
            Self::Runs => {
                "llama.cpp cuts runs of spaces as SentencePiece does, the longest token first, and transformers' fast tokenizer does not"
            }
            Self::Case => {
                "the tokenizer cuts words where small letters turn large; llama.cpp does so in ASCII only, and does not keep accents that are characters of their own with their letter"
            }
            Self::Overridden => {
                "llama.cpp takes some ordinary tokens, such as </s>, for control tokens because of their text"
            }
            Self::Strip => {
                "some added tokens swallow the white space beside them (lstrip, rstrip), and llama.cpp keeps it"
            }
            Self::SingleWord => {
                "some added tokens are whole words only (single_word), and llama.cpp finds them inside of words too"
            }
        }
    }
}

/// Whether llama.cpp lets the special tokens of a model of this name swallow the white space behind them
/// (llama-vocab.cpp, `load`).
fn is_phi3(name: &str) -> bool {
    let name = name.to_lowercase();
    name.contains("phi-3") || name.contains("phi3")
}

/// The file that is being read, for messages.
struct At(PathBuf);

impl At {
    fn unsupported(&self, what: impl Into<String>) -> VocabError {
        VocabError::Unsupported {
            path: self.0.clone(),
            what: what.into(),
        }
    }

    fn broken(&self, why: impl Into<String>) -> VocabError {
        VocabError::Broken {
            path: self.0.clone(),
            why: why.into(),
        }
    }
}
