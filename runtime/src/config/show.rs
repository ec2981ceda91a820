//! The effective configuration as a user reads it: TOML, or one JSON object.

use std::fmt::Write as _;

use serde_json::{Map, Value as Json, json};

use super::Layers;
use super::keys::{Key, Keys, NAMED};

/// Column at which the origins stand.
const COLUMN: usize = 44;

impl Layers {
    /// Every key of a section (`None`: above all sections) with its value, in the order of the structs. A key that
    /// nobody set and that has no default has no value.
    fn section(&self, keys: &Keys, section: Option<&str>) -> Vec<(Key, Option<toml::Value>)> {
        if section.is_some_and(|section| NAMED.contains(&section)) {
            return self
                .settings
                .values()
                .filter(|setting| setting.key.section.as_deref() == section)
                .map(|setting| (setting.key.clone(), Some(setting.value.clone())))
                .collect();
        }
        keys.iter()
            .filter(|(key, _)| key.section.as_deref() == section)
            .map(|(key, default)| match self.settings.get(key) {
                Some(setting) => (key.clone(), Some(setting.value.clone())),
                None => (key.clone(), default.clone()),
            })
            .collect()
    }

    /// As TOML, which means the same when it is read again; with the origin of each value behind it as a comment.
    pub fn to_toml(&self, with_origin: bool) -> String {
        let keys = Keys::all();
        let mut out = String::new();
        let sections = keys.sections().iter().map(|section| Some(section.as_str()));
        for section in std::iter::once(None).chain(sections) {
            if let Some(section) = section {
                let _ = writeln!(out, "\n[{section}]");
            }
            for (key, value) in self.section(&keys, section) {
                let line = match value {
                    Some(value) => format!("{} = {value}", quoted(&key.name)),
                    None => format!("# {} is not set", key.name),
                };
                let _ = match with_origin {
                    true => writeln!(out, "{line:<COLUMN$} # {}", self.origin(&key)),
                    false => writeln!(out, "{line}"),
                };
            }
        }
        out
    }

    /// As an object of objects; null is a value that is not set. With the origin, each value is
    /// `{"value": …, "origin": {"kind": "file", "file": …, "line": …}}`.
    pub fn to_json(&self, with_origin: bool) -> Json {
        let keys = Keys::all();
        let entries = |section: Option<&str>| -> Map<String, Json> {
            self.section(&keys, section)
                .into_iter()
                .map(|(key, value)| match with_origin {
                    true => {
                        let origin = self.origin(&key);
                        (key.name, json!({ "value": value, "origin": origin }))
                    }
                    false => (key.name, json!(value)),
                })
                .collect()
        };
        let mut out = entries(None);
        for section in keys.sections() {
            out.insert(section.clone(), Json::Object(entries(Some(section))));
        }
        Json::Object(out)
    }
}

/// A key as TOML wants it: as it is, or in quotes.
fn quoted(name: &str) -> String {
    let bare = |letter: char| letter.is_ascii_alphanumeric() || "_-".contains(letter);
    if !name.is_empty() && name.chars().all(bare) {
        name.to_owned()
    } else {
        toml::Value::String(name.to_owned()).to_string()
    }
}
