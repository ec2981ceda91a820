//! SentencePiece's BPE: from `tokenizer.model`, or from `tokenizer.json` with the scores rebuilt from the merges.
//!
//! Source: sentencepiece src/sentencepiece_model.proto; llama.cpp conversion/base.py
//! (`_create_vocab_sentencepiece`).

use std::collections::HashMap;

use prost::Message;
use serde_json::Value as Json;

use super::added::{self, Added, Slot};
use super::byte_level::{self, Parts};
use super::check::byte_token;
use super::tokenizer_json::{ModelJson, TokenizerJson};
use super::{
    At, BYTE, CONTROL, Limit, Model, NORMAL, SPACE, SpecialIds, UNKNOWN, UNUSED, USER_DEFINED, VocabError,
};

/// `ModelProto`, as far as it matters here.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    /// 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte: the numbers are GGUF's.
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    /// 1 unigram, 2 BPE, 3 word, 4 char.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    eos_id: Option<i32>,
    #[prost(int32, optional, tag = "43")]
    pad_id: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}

const BPE: i32 = 2;

/// The score of an identifier that stands for nothing, and of an added token (conversion/base.py).
const SCORE_OF_NOTHING: f32 = -10_000.0;
const SCORE_OF_ADDED: f32 = -1000.0;

impl ModelProto {
    /// Never panics, whatever the bytes are. Refuses what llama.cpp's SentencePiece does not do.
    pub(super) fn parse(at: &At, bytes: &[u8]) -> Result<Self, VocabError> {
        let proto = Self::decode(bytes)
            .map_err(|error| at.broken(format!("it is no SentencePiece model: {error}")))?;
        if proto.pieces.is_empty() {
            return Err(at.broken("it is no SentencePiece model: it has no pieces"));
        }
        let trainer = proto.trainer.clone().unwrap_or_default();
        match trainer.model_type.unwrap_or(1) {
            BPE => {}
            1 => return Err(at.unsupported("a SentencePiece model of type unigram")),
            other => return Err(at.unsupported(format!("a SentencePiece model of type {other}"))),
        }
        if trainer.treat_whitespace_as_suffix == Some(true) {
            return Err(at.unsupported("treat_whitespace_as_suffix"));
        }
        Ok(proto)
    }

    /// What it does to text before cutting it, where no `tokenizer.json` says it. True if it puts a space before.
    pub(super) fn check_normalizer(&self, at: &At) -> Result<bool, VocabError> {
        let normalizer = self.normalizer.clone().unwrap_or_default();
        if normalizer.precompiled_charsmap.is_some_and(|map| !map.is_empty()) {
            let name = normalizer.name.unwrap_or_default();
            return Err(at.unsupported(format!("the normalizer {name:?}")));
        }
        // The defaults of the format are all true.
        if normalizer.remove_extra_whitespaces.unwrap_or(true) {
            return Err(at.unsupported("remove_extra_whitespaces"));
        }
        if !normalizer.escape_whitespaces.unwrap_or(true) {
            return Err(at.unsupported("escape_whitespaces = false"));
        }
        Ok(normalizer.add_dummy_prefix.unwrap_or(true))
    }

    /// The special tokens that it names itself.
    pub(super) fn special(&self) -> SpecialIds {
        let trainer = self.trainer.clone().unwrap_or_default();
        let id = |id: Option<i32>, or: i32| {
            let id = u32::try_from(id.unwrap_or(or)).ok()?;
            self.pieces.get(id as usize).map(|_| id)
        };
        SpecialIds {
            unk: id(trainer.unk_id, 0),
            bos: id(trainer.bos_id, 1),
            eos: id(trainer.eos_id, 2),
            pad: id(trainer.pad_id, -1),
            ..SpecialIds::default()
        }
    }

    /// Whether it and `tokenizer.json` have the same tokens.
    pub(super) fn agrees(&self, json: &ModelJson) -> bool {
        json.vocab.0.iter().all(|(token, id)| {
            let piece = usize::try_from(*id).ok().and_then(|id| self.pieces.get(id));
            // transformers gives some tokens another text than the model has (Gemma's "\t"), always of odd kinds.
            piece.is_none_or(|piece| {
                piece.piece.as_deref() == Some(token) || piece.kind.is_some_and(|kind| kind != NORMAL)
            })
        })
    }

