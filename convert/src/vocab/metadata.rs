//! The `tokenizer.*` keys of a GGUF file.

use std::collections::HashSet;

use super::{At, Model, NORMAL, SpecialIds, Templates, Vocab, VocabError, is_phi3, pre};
use crate::gguf::{Array, Gguf, Value};

impl Vocab {
    /// Reads the vocabulary of a GGUF file.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, VocabError> {
        let path = || gguf.path().to_path_buf();
        let unsupported = |what: String| VocabError::Unsupported { path: path(), what };
        let model = match gguf.string("tokenizer.ggml.model")? {
            "gpt2" => {
                let name = gguf.string("tokenizer.ggml.pre")?;
                let pre =
                    pre::by_name(name).ok_or_else(|| unsupported(format!("the pre-tokenizer {name:?}")))?;
                let merges = gguf.strings("tokenizer.ggml.merges")?.to_vec();
                Model::Bpe { pre, merges }
            }
            "llama" => Model::SentencePiece {
                scores: scores(gguf)?,
                remove_extra_whitespaces: gguf.bool_opt("tokenizer.ggml.remove_extra_whitespaces")?,
            },
            other => return Err(unsupported(format!("the tokenizer model {other:?}"))),
        };
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
        // What the loader takes where the file does not say (llama-vocab.cpp, `load`).
        let (add_bos, add_space_prefix) = match &model {
            Model::Bpe { pre, .. } => (pre.add_bos, None),
            Model::SentencePiece { .. } => (true, Some(true)),
        };
        let vocab = Self {
            special: special(gguf, &model)?,
            tokens,
            kinds,
            model,
            add_bos: gguf.bool_opt("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos),
            add_eos: gguf.bool_opt("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            add_space_prefix: gguf
                .bool_opt("tokenizer.ggml.add_space_prefix")?
                .or(add_space_prefix),
            strips: gguf
                .get("general.name")
                .and_then(Value::as_str)
                .is_some_and(is_phi3),
            templates: Templates::from_gguf(gguf)?,
            limits: Vec::new(),
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
        add("tokenizer.ggml.model", self.model.name().into());
        add("tokenizer.ggml.pre", self.model.pre().into());
        add("tokenizer.ggml.tokens", self.tokens.clone().into());
        if let Model::SentencePiece {
            scores,
            remove_extra_whitespaces,
        } = &self.model
        {
            add("tokenizer.ggml.scores", Value::Array(Array::F32(scores.clone())));
            if let Some(remove) = *remove_extra_whitespaces {
                add("tokenizer.ggml.remove_extra_whitespaces", remove.into());
            }
        }
        add(
            "tokenizer.ggml.token_type",
            Value::Array(Array::I32(self.kinds.clone())),
        );
        if let Model::Bpe { merges, .. } = &self.model {
            add("tokenizer.ggml.merges", merges.clone().into());
        }
        for (_, key, id) in self.special.roles() {
            if let Some(id) = id {
                add(key, id.into());
            }
        }
        add("tokenizer.ggml.add_bos_token", self.add_bos.into());
        add("tokenizer.ggml.add_eos_token", self.add_eos.into());
        keys.extend(self.templates.to_metadata());
        if !self.limits.is_empty() {
            let names: Vec<_> = self.limits.iter().map(|limit| limit.name().to_owned()).collect();
            keys.push(("pipit.tokenizer.limits".into(), names.into()));
        }
        keys
    }
}

/// The keys of a GGUF file that say what its tokenizer is, unchanged, also those that are not understood here: the new
/// file reads text as the old one did. `rows` is the number of rows of the embeddings.
pub(crate) fn copied(gguf: &Gguf, rows: Option<u64>) -> Result<Vec<(String, Value)>, VocabError> {
    let tokens = gguf.strings("tokenizer.ggml.tokens")?;
    let at = At(gguf.path().to_path_buf());
    if let Some(rows) = rows.filter(|rows| *rows != tokens.len() as u64) {
        return Err(at.broken(format!(
            "the embeddings have {rows} rows, and there are {} tokens",
            tokens.len()
        )));
    }
    let mut seen = HashSet::with_capacity(tokens.len());
    if let Some(token) = tokens.iter().find(|token| !seen.insert(token.as_str())) {
        return Err(at.broken(format!("the token {token:?} stands twice in the vocabulary")));
    }
    Templates::from_gguf(gguf)?;
    let keys = gguf
        .metadata()
        .iter()
        .filter(|(key, _)| key.starts_with("tokenizer.") || key.starts_with("pipit.tokenizer."));
    Ok(keys.cloned().collect())
}

/// Old files have scores as integers.
fn scores(gguf: &Gguf) -> Result<Vec<f32>, VocabError> {
    match gguf.get("tokenizer.ggml.scores") {
        Some(Value::Array(Array::F32(scores))) => Ok(scores.clone()),
        Some(Value::Array(Array::I32(scores))) => Ok(scores.iter().map(|score| *score as f32).collect()),
        Some(_) => Err(gguf
            .key_error("tokenizer.ggml.scores", "is no array of f32")
            .into()),
        None => Err(gguf.key_error("tokenizer.ggml.scores", "is missing").into()),
    }
}

fn special(gguf: &Gguf, model: &Model) -> Result<SpecialIds, VocabError> {
    let mut special = SpecialIds::default();
    if let Model::SentencePiece { .. } = model {
        // The loader's own, where the file does not say.
        (special.unk, special.bos, special.eos) = (Some(0), Some(1), Some(2));
    }
    for (key, slot) in special.slots() {
        if let Some(id) = gguf.unsigned_opt(key)? {
            *slot = Some(u32::try_from(id).unwrap_or(u32::MAX));
        }
    }
    Ok(special)
}
