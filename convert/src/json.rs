//! JSON as it is read here: strictly, because two readers that take different halves of an ambiguous file see two
//! different models.
//!
//! serde_json accepts an object with the same key twice and keeps the last; Python keeps the last too, other
//! readers the first. Here that is an error, at any depth, as are nesting deeper than 128, `NaN`, numbers beyond
//! f64, text that is not UTF-8 and anything after the value. Every JSON file of a checkpoint, of a tokenizer and of
//! an adapter, and the header of every safetensors file goes through this.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::de::{DeserializeOwned, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The largest JSON file that is read. The largest tokenizers in use have 40 MB.
pub const MAX_BYTES: u64 = 256 << 20;

/// Reads one value out of bytes. The error says line and column.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice::<Unique>(bytes)?;
    serde_json::from_slice(bytes)
}

/// Reads a whole file of at most [`MAX_BYTES`].
pub fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("it has more than {} MiB", MAX_BYTES >> 20),
        ));
    }
    Ok(bytes)
}

/// Any JSON value in whose objects no key stands twice; the value itself is not kept.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Unique;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_str<E>(self, _: &str) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Unique, A::Error> {
        while seq.next_element::<Unique>()?.is_some() {}
        Ok(Unique)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique, A::Error> {
        let mut keys = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value::<Unique>()?;
            if let Some(twice) = keys.replace(key) {
                return Err(A::Error::custom(format_args!(
                    "the key {twice:?} stands twice in one object"
                )));
            }
        }
        Ok(Unique)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn parse(text: &str) -> Result<Value, String> {
        from_slice(text.as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn a_key_that_stands_twice_is_named_at_any_depth() {
        assert_eq!(
            parse(r#"{"a": [{"b": 1}, {"b": 2}]}"#),
            Ok(json!({"a": [{"b": 1}, {"b": 2}]}))
        );
        for text in [
            r#"{"a": 1, "a": 1}"#,
            r#"{"x": [[{"a": 1, "b": 2, "a": {}}]]}"#,
            r#"{"a": 1, "\u0061": 2}"#,
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains("\"a\" stands twice"), "{error}");
        }
    }

    #[test]
    fn what_other_readers_may_take_otherwise_is_refused() {
        let deep = "[".repeat(200) + &"]".repeat(200);
        for text in [
            "",
            "{} {}",
            "{\"a\": NaN}",
            "{\"a\": 1e999}",
            "{\"a\": 1,}",
            "// x\n{}",
            "\u{feff}{}",
            &deep,
        ] {
            assert!(parse(text).is_err(), "{text:.20}");
        }
        assert!(from_slice::<Value>(b"\"\xff\"").is_err());
    }

    #[test]
    fn long_numbers_are_rounded_to_the_nearest() {
        for text in [
            "51.24817837550540438",
            "0.1000000000000000055511151231257827021181583404541015625",
            "31.98259791907483378876232860129040479666972510273464686",
            "74.58969350492589913944117715162046610990695848304011980",
            "26.64942055526678698198463464848506950699205755947090054",
            "81.74995252559446109248343526119553721539743108359245195",
            "76.26484756469606230798683078485319413008369007128430886",
            "7.91524870533181234207960434988607500201017018875251566",
        ] {
            assert_eq!(parse(text).unwrap().as_f64(), text.parse().ok(), "{text}");
        }
    }

    #[test]
    fn a_file_without_end_is_not_read_into_memory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(MAX_BYTES + 1).unwrap();
        let error = read_bytes(file.path()).unwrap_err().to_string();
        assert!(error.contains("256 MiB"), "{error}");
    }
}
