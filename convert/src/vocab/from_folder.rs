//! Reads the vocabulary of a checkpoint folder: `tokenizer.json`, `tokenizer_config.json`,
//! `chat_template.jinja`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::{CONTROL, NORMAL, SpecialIds, UNUSED, USER_DEFINED, Vocab, VocabError, pre};
use crate::checkpoint::{CheckpointError, read_json_object};

/// The tokens that llama.cpp takes for the end of a turn (llama-vocab.cpp), the likeliest first.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
];

/// An added token of `tokenizer.json`.
struct Added {
    id: u32,
    content: String,
    special: bool,
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

impl Vocab {
    /// Reads the folder. `config` is its `config.json`; its `vocab_size` is the number of rows of the
    /// embeddings, and identifiers without a token are filled up with `[PADn]`.
    pub fn from_folder(dir: &Path, config: &Map<String, Json>) -> Result<Self, VocabError> {
        let path = dir.join("tokenizer.json");
        let at = At(path.clone());
        if !path.is_file() {
            let other = dir.join("tokenizer.model").is_file();
            return Err(at.broken(if other {
                "it does not exist, and tokenizer.model (SentencePiece) is not read yet"
            } else {
                "it does not exist\nhint: a checkpoint needs its tokenizer.json beside config.json"
            }));
        }
        let json = read_json_object(&path)?;
        let config_path = dir.join("tokenizer_config.json");
        let tokenizer_config = if config_path.is_file() {
            read_json_object(&config_path)?
        } else {
            Map::new()
        };

        let model = json.get("model").unwrap_or(&Json::Null);
        let ignore_merges = check_model(&at, &json, model)?;
        let pre_tokenizer = json.get("pre_tokenizer").unwrap_or(&Json::Null);
        let pre = pre::by_structure(pre_tokenizer, ignore_merges).ok_or_else(|| {
            at.unsupported(format!(
                "the pre_tokenizer {pre_tokenizer} with ignore_merges {ignore_merges}"
            ))
        })?;
        let added = added_tokens(&at, &json)?;
        let size = config.get("vocab_size").and_then(Json::as_u64).unwrap_or(0) as usize;
        let (tokens, kinds) = tokens(&at, model, &added, size)?;
        let mut special = special_ids(&tokenizer_config, &added, config);
        let (add_bos, add_eos) = added_around(&at, &json, &tokenizer_config, &special, &tokens)?;
        special.eot = special.eot.or_else(|| end_of_turn(&special, &tokens, &kinds));
        let vocab = Self {
            pre,
            tokens,
            kinds,
            merges: merges(&at, model)?,
            special,
            add_bos: add_bos.unwrap_or(false),
            add_eos: add_eos.unwrap_or(false),
            add_space_prefix: tokenizer_config.get("add_prefix_space").and_then(Json::as_bool),
            chat_template: chat_template(dir, &tokenizer_config)?,
        };
        vocab.check().map_err(|why| at.broken(why))?;
        Ok(vocab)
    }
}

/// Refuses what byte-level BPE in llama.cpp does not do. Returns `ignore_merges`.
fn check_model(at: &At, json: &Map<String, Json>, model: &Json) -> Result<bool, VocabError> {
    let kind = model.get("type").and_then(Json::as_str).unwrap_or("BPE");
    if kind != "BPE" {
        return Err(at.unsupported(format!("a tokenizer model of type {kind}")));
    }
    for key in [
        "byte_fallback",
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
    ] {
        match model.get(key) {
            None | Some(Json::Null | Json::Bool(false)) => {}
            Some(Json::String(text)) if text.is_empty() => {}
            Some(value) => return Err(at.unsupported(format!("model.{key} = {value}"))),
        }
    }
    if let Some(normalizer) = json.get("normalizer").filter(|value| !value.is_null()) {
        return Err(at.unsupported(format!("the normalizer {normalizer}")));
    }
    let decoder = json
        .get("decoder")
        .and_then(|decoder| decoder.get("type"))
        .and_then(Json::as_str);
    if decoder != Some("ByteLevel") {
        return Err(at.unsupported(format!("the decoder {}", decoder.unwrap_or("(none)"))));
    }
    Ok(model
        .get("ignore_merges")
        .and_then(Json::as_bool)
        .unwrap_or(false))
}

fn added_tokens(at: &At, json: &Map<String, Json>) -> Result<Vec<Added>, VocabError> {
    let empty = Vec::new();
    let list = json
        .get("added_tokens")
        .and_then(Json::as_array)
        .unwrap_or(&empty);
    list.iter()
        .map(|token| {
            let id = token
                .get("id")
                .and_then(Json::as_u64)
                .and_then(|id| u32::try_from(id).ok());
            let content = token.get("content").and_then(Json::as_str);
            let (Some(id), Some(content)) = (id, content) else {
                return Err(at.broken(format!("the added token {token} has no id or no content")));
            };
            for key in ["single_word", "lstrip", "rstrip"] {
                if token.get(key) == Some(&Json::Bool(true)) {
                    tracing::warn!(
                        "{content:?} has {key}, which llama.cpp does not do: it will be found in more places"
                    );
                }
            }
            let special = token.get("special").and_then(Json::as_bool).unwrap_or(false);
            Ok(Added {
                id,
                content: content.to_owned(),
                special,
            })
        })
        .collect()
}

/// The token and its type for each identifier below `size`.
fn tokens(
    at: &At,
    model: &Json,
    added: &[Added],
    size: usize,
) -> Result<(Vec<String>, Vec<i32>), VocabError> {
    let vocab = model
        .get("vocab")
        .and_then(Json::as_object)
        .ok_or_else(|| at.broken("model.vocab is no object"))?;
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; size];
    let too_big = |token: &str, id: u64| {
        at.broken(format!(
            "token {token:?} is number {id}, and vocab_size in config.json is {size}"
        ))
    };
    for (token, id) in vocab {
        let id = id
            .as_u64()
            .ok_or_else(|| at.broken(format!("token {token:?} has no number")))?;
        let slot = tokens.get_mut(id as usize).ok_or_else(|| too_big(token, id))?;
        if let Some((other, _)) = slot.replace((token.clone(), NORMAL)) {
            return Err(at.broken(format!("tokens {other:?} and {token:?} are both number {id}")));
        }
    }
    for token in added {
        let slot = tokens
            .get_mut(token.id as usize)
            .ok_or_else(|| too_big(&token.content, token.id.into()))?;
        if let Some((other, _)) = slot.as_ref().filter(|(other, _)| *other != token.content) {
            return Err(at.broken(format!(
                "tokens {other:?} and {:?} are both number {}",
                token.content, token.id
            )));
        }
        let control = token.special || looks_special(&token.content);
        // As llama.cpp's converter: SentencePiece's space is a space in tokens that users defined.
        let text = if control {
            token.content.clone()
        } else {
            token.content.replace('\u{2581}', " ")
        };
        *slot = Some((text, if control { CONTROL } else { USER_DEFINED }));
    }
    let filled = tokens.into_iter().enumerate();
    Ok(filled
        .map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)))
        .unzip())
}