    /// The model, the text and the kind of each identifier. `size` is the number of rows of the embeddings. Pieces that
    /// users defined are added tokens where there is no `tokenizer.json` to say which are.
    pub(super) fn into_parts(
        self,
        at: &At,
        added: &[Added],
        size: Option<usize>,
        alone: bool,
    ) -> Result<Parts, VocabError> {
        let largest = added
            .iter()
            .map(|token| token.id.min(u32::MAX.into()) as usize + 1);
        let size = size.unwrap_or_else(|| largest.max().unwrap_or(0).max(self.pieces.len()));
        let mut scores = vec![SCORE_OF_NOTHING; size];
        let mut slots: Vec<Slot> = vec![None; size];
        for (id, piece) in self.pieces.into_iter().enumerate() {
            let text = piece.piece.unwrap_or_default();
            let (Some(slot), Some(score)) = (slots.get_mut(id), scores.get_mut(id)) else {
                return Err(added::no_row(at, &text, id as u64, size));
            };
            *slot = Some(match piece.kind.unwrap_or(NORMAL) {
                USER_DEFINED if alone => (text.replace(SPACE, " "), USER_DEFINED),
                kind @ (UNKNOWN | CONTROL | UNUSED | BYTE) => (text, kind),
                _ => (text, NORMAL),
            });
            *score = piece.score.unwrap_or(0.0);
        }
        finish(at, slots, scores, added)
    }
}

/// Puts the added tokens over those of the model.
fn finish(at: &At, mut slots: Vec<Slot>, mut scores: Vec<f32>, added: &[Added]) -> Result<Parts, VocabError> {
    let size = slots.len();
    for token in added {
        // A piece that is no ordinary text may be given another one (Gemma's reserved tokens are).
        let odd = usize::try_from(token.id)
            .ok()
            .and_then(|id| slots.get_mut(id))
            .filter(|slot| {
                slot.as_ref()
                    .is_some_and(|(_, kind)| matches!(*kind, UNKNOWN | CONTROL | USER_DEFINED | UNUSED))
            });
        if let Some(slot) = odd {
            *slot = None;
        }
        if token.lay_over(at, &mut slots)? {
            if let Some(score) = scores.get_mut(token.id as usize) {
                *score = SCORE_OF_ADDED;
            }
        } else {
            // Gemma 3 ships the tokens of its vision half with models that have no rows for them.
            tracing::warn!(
                "the added token {:?} is number {}, and there are {size} rows of embeddings: it is left out",
                token.content,
                token.id
            );
        }
    }
    let (tokens, kinds) = added::filled(slots);
    let model = Model::SentencePiece {
        scores,
        remove_extra_whitespaces: None,
    };
    Ok((model, tokens, kinds))
}

/// Reads `tokenizer.json` alone. The score of a token is minus the rank of the first merge that makes it, so that
/// llama.cpp, which merges the pair whose joint token has the highest score, merges in the same order.
/// (llama.cpp's own converter gives every token the score -1000, which merges from left to right.)
pub(super) fn from_json(
    at: &At,
    json: TokenizerJson,
    added: &[Added],
    size: Option<usize>,
) -> Result<Parts, VocabError> {
    let size = size.unwrap_or_else(|| byte_level::rows(&json, added));
    let model = json.model;
    let mut ranks: HashMap<&str, usize> = HashMap::with_capacity(model.merges.len());
    for (rank, merge) in model.merges.iter().enumerate() {
        ranks.entry(&merge.whole).or_insert(rank);
    }
    let known: std::collections::HashSet<&str> =
        model.vocab.0.iter().map(|(token, _)| token.as_str()).collect();
    for merge in &model.merges {
        let (left, right) = merge.parts();
        if ![left, right, &merge.whole]
            .iter()
            .all(|part| known.contains(part))
        {
            return Err(at.broken(format!(
                "the merge {left:?} {right:?} needs a token that is not in the vocabulary"
            )));
        }
    }
    drop(known);
    let last = model.merges.len();
    let mut scores = vec![SCORE_OF_NOTHING; size];
    for (token, id) in &model.vocab.0 {
        let score = match ranks.get(token.as_str()) {
            Some(rank) => -(*rank as f32),
            None if byte_of(token).is_some() => 0.0,
            // One character, or never made by a merge: last, if llama.cpp can make it at all.
            None => -(last as f32),
        };
        if let Some(place) = usize::try_from(*id).ok().and_then(|id| scores.get_mut(id)) {
            *place = score;
        }
    }
    let unknown = model.unk_token;
    let kind = |token: &str| match byte_of(token) {
        Some(_) => BYTE,
        None if unknown.as_deref() == Some(token) => UNKNOWN,
        None => NORMAL,
    };
    let slots = added::slots(at, model.vocab.0, size, kind)?;
    finish(at, slots, scores, added)
}

/// The byte of `<0x0A>`.
fn byte_of(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let byte = u8::from_str_radix(hex, 16).ok()?;
    (byte_token(byte) == token).then_some(byte)
}

