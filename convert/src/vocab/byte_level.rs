//! Byte-level BPE of `tokenizer.json`.

use super::added::{self, Added};
use super::tokenizer_json::TokenizerJson;
use super::{At, Limit, Model, NORMAL, VocabError, pre};

/// The model, the text and the kind of each identifier.
pub(super) type Parts = (Model, Vec<String>, Vec<i32>);

/// Reads it. `size` is the number of rows of the embeddings.
pub(super) fn read(
    at: &At,
    json: TokenizerJson,
    added: &[Added],
    size: Option<usize>,
    clean_spaces: Option<bool>,
    limits: &mut Vec<Limit>,
) -> Result<Parts, VocabError> {
    if nfc(at, &json)? {
        limits.push(Limit::Nfc);
    }
    let ignore_merges = json.model.ignore_merges.unwrap_or(false);
    let pre = pre::by_structure(&json.pre_tokenizer, ignore_merges, clean_spaces).ok_or_else(|| {
        at.unsupported(format!(
            "the pre_tokenizer {} with ignore_merges {ignore_merges}",
            json.pre_tokenizer
        ))
    })?;
    if pre.runtime().is_some() {
        limits.push(Limit::Case);
    }
    let size = size.unwrap_or_else(|| rows(&json, added));
    // A space in a token is spelled Ġ, as everywhere in the byte-level alphabet.
    let merge =
        |(left, right): (&str, &str)| format!("{} {}", left.replace(' ', "Ġ"), right.replace(' ', "Ġ"));
    let merges = json.model.merges.iter().map(|pair| merge(pair.parts())).collect();
    let mut slots = added::slots(at, json.model.vocab.0, size, |_| NORMAL)?;
    for token in added {
        if !token.lay_over(at, &mut slots)? {
            return Err(added::no_row(at, &token.content, token.id, size));
        }
    }
    let (tokens, kinds) = added::filled(slots);
    Ok((Model::Bpe { pre, merges }, tokens, kinds))
}

/// One more than the largest identifier.
pub(super) fn rows(json: &TokenizerJson, added: &[Added]) -> usize {
    let of_model = json.model.vocab.0.iter().map(|(_, id)| *id);
    let largest = of_model.chain(added.iter().map(|token| token.id)).max();
    // The largest number that is no identifier leaves a size that every check refuses.
    largest.map_or(0, |id| id.min(u32::MAX.into()) as usize + 1)
}

/// Whether text is normalised to NFC, as Qwen's tokenizer does it. Other normalizers are refused.
fn nfc(at: &At, json: &TokenizerJson) -> Result<bool, VocabError> {
    let normalizer = &json.normalizer;
    let parts = normalizer.get("normalizers").and_then(|parts| parts.as_array());
    let parts: Vec<_> = match parts {
        Some(parts) => parts.iter().collect(),
        None if normalizer.is_null() => Vec::new(),
        None => vec![normalizer],
    };
    if parts
        .iter()
        .any(|part| part.get("type").is_none_or(|kind| kind != "NFC"))
    {
        return Err(at.unsupported(format!("the normalizer {normalizer}")));
    }
    Ok(!parts.is_empty())
}
