//! Reads the vocabulary of a checkpoint folder: `tokenizer.json` or `tokenizer.model`, `tokenizer_config.json`,
//! `generation_config.json`, `chat_template.jinja`.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::added::{self, Added};
use super::byte_level::{self, Parts};
use super::sentencepiece::{self, ModelProto};
use super::tokenizer_json::{self, ModelJson, TokenizerJson};
use super::{At, CONTROL, Limit, SpecialIds, Templates, Vocab, VocabError};
use crate::checkpoint::{CheckpointError, read_json_object};

/// The tokens that llama.cpp takes for the end of a turn (llama-vocab.cpp, `load`), the likeliest first.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// Further tokens that end generation by their text alone.
const ENDS_BY_TEXT: &[&str] = &[
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "<|eom_id|>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
];

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

        let mut special = special_ids(&tokenizer_config, &added, config, &tokens);
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
        special.eot = special.eot.or_else(|| end_of_turn(&special, &tokens, &kinds));
        carry_ends(&optional("generation_config.json")?, &mut special, &tokens);
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

/// As `SpecialVocab` finds them: by text in tokenizer_config.json, else by number in config.json.
fn special_ids(
    tokenizer_config: &Map<String, Json>,
    added: &[Added],
    config: &Map<String, Json>,
    tokens: &[String],
) -> SpecialIds {
    let text = |role: &str| {
        let entry = tokenizer_config.get(&format!("{role}_token"))?;
        entry.as_str().or_else(|| entry.get("content")?.as_str())
    };
    let find = |role: &str, other: Option<&str>| {
        let text = text(role).or_else(|| other.and_then(text));
        let by_text = text.and_then(|text| {
            let added = added.iter().find(|token| token.content == text);
            added
                .map(|token| token.id)
                .or_else(|| tokens.iter().position(|token| token == text).map(|id| id as u64))
        });
        let by_number = || config.get(&format!("{role}_token_id")).and_then(Json::as_u64);
        by_text.or_else(by_number).and_then(|id| u32::try_from(id).ok())
    };
    SpecialIds {
        bos: find("bos", Some("cls")),
        eos: find("eos", Some("sep")),
        unk: find("unk", None),
        sep: find("sep", None),
        pad: find("pad", None),
        mask: find("mask", None),
        eot: find("eot", None),
        eom: find("eom", None),
        ..SpecialIds::default()
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

/// `eos_token_id` of generation_config.json may be a list, for which GGUF has no key (llama.cpp #9606). Those that the
/// loader does not know by their text take the free places of eot and eom; what does not fit is said.
fn carry_ends(generation: &Map<String, Json>, special: &mut SpecialIds, tokens: &[String]) {
    let ids = match generation.get("eos_token_id") {
        Some(Json::Array(ids)) => ids.iter().filter_map(Json::as_u64).collect(),
        Some(id) => id.as_u64().into_iter().collect::<Vec<_>>(),
        None => return,
    };
    for id in ids {
        let Some(token) = usize::try_from(id).ok().and_then(|id| tokens.get(id)) else {
            tracing::warn!("generation_config.json: eos_token_id {id} is no token");
            continue;
        };
        let Ok(id) = u32::try_from(id) else { continue };
        let known = END_OF_TURN.contains(&token.as_str()) || ENDS_BY_TEXT.contains(&token.as_str());
        if known || [special.eos, special.eot, special.eom].contains(&Some(id)) {
            continue;
        }
        match [&mut special.eos, &mut special.eot, &mut special.eom]
            .into_iter()
            .find(|slot| slot.is_none())
        {
            Some(slot) => *slot = Some(id),
            None => tracing::warn!(
                "generation_config.json ends generation at {token:?} too, and a GGUF file has no key for it"
            ),
        }
    }
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
