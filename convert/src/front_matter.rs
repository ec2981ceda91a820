//! The front matter of a model card (`README.md`): YAML between two lines of three dashes.
//!
//! Source: <https://huggingface.co/docs/hub/model-cards#model-card-metadata>

use std::path::Path;

use serde_json::{Map, Value as Json};

/// More front matter than any card has.
const MAX_BYTES: usize = 1 << 20;

/// What a card says, or nothing.
#[derive(Debug, Default)]
pub struct FrontMatter(Map<String, Json>);

impl FrontMatter {
    /// Reads the card of a folder. A card that does not parse is warned of and says nothing: it is for people,
    /// and the model does not depend on it.
    pub fn of_folder(dir: &Path) -> std::io::Result<Self> {
        let path = dir.join("README.md");
        if !path.is_file() {
            return Ok(Self::default());
        }
        let text = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
        Ok(Self::parse(&text).unwrap_or_else(|why| {
            tracing::warn!("the front matter of {} is not used: {why}", path.display());
            Self::default()
        }))
    }

    /// The front matter of a card's text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines();
        if lines.next() != Some("---") {
            return Ok(Self::default());
        }
        let front: Vec<_> = lines.take_while(|line| *line != "---").collect();
        // Some cards are indented with tabs, which YAML does not allow.
        let front = front.join("\n").replace('\t', "  ");
        if front.len() > MAX_BYTES {
            return Err(format!("it has {} bytes", front.len()));
        }
        if front.trim().is_empty() {
            return Ok(Self::default());
        }
        // `no` is Norwegian.
        let options = serde_saphyr::options! { strict_booleans: true };
        match serde_saphyr::from_str_with_options(&front, options) {
            Ok(Json::Object(card)) => Ok(Self(card)),
            Ok(_) => Err("it is no mapping".into()),
            Err(e) => Err(e.to_string()),
        }
    }

    /// The text of the first of `keys` that the card has.
    pub fn text(&self, keys: &[&str]) -> Option<String> {
        keys.iter().find_map(|key| text(self.0.get(*key)?))
    }

    /// All texts under all of `keys`, which hold one each or a list.
    pub fn texts(&self, keys: &[&str]) -> Vec<String> {
        let values = keys.iter().flat_map(|key| list(self.0.get(*key)));
        values.filter_map(text).collect()
    }

    /// The entries under the first of `keys` that the card has: one, or a list.
    pub fn entries(&self, keys: &[&str]) -> Vec<&Json> {
        let value = keys.iter().find_map(|key| self.0.get(*key));
        list(value).collect()
    }
}

/// The elements of a list, or the one value.
fn list(value: Option<&Json>) -> impl Iterator<Item = &Json> {
    match value {
        Some(Json::Array(values)) => values.iter(),
        Some(value) => std::slice::from_ref(value).iter(),
        None => [].iter(),
    }
}

/// A scalar as text.
pub fn text(value: &Json) -> Option<String> {
    match value {
        Json::String(text) if text.is_empty() => None,
        Json::String(text) => Some(text.clone()),
        Json::Number(number) => Some(number.to_string()),
        _ => None,
    }
}
