//! Added tokens: which there are, and how they lie over the vocabulary of the model.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::{At, CONTROL, Limit, SPACE, UNUSED, USER_DEFINED, VocabError};
use crate::checkpoint::read_json_object;

/// An added token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Added {
    pub(super) id: u64,
    pub(super) content: String,
    pub(super) special: bool,
    pub(super) limits: Vec<Limit>,
}

/// One token of a model that is being put together: what it is, and its kind.
pub(super) type Slot = Option<(String, i32)>;

/// Those of `tokenizer.json`, of `added_tokens_decoder` in `tokenizer_config.json`, and of `added_tokens.json`; the
/// first that names an identifier or a text wins.
pub(super) fn collect(
    at: &At,
    dir: &Path,
    of_tokenizer: &[Json],
    tokenizer_config: &Map<String, Json>,
) -> Result<Vec<Added>, VocabError> {
    let mut added: Vec<Added> = Vec::new();
    for token in of_tokenizer {
        added.push(read(at, token.get("id").and_then(Json::as_u64), token)?);
    }
    let mut new = Vec::new();
    if let Some(decoder) = tokenizer_config
        .get("added_tokens_decoder")
        .and_then(Json::as_object)
    {
        for (id, token) in decoder {
            new.push(read(at, id.parse().ok(), token)?);
        }
    }
    let older = dir.join("added_tokens.json");
    if older.is_file() {
        for (content, id) in read_json_object(&older)? {
            let Some(id) = id.as_u64() else {
                return Err(At(older).broken(format!("the added token {content:?} has no number")));
            };
            new.push(Added {
                id,
                content,
                special: false,
                limits: Vec::new(),
            });
        }
    }
    for token in new {
        let known = |other: &Added| other.id == token.id || other.content == token.content;
        if !added.iter().any(known) {
            added.push(token);
        }
    }
    Ok(added)
}

fn read(at: &At, id: Option<u64>, token: &Json) -> Result<Added, VocabError> {
    let content = token.get("content").and_then(Json::as_str);
    let (Some(id), Some(content)) = (id, content) else {
        return Err(at.broken(format!("the added token {token} has no id or no content")));
    };
    let flag = |key: &str| token.get(key).and_then(Json::as_bool).unwrap_or(false);
    let mut limits = Vec::new();
    if flag("lstrip") || flag("rstrip") {
        limits.push(Limit::Strip);
    }
    if flag("single_word") {
        limits.push(Limit::SingleWord);
    }
    Ok(Added {
        id,
        content: content.to_owned(),
        special: flag("special"),
        limits,
    })
}

impl Added {
    /// Its text and kind in a GGUF file (conversion/base.py, `get_vocab_base`).
    fn spelled(&self) -> (String, i32) {
        if self.special || looks_special(&self.content) {
            (self.content.clone(), CONTROL)
        } else {
            // As llama.cpp's converter: SentencePiece's space is a space in tokens that users defined.
            (self.content.replace(SPACE, " "), USER_DEFINED)
        }
    }

    /// Whether it stands for spaces that llama.cpp will find in text before anything is merged.
    pub(super) fn is_run(&self) -> bool {
        !self.special && self.content.contains(SPACE)
    }

    /// Puts it over the tokens of the model. False if there is no row for it.
    pub(super) fn lay_over(&self, at: &At, tokens: &mut [Slot]) -> Result<bool, VocabError> {
        let place = usize::try_from(self.id).ok().and_then(|id| tokens.get_mut(id));
        let Some(slot) = place else {
            return Ok(false);
        };
        match slot {
            Some((other, kind)) if *other != self.content && *kind != UNUSED => Err(at.broken(format!(
                "tokens {other:?} and {:?} are both number {}",
                self.content, self.id
            ))),
            _ => {
                *slot = Some(self.spelled());
                Ok(true)
            }
        }
    }
}

/// Added tokens that steer, though their file forgets to say so (conversion/base.py, `does_token_look_special`).
fn looks_special(token: &str) -> bool {
    matches!(token, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || (token.starts_with("<|") && token.ends_with("|>"))
        || (token.starts_with("<｜") && token.ends_with("｜>"))
        || (token.starts_with("<unused") && token.ends_with('>'))
}

/// The tokens of `model.vocab` by identifier. `size` is the number of rows of the embeddings.
pub(super) fn slots(
    at: &At,
    vocab: Vec<(String, u64)>,
    size: usize,
    kind: impl Fn(&str) -> i32,
) -> Result<Vec<Slot>, VocabError> {
    let mut slots: Vec<Slot> = vec![None; size];
    for (token, id) in vocab {
        let place = usize::try_from(id).ok().and_then(|id| slots.get_mut(id));
        let slot = place.ok_or_else(|| no_row(at, &token, id, size))?;
        if let Some((other, _)) = slot {
            return Err(at.broken(format!("tokens {other:?} and {token:?} are both number {id}")));
        }
        let kind = kind(&token);
        *slot = Some((token, kind));
    }
    Ok(slots)
}

/// A token for which the embeddings have no row.
pub(super) fn no_row(at: &At, token: &str, id: u64, size: usize) -> VocabError {
    at.broken(format!(
        "token {token:?} is number {id}, and vocab_size in config.json is {size}\nhint: the tokenizer has grown and the embeddings have not, or they are of different models"
    ))
}

/// The text and kind of every identifier; those without a token are filled up.
pub(super) fn filled(slots: Vec<Slot>) -> (Vec<String>, Vec<i32>) {
    let slots = slots.into_iter().enumerate();
    slots
        .map(|(id, slot)| slot.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)))
        .unzip()
}
