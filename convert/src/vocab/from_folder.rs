//! Reads the vocabulary of a checkpoint folder: `tokenizer.json` or `tokenizer.model`, `tokenizer_config.json`,
//! `generation_config.json`, `chat_template.jinja`.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::added::{self, Added};
use super::byte_level::{self, Parts};
use super::sentencepiece::{self, ModelProto};
use super::tokenizer_json::{self, ModelJson, TokenizerJson};
use super::{At, Limit, SpecialIds, Templates, Vocab, VocabError};
use crate::checkpoint::{CheckpointError, read_json_object};

/// Whether bos and eos are put around a text.
type Around = (Option<bool>, Option<bool>);

impl Vocab {
    /// Reads the folder. `config` is its `config.json`; its `vocab_size` is the number of rows of the embeddings,
    /// and identifiers without a token are filled up with `[PADn]`.
    pub fn from_folder(dir: &Path, config: &Map<String, Json>) -> Result<Self, VocabError> {
        let optional = |name: &str| {
            let path = dir.join(name);
            if path.is_file() {
                read_json_object(&path)
            } else {
                Ok(Map::new())
            }
        };
        let tokenizer_config = optional("tokenizer_config.json")?;
        let path = dir.join("tokenizer.json");
        let model_path = dir.join("tokenizer.model");
        let size = config.get("vocab_size").and_then(Json::as_u64);
        let size = size.and_then(|size| usize::try_from(size).ok());
        let mut limits = Vec::new();
        let templates = Templates::from_folder(dir, &tokenizer_config)?;

        let (at, source) = if path.is_file() {
            (
                At(path.clone()),
                Source::of_json(&At(path.clone()), dir, &tokenizer_config, size, &mut limits)?,
            )
        } else if model_path.is_file() {
            (
                At(model_path.clone()),
                Source::of_proto(&At(model_path), dir, &tokenizer_config, size)?,
            )
        } else {
            return Err(At(path).broken(
                "it does not exist, and there is no tokenizer.model\nhint: a checkpoint needs its tokenizer.json beside config.json; AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one",
            ));
        };
        let Source {
            parts: (model, tokens, kinds),
            post_processor,
            added,
            space_prefix,
            defaults,
        } = source;

        let mut special = SpecialIds::find(&tokenizer_config, &added, config, &tokens);
        let (add_bos, add_eos) =
            added_around(&at, &post_processor, &tokenizer_config, &mut special, &tokens)?;
        for (slot, default) in [
            (&mut special.unk, defaults.unk),
            (&mut special.bos, defaults.bos),
            (&mut special.eos, defaults.eos),
            (&mut special.pad, defaults.pad),
        ] {
            *slot = slot.or(default);
        }
        special.name_ends(&optional("generation_config.json")?, &tokens, &kinds);
        for limit in added.iter().flat_map(|token| &token.limits) {
            if !limits.contains(limit) {
                limits.push(*limit);
            }
        }
        let spm = space_prefix.is_some();
        let vocab = Self {
            model,
            tokens,
            kinds,
            special,
            add_bos: add_bos.unwrap_or(spm),
            add_eos: add_eos.unwrap_or(false),
            add_space_prefix: space_prefix
                .or_else(|| tokenizer_config.get("add_prefix_space").and_then(Json::as_bool)),
            strips: false,
            templates,
            limits,
        };
        vocab.check().map_err(|why| at.broken(why))?;
        Ok(vocab)
    }
}

/// What the tokenizer's own files say.
struct Source {
    parts: Parts,
    post_processor: Json,
    added: Vec<Added>,
    /// Only SentencePiece knows it.
    space_prefix: Option<bool>,
    /// The identifiers that hold where no file says otherwise.
    defaults: SpecialIds,
}

impl Source {
    fn of_json(
        at: &At,
        dir: &Path,
        tokenizer_config: &Map<String, Json>,
        size: Option<usize>,
        limits: &mut Vec<Limit>,
    ) -> Result<Self, VocabError> {
        let mut json = tokenizer_json::read(&at.0)?;
        check_model(at, &json.model)?;
        let added = added::collect(at, dir, &json.added_tokens, tokenizer_config)?;
        let post_processor = std::mem::take(&mut json.post_processor);
        let unknown = json.model.unk_token.clone();
        let (parts, space_prefix) = if byte_level_decoder(&json) {
            let clean = tokenizer_config
                .get("clean_up_tokenization_spaces")
                .and_then(Json::as_bool);
            (byte_level::read(at, json, &added, size, clean, limits)?, None)
        } else if json.model.byte_fallback == Some(true) {
            let space = sentencepiece::space_prefix(at, &json, limits)?;
            if added.iter().any(Added::is_run) {
                limits.push(Limit::Runs);
            }
            let parts = match proto_beside(dir, &json.model)? {
                Some((at, proto)) => proto.into_parts(&at, &added, size, false)?,
                None => sentencepiece::from_json(at, json, &added, size)?,
            };
            (parts, Some(space))
        } else {
            let decoder = &json.decoder;
            return Err(at.unsupported(format!("the decoder {decoder} without byte_fallback")));
        };
        let unknown = parts.1.iter().position(|token| unknown.as_ref() == Some(token));
        let defaults = SpecialIds {
            unk: unknown
                .filter(|_| space_prefix.is_some())
                .and_then(|id| u32::try_from(id).ok()),
            ..SpecialIds::default()
        };
        Ok(Self {
            parts,
            post_processor,
            added,
            space_prefix,
            defaults,
        })
    }

