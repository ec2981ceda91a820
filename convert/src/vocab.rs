//! A byte-level BPE vocabulary: the one thing that `tokenizer.json` and a GGUF file's `tokenizer.ggml.*` keys
//! both say, in their own ways.
//!
//! Data in: a GGUF file, or a checkpoint folder. Data out: the other one. Source: llama.cpp conversion/base.py
//! (`get_vocab_base`), gguf-py/gguf/vocab.py (`SpecialVocab`), src/llama-vocab.cpp.

mod from_folder;
pub mod pre;
mod to_folder;

use std::collections::HashMap;
use std::path::PathBuf;

use pre::PreTokenizer;
pub(crate) use to_folder::pretty;

use crate::checkpoint::CheckpointError;
use crate::gguf::{Array, Gguf, GgufError, Value};

/// `tokenizer.ggml.token_type` of an ordinary token.
pub const NORMAL: i32 = 1;
/// Of a token that steers: never made from plain text, not shown.
pub const CONTROL: i32 = 3;
/// Of a token that was added and is found in plain text as a whole.
pub const USER_DEFINED: i32 = 4;
/// Of an identifier that stands for nothing.
pub const UNUSED: i32 = 5;

/// What can be wrong with a vocabulary.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VocabError {
    /// The tokenizer has another algorithm, or a part that is not built.
    #[error(
        "{path}: {what} is not supported\nhint: byte-level BPE is built so far, split as {} split it",
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
    /// How text is cut before the merges are applied.
    pub pre: &'static PreTokenizer,
    /// The token of each identifier, in byte-level spelling (`Ġthe`); special ones as they are.
    pub tokens: Vec<String>,
    /// [`NORMAL`], [`CONTROL`], [`USER_DEFINED`] or [`UNUSED`], per identifier.
    pub kinds: Vec<i32>,
    /// The merges in their order, each `left right`.
    pub merges: Vec<String>,
    /// The special tokens that have a role.
    pub special: SpecialIds,
    /// Whether encoding a text puts the begin-of-sequence token before it.
    pub add_bos: bool,
    /// Whether encoding a text puts the end-of-sequence token after it.
    pub add_eos: bool,
    /// Whether encoding a text puts a space before it, where the source says so at all.
    pub add_space_prefix: Option<bool>,
    /// The chat template, Jinja.
    pub chat_template: Option<String>,
}

/// The identifiers of the special tokens, by role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the role in its name")]
pub struct SpecialIds {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub sep: Option<u32>,
    pub pad: Option<u32>,
    pub mask: Option<u32>,
    /// The end of a turn, where it differs from the end of a text.
    pub eot: Option<u32>,
}

impl SpecialIds {
    /// Every role: Hugging Face's name, the GGUF key, the identifier.
    pub fn roles(&self) -> [(&'static str, &'static str, Option<u32>); 7] {
        [
            ("bos", "tokenizer.ggml.bos_token_id", self.bos),
            ("eos", "tokenizer.ggml.eos_token_id", self.eos),
            ("unk", "tokenizer.ggml.unknown_token_id", self.unk),
            ("sep", "tokenizer.ggml.seperator_token_id", self.sep),
            ("pad", "tokenizer.ggml.padding_token_id", self.pad),
            ("mask", "tokenizer.ggml.mask_token_id", self.mask),
            ("eot", "tokenizer.ggml.eot_token_id", self.eot),
        ]
    }