/// Added tokens that steer, though their file forgets to say so (conversion/base.py).
fn looks_special(token: &str) -> bool {
    matches!(token, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || (token.starts_with("<|") && token.ends_with("|>"))
        || (token.starts_with("<｜") && token.ends_with("｜>"))
        || (token.starts_with("<unused") && token.ends_with('>'))
}

/// `[["a", "b"]]`, or `["a b"]` in older files.
fn merges(at: &At, model: &Json) -> Result<Vec<String>, VocabError> {
    let list = model
        .get("merges")
        .and_then(Json::as_array)
        .ok_or_else(|| at.broken("model.merges is no list"))?;
    list.iter()
        .map(|merge| match merge {
            Json::String(merge) => Ok(merge.clone()),
            Json::Array(pair) => match pair.as_slice() {
                // A space in a token is spelled Ġ, as everywhere in the byte-level alphabet.
                [Json::String(left), Json::String(right)] => {
                    Ok(format!("{} {}", left.replace(' ', "Ġ"), right.replace(' ', "Ġ")))
                }
                _ => Err(at.broken(format!("the merge {merge} is no pair"))),
            },
            _ => Err(at.broken(format!("the merge {merge} is no pair"))),
        })
        .collect()
}

/// As `SpecialVocab` finds them: by text in tokenizer_config.json, else by number in config.json.
fn special_ids(
    tokenizer_config: &Map<String, Json>,
    added: &[Added],
    config: &Map<String, Json>,
) -> SpecialIds {
    let find = |role: &str| {
        let entry = tokenizer_config.get(&format!("{role}_token"));
        let text = entry.and_then(|entry| entry.as_str().or_else(|| entry.get("content")?.as_str()));
        let by_text = text
            .and_then(|text| added.iter().find(|token| token.content == text))
            .map(|token| token.id);
        let by_number = || config.get(&format!("{role}_token_id")).and_then(Json::as_u64);
        by_text.or_else(|| by_number().and_then(|id| u32::try_from(id).ok()))
    };
    SpecialIds {
        bos: find("bos"),
        eos: find("eos"),
        unk: find("unk"),
        sep: find("sep"),
        pad: find("pad"),
        mask: find("mask"),
        eot: find("eot"),
    }
}

/// llama.cpp looks for an end of turn by a list of texts and, with several in the vocabulary, takes whichever
/// its hash map yields first. So it is always named: the end of sequence if that is in the list, else the
/// first of the list that is there.
fn end_of_turn(special: &SpecialIds, tokens: &[String], kinds: &[i32]) -> Option<u32> {
    let listed = |id: u32| {
        tokens
            .get(id as usize)
            .is_some_and(|token| END_OF_TURN.contains(&token.as_str()))
    };
    special.eos.filter(|id| listed(*id)).or_else(|| {
        END_OF_TURN.iter().find_map(|text| {
            let id = tokens
                .iter()
                .zip(kinds)
                .position(|(token, kind)| token == text && *kind == CONTROL)?;
            u32::try_from(id).ok()
        })
    })
}

/// Whether encoding adds bos and eos: the post-processor says it, else tokenizer_config.json.
fn added_around(
    at: &At,
    json: &Map<String, Json>,
    tokenizer_config: &Map<String, Json>,
    special: &SpecialIds,
    tokens: &[String],
) -> Result<(Option<bool>, Option<bool>), VocabError> {
    let flag = |key: &str| tokenizer_config.get(key).and_then(Json::as_bool);
    let mut around = (None, None);
    let post = json.get("post_processor").unwrap_or(&Json::Null);
    let parts = match post.get("processors").and_then(Json::as_array) {
        Some(parts) => parts.iter().collect(),
        None if post.is_null() => Vec::new(),
        None => vec![post],
    };
    let is = |id: Option<u32>, text: &str| {
        id.and_then(|id| tokens.get(id as usize))
            .is_some_and(|t| t == text)
    };
    for part in parts {
        match part.get("type").and_then(Json::as_str) {
            Some("ByteLevel") => around = (around.0.or(Some(false)), around.1.or(Some(false))),
            Some("TemplateProcessing") => {
                let single = part
                    .get("single")
                    .and_then(Json::as_array)
                    .map_or(&[][..], Vec::as_slice);
                let mut seen = (false, false);
                let mut text_seen = false;
                for piece in single {
                    let token = piece
                        .get("SpecialToken")
                        .and_then(|token| token.get("id"))
                        .and_then(Json::as_str);
                    match token {
                        None => text_seen = true,
                        Some(token) if !text_seen && !seen.0 && is(special.bos, token) => seen.0 = true,
                        Some(token) if text_seen && !seen.1 && is(special.eos, token) => seen.1 = true,
                        Some(_) => return Err(at.unsupported(format!("the post_processor {part}"))),
                    }
                }
                around = (Some(seen.0), Some(seen.1));
            }
            _ => return Err(at.unsupported(format!("the post_processor {part}"))),
        }
    }
    Ok((
        around.0.or(flag("add_bos_token")),
        around.1.or(flag("add_eos_token")),
    ))
}

/// transformers lets chat_template.jinja win over tokenizer_config.json; so do we, and say when they differ.
fn chat_template(dir: &Path, tokenizer_config: &Map<String, Json>) -> Result<Option<String>, VocabError> {
    let inline = match tokenizer_config.get("chat_template") {
        Some(Json::String(template)) => Some(template.clone()),
        Some(Json::Array(named)) => {
            if named.len() > 1 {
                tracing::warn!(
                    "of {} chat templates in tokenizer_config.json, only `default` is kept",
                    named.len()
                );
            }
            let default = named
                .iter()
                .find(|entry| entry.get("name").is_some_and(|name| name == "default"));
            default
                .and_then(|entry| entry.get("template")?.as_str())
                .map(str::to_owned)
        }
        _ => None,
    };
    let path = dir.join("chat_template.jinja");
    if !path.is_file() {
        return Ok(inline);
    }
    let file = std::fs::read_to_string(&path).map_err(|source| CheckpointError::Read { path, source })?;
    if inline.is_some_and(|inline| inline != file) {
        tracing::warn!(
            "chat_template.jinja and tokenizer_config.json differ: chat_template.jinja is taken, as transformers does"
        );
    }
    Ok(Some(file))
}