    fn of_proto(
        at: &At,
        dir: &Path,
        tokenizer_config: &Map<String, Json>,
        size: Option<usize>,
    ) -> Result<Self, VocabError> {
        let proto = read_proto(at)?;
        let space = proto.check_normalizer(at)?;
        let added = added::collect(at, dir, &[], tokenizer_config)?;
        let defaults = proto.special();
        Ok(Self {
            parts: proto.into_parts(at, &added, size, true)?,
            post_processor: Json::Null,
            added,
            space_prefix: Some(space),
            defaults,
        })
    }
}

fn read_proto(at: &At) -> Result<ModelProto, VocabError> {
    let bytes = std::fs::read(&at.0).map_err(|source| CheckpointError::Read {
        path: at.0.clone(),
        source,
    })?;
    ModelProto::parse(at, &bytes)
}

/// `tokenizer.model` beside a `tokenizer.json`, for its scores; one of another vocabulary is left alone.
fn proto_beside(dir: &Path, json: &ModelJson) -> Result<Option<(At, ModelProto)>, VocabError> {
    let at = At(dir.join("tokenizer.model"));
    if !at.0.is_file() {
        return Ok(None);
    }
    let proto = read_proto(&at)?;
    if !proto.agrees(json) {
        tracing::warn!(
            "{} and tokenizer.json have different tokens: tokenizer.json is taken, as transformers does",
            at.0.display()
        );
        return Ok(None);
    }
    Ok(Some((at, proto)))
}

/// Refuses what no BPE in llama.cpp does.
fn check_model(at: &At, model: &ModelJson) -> Result<(), VocabError> {
    let kind = model.kind.as_deref().unwrap_or("BPE");
    if kind != "BPE" {
        return Err(at.unsupported(format!("a tokenizer model of type {kind}")));
    }
    for (key, value) in [
        ("dropout", &model.dropout),
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ] {
        let nothing = match value {
            Json::Null | Json::Bool(false) => true,
            Json::String(text) => text.is_empty(),
            other => other.as_f64() == Some(0.0),
        };
        if !nothing {
            return Err(at.unsupported(format!("model.{key} = {value}")));
        }
    }
    Ok(())
}

fn byte_level_decoder(json: &TokenizerJson) -> bool {
    json.decoder.get("type").is_some_and(|kind| kind == "ByteLevel")
}

/// Whether encoding adds bos and eos: the post-processor says it, else tokenizer_config.json. Names the two by it
/// where nothing else does.
fn added_around(
    at: &At,
    post: &Json,
    tokenizer_config: &Map<String, Json>,
    special: &mut SpecialIds,
    tokens: &[String],
) -> Result<Around, VocabError> {
    let flag = |key: &str| tokenizer_config.get(key).and_then(Json::as_bool);
    let mut around = (None, None);
    let parts = match post.get("processors").and_then(Json::as_array) {
        Some(parts) => parts.iter().collect(),
        None if post.is_null() => Vec::new(),
        None => vec![post],
    };
    for part in parts {
        match part.get("type").and_then(Json::as_str) {
            Some("ByteLevel") => around = (around.0.or(Some(false)), around.1.or(Some(false))),
            Some("TemplateProcessing") => {
                let (before, after) =
                    template(part).ok_or_else(|| at.unsupported(format!("the post_processor {part}")))?;
                let odd = || at.unsupported(format!("the post_processor {part}"));
                let id = |text: &str| {
                    let id = tokens.iter().position(|token| token == text);
                    id.and_then(|id| u32::try_from(id).ok()).ok_or_else(odd)
                };
                if let Some(bos) = before.map(id).transpose()?
                    && *special.bos.get_or_insert(bos) != bos
                {
                    return Err(odd());
                }
                if let Some(eos) = after.map(id).transpose()? {
                    // The one that is written ends a text; the one that the configuration names ends a turn.
                    let other = special.eos.replace(eos).filter(|other| *other != eos);
                    special.eot = special.eot.or(other);
                }
                around = (Some(before.is_some()), Some(after.is_some()));
            }
            _ => return Err(at.unsupported(format!("the post_processor {part}"))),
        }
    }
    Ok((
        around.0.or(flag("add_bos_token")),
        around.1.or(flag("add_eos_token")),
    ))
}

/// The special token before a text and the one after it, if there is at most one of each.
fn template(part: &Json) -> Option<(Option<&str>, Option<&str>)> {
    let single = part.get("single").and_then(Json::as_array)?;
    let (mut before, mut after, mut text_seen) = (None, None, false);
    for piece in single {
        match piece
            .get("SpecialToken")
            .and_then(|token| token.get("id")?.as_str())
        {
            None => text_seen = true,
            Some(token) if !text_seen && before.is_none() => before = Some(token),
            Some(token) if text_seen && after.is_none() => after = Some(token),
            Some(_) => return None,
        }
    }
    Some((before, after))
}