/// Whether a space is put before text, by the normalizer and the pre-tokenizer of `tokenizer.json`. What they do
/// besides turning spaces into U+2581 is refused.
pub(super) fn space_prefix(
    at: &At,
    json: &TokenizerJson,
    limits: &mut Vec<Limit>,
) -> Result<bool, VocabError> {
    let (mut prefix, mut replaces) = (false, false);
    for part in parts(&json.normalizer, "normalizers") {
        let text = |key: &str| part.get(key).and_then(Json::as_str);
        let pattern = part
            .get("pattern")
            .and_then(|pattern| pattern.get("String")?.as_str());
        match text("type") {
            Some("Prepend") if text("prepend") == Some("\u{2581}") => prefix = true,
            Some("Replace") if pattern == Some(" ") && text("content") == Some("\u{2581}") => replaces = true,
            _ => return Err(at.unsupported(format!("the normalizer {part}"))),
        }
    }
    for part in parts(&json.pre_tokenizer, "pretokenizers") {
        let text = |key: &str| part.get(key).and_then(Json::as_str);
        let pattern = part
            .get("pattern")
            .and_then(|pattern| pattern.get("String")?.as_str());
        match text("type") {
            // No space is left to split at.
            Some("Split") if replaces && pattern == Some(" ") => {}
            Some("Metaspace") if text("replacement") == Some("\u{2581}") => {
                replaces = true;
                let flag = part
                    .get("add_prefix_space")
                    .and_then(Json::as_bool)
                    .unwrap_or(true);
                let scheme = text("prepend_scheme").unwrap_or(if flag { "always" } else { "never" });
                if scheme != "never" {
                    prefix = true;
                    limits.push(Limit::SpaceOnce);
                }
            }
            _ => return Err(at.unsupported(format!("the pre_tokenizer {part}"))),
        }
    }
    if !replaces {
        return Err(at.unsupported("a tokenizer with byte_fallback that does not turn spaces into U+2581"));
    }
    Ok(prefix)
}

/// The parts of a sequence, or the thing itself.
fn parts<'a>(json: &'a Json, key: &str) -> Vec<&'a Json> {
    match json.get(key).and_then(Json::as_array) {
        Some(parts) => parts.iter().collect(),
        None if json.is_null() => Vec::new(),
        None => vec![json],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at() -> At {
        At("tokenizer.model".into())
    }

    fn proto() -> ModelProto {
        let piece = |text: &str| Piece {
            piece: Some(text.to_owned()),
            ..Piece::default()
        };
        ModelProto {
            pieces: vec![piece("<unk>"), piece("a")],
            trainer: Some(TrainerSpec {
                model_type: Some(BPE),
                ..TrainerSpec::default()
            }),
            normalizer: Some(NormalizerSpec {
                remove_extra_whitespaces: Some(false),
                ..NormalizerSpec::default()
            }),
        }
    }

    /// What is said of the model with a change.
    fn refusal(change: impl FnOnce(&mut TrainerSpec, &mut NormalizerSpec)) -> String {
        let mut proto = proto();
        let (mut trainer, mut normalizer) = (proto.trainer.take().unwrap(), proto.normalizer.take().unwrap());
        change(&mut trainer, &mut normalizer);
        (proto.trainer, proto.normalizer) = (Some(trainer), Some(normalizer));
        let read = ModelProto::parse(&at(), &proto.encode_to_vec());
        read.and_then(|proto| proto.check_normalizer(&at()))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_llama_cpp_does_not_do_is_refused() {
        let plain = ModelProto::parse(&at(), &proto().encode_to_vec()).unwrap();
        assert!(
            plain.check_normalizer(&at()).unwrap(),
            "a space before a text is the default"
        );
        assert!(refusal(|trainer, _| trainer.model_type = None).contains("unigram"));
        assert!(refusal(|trainer, _| trainer.model_type = Some(3)).contains("type 3"));
        assert!(refusal(|trainer, _| trainer.treat_whitespace_as_suffix = Some(true)).contains("as_suffix"));
        let nmt = refusal(|_, normalizer| {
            normalizer.name = Some("nmt_nfkc".into());
            normalizer.precompiled_charsmap = Some(vec![1]);
        });
        assert!(nmt.contains("nmt_nfkc"), "{nmt}");
        assert!(
            refusal(|_, normalizer| normalizer.remove_extra_whitespaces = None)
                .contains("remove_extra_whitespaces")
        );
        assert!(refusal(|_, normalizer| normalizer.escape_whitespaces = Some(false)).contains("escape"));
        assert!(ModelProto::parse(&at(), b"").is_err(), "no pieces");
    }

    #[test]
    fn a_byte_is_known_by_its_spelling() {
        assert_eq!(byte_of("<0x0A>"), Some(10));
        for other in ["<0x0a>", "<0xA>", "<0x+A>", "0x0A", "<0x0A> "] {
            assert_eq!(byte_of(other), None, "{other}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, cut in 0usize..64, flip in 0usize..64) {
            let _ = ModelProto::parse(&at(), &bytes);
            let mut model = proto().encode_to_vec();
            let flip = flip % model.len();
            model[flip] ^= 0x55;
            model.truncate(model.len() - cut % model.len());
            if let Ok(model) = ModelProto::parse(&at(), &model) {
                let _ = model.check_normalizer(&at());
                let _ = model.special();
                let _ = model.into_parts(&at(), &[], Some(300), true);
            }
        }
    }
}