    fn slots(&mut self) -> [(&'static str, &mut Option<u32>); 7] {
        [
            ("tokenizer.ggml.bos_token_id", &mut self.bos),
            ("tokenizer.ggml.eos_token_id", &mut self.eos),
            ("tokenizer.ggml.unknown_token_id", &mut self.unk),
            ("tokenizer.ggml.seperator_token_id", &mut self.sep),
            ("tokenizer.ggml.padding_token_id", &mut self.pad),
            ("tokenizer.ggml.mask_token_id", &mut self.mask),
            ("tokenizer.ggml.eot_token_id", &mut self.eot),
        ]
    }
}

impl Vocab {
    /// Reads the vocabulary of a GGUF file.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, VocabError> {
        let path = || gguf.path().to_path_buf();
        let unsupported = |what: String| VocabError::Unsupported { path: path(), what };
        let model = gguf.string("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(unsupported(format!("the tokenizer model {model:?}")));
        }
        let name = gguf.string("tokenizer.ggml.pre")?;
        let pre = pre::by_name(name).ok_or_else(|| unsupported(format!("the pre-tokenizer {name:?}")))?;
        let tokens = gguf.strings("tokenizer.ggml.tokens")?.to_vec();
        let kinds = match gguf.get("tokenizer.ggml.token_type") {
            None => vec![NORMAL; tokens.len()],
            Some(Value::Array(Array::I32(kinds))) => kinds.clone(),
            Some(_) => {
                return Err(gguf
                    .key_error("tokenizer.ggml.token_type", "is no array of i32")
                    .into());
            }
        };
        let mut special = SpecialIds::default();
        for (key, slot) in special.slots() {
            *slot = gguf
                .unsigned_opt(key)?
                .map(|id| u32::try_from(id).unwrap_or(u32::MAX));
        }
        let chat_template = match gguf.get("tokenizer.chat_template") {
            None => None,
            Some(_) => Some(gguf.string("tokenizer.chat_template")?.to_owned()),
        };
        let vocab = Self {
            pre,
            tokens,
            kinds,
            merges: gguf.strings("tokenizer.ggml.merges")?.to_vec(),
            special,
            add_bos: gguf
                .bool_opt("tokenizer.ggml.add_bos_token")?
                .unwrap_or(pre.add_bos),
            add_eos: gguf.bool_opt("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            add_space_prefix: gguf.bool_opt("tokenizer.ggml.add_space_prefix")?,
            chat_template,
        };
        vocab
            .check()
            .map_err(|why| VocabError::Broken { path: path(), why })?;
        Ok(vocab)
    }

    /// The `tokenizer.*` keys of a GGUF file, in the order in which llama.cpp's converter writes them.
    pub fn to_metadata(&self) -> Vec<(String, Value)> {
        let mut keys: Vec<(String, Value)> = Vec::new();
        let mut add = |key: &str, value: Value| keys.push((key.to_owned(), value));
        if let Some(space) = self.add_space_prefix {
            add("tokenizer.ggml.add_space_prefix", space.into());
        }
        add("tokenizer.ggml.model", "gpt2".into());
        add("tokenizer.ggml.pre", self.pre.name.into());
        add("tokenizer.ggml.tokens", self.tokens.clone().into());
        add(
            "tokenizer.ggml.token_type",
            Value::Array(Array::I32(self.kinds.clone())),
        );
        add("tokenizer.ggml.merges", self.merges.clone().into());
        for (_, key, id) in self.special.roles() {
            if let Some(id) = id {
                add(key, id.into());
            }
        }
        add("tokenizer.ggml.add_bos_token", self.add_bos.into());
        add("tokenizer.ggml.add_eos_token", self.add_eos.into());
        if let Some(template) = &self.chat_template {
            add("tokenizer.chat_template", template.as_str().into());
        }
        keys
    }

    /// Whether the numbers fit together, and the loader of llama.cpp would not abort on them.
    fn check(&self) -> Result<(), String> {
        let n = self.tokens.len();
        if self.kinds.len() != n {
            return Err(format!("{n} tokens, but {} token types", self.kinds.len()));
        }
        let mut ids: HashMap<&str, usize> = HashMap::with_capacity(n);
        for (id, token) in self.tokens.iter().enumerate() {
            if token.is_empty() {
                return Err(format!("token {id} is empty"));
            }
            if let Some(other) = ids.insert(token, id) {
                return Err(format!("tokens {other} and {id} are both {token:?}"));
            }
        }
        for merge in &self.merges {
            let whole = merge.split_once(' ').filter(|(left, right)| {
                ids.contains_key(left)
                    && ids.contains_key(right)
                    && ids.contains_key(format!("{left}{right}").as_str())
            });
            if whole.is_none() {
                return Err(format!(
                    "the merge {merge:?} needs a token that is not in the vocabulary"
                ));
            }
        }
        for (role, _, id) in self.special.roles() {
            if let Some(id) = id.filter(|id| *id as usize >= n) {
                return Err(format!("the {role} token is {id}, and there are {n} tokens"));
            }
        }
        for (add, role, id) in [
            (self.add_bos, "bos", self.special.bos),
            (self.add_eos, "eos", self.special.eos),
        ] {
            if add && id.is_none() {
                return Err(format!("a {role} token is to be added, and there is none"));
            }
        }
        Ok(())
    }
}
