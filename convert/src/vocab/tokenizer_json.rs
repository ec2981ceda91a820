//! `tokenizer.json`: its two long lists are read straight into place, because a tree of JSON values of a vocabulary
//! of 260 000 tokens takes ten times the room of the file.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value as Json;

use super::{At, VocabError};
use crate::checkpoint::CheckpointError;
use crate::json;

/// The file.
#[derive(Debug, Deserialize)]
pub(super) struct TokenizerJson {
    #[serde(default)]
    pub(super) added_tokens: Vec<Json>,
    #[serde(default)]
    pub(super) normalizer: Json,
    #[serde(default)]
    pub(super) pre_tokenizer: Json,
    #[serde(default)]
    pub(super) post_processor: Json,
    #[serde(default)]
    pub(super) decoder: Json,
    pub(super) model: ModelJson,
}

/// `model`, of type BPE.
#[derive(Debug, Deserialize)]
pub(super) struct ModelJson {
    #[serde(default, rename = "type")]
    pub(super) kind: Option<String>,
    /// The tokens with their identifiers, in the order of the file.
    #[serde(default)]
    pub(super) vocab: Tokens,
    #[serde(default)]
    pub(super) merges: Vec<Merge>,
    #[serde(default)]
    pub(super) ignore_merges: Option<bool>,
    #[serde(default)]
    pub(super) byte_fallback: Option<bool>,
    #[serde(default)]
    pub(super) unk_token: Option<String>,
    #[serde(default)]
    pub(super) dropout: Json,
    #[serde(default)]
    pub(super) continuing_subword_prefix: Json,
    #[serde(default)]
    pub(super) end_of_word_suffix: Json,
}

/// Tokens with their identifiers.
#[derive(Debug, Default)]
pub(super) struct Tokens(pub(super) Vec<(String, u64)>);

/// One merge: the token that it makes, and the length in bytes of its left part.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Merge {
    pub(super) whole: String,
    left: usize,
}

impl Merge {
    fn new(left: &str, right: &str) -> Self {
        Self {
            whole: [left, right].concat(),
            left: left.len(),
        }
    }

    /// The two parts.
    pub(super) fn parts(&self) -> (&str, &str) {
        self.whole.split_at(self.left)
    }
}

/// Reads the file.
pub(super) fn read(path: &Path) -> Result<TokenizerJson, VocabError> {
    let bytes = json::read_bytes(path).map_err(|source| CheckpointError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    parse(&bytes).map_err(|error| At(path.to_path_buf()).broken(format!("it is no tokenizer: {error}")))
}

/// Never panics, whatever the bytes are.
pub(super) fn parse(bytes: &[u8]) -> Result<TokenizerJson, serde_json::Error> {
    json::from_slice(bytes)
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TokensVisitor;

        impl<'de> Visitor<'de> for TokensVisitor {
            type Value = Tokens;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tokens and their numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tokens, A::Error> {
                let mut tokens = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    tokens.push(entry);
                }
                Ok(Tokens(tokens))
            }

            // Unigram has a list; its type is refused by name later.
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tokens, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Tokens::default())
            }
        }

        deserializer.deserialize_any(TokensVisitor)
    }
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MergeVisitor;

        impl<'de> Visitor<'de> for MergeVisitor {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge: \"a b\" or [\"a\", \"b\"]")
            }

            fn visit_str<E: Error>(self, merge: &str) -> Result<Merge, E> {
                let (left, right) = merge
                    .split_once(' ')
                    .ok_or_else(|| E::custom(format!("the merge {merge:?} is no pair")))?;
                Ok(Merge::new(left, right))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge, A::Error> {
                let no_pair = |n| A::Error::custom(format!("a merge has {n} parts, and needs two"));
                let left: String = seq.next_element()?.ok_or_else(|| no_pair(0))?;
                let right: String = seq.next_element()?.ok_or_else(|| no_pair(1))?;
                match seq.next_element::<IgnoredAny>()? {
                    None => Ok(Merge::new(&left, &right)),
                    Some(_) => Err(no_pair(3)),
                }
            }
        }

        deserializer.deserialize_any(MergeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_of_merges_are_read() {
        let json = br#"{"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b", ["ab", "a"]]}}"#;
        let model = parse(json).unwrap().model;
        let merges: Vec<_> = model.merges.iter().map(Merge::parts).collect();
        assert_eq!(merges, [("a", "b"), ("ab", "a")]);
        for merges in ["\"ab\"", "[\"a\"]", "[\"a\", \"b\", \"c\"]", "7"] {
            let json = format!(r#"{{"model": {{"merges": [{merges}]}}}}"#);
            assert!(parse(json.as_bytes()).is_err(), "{merges}");
        }
    }

    #[test]
    fn a_token_that_stands_twice_is_refused() {
        let error = parse(br#"{"model": {"vocab": {"a": 0, "a": 1}}}"#).err().unwrap();
        assert!(error.to_string().contains("\"a\" stands twice"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
