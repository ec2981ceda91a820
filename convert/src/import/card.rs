//! What a GGUF file says of the model besides its weights, as a folder says it: the front matter of a model card, and
//! the settings of the sampler in `generation_config.json`. Converted again, they give the same keys.

use std::fmt::Write as _;

use serde_json::{Map, Value as Json, json};

use crate::arch::shortest;
use crate::gguf::{Gguf, Value};

/// The key after `general.`, and its name on the card.
const TEXTS: &[(&str, &str)] = &[
    ("name", "name"),
    ("author", "author"),
    ("version", "version"),
    ("organization", "organization"),
    ("finetune", "finetune"),
    ("basename", "basename"),
    ("description", "description"),
    ("size_label", "size_label"),
    ("license", "license"),
    ("license.name", "license_name"),
    ("license.link", "license_link"),
    ("source.url", "url"),
    ("source.doi", "doi"),
    ("source.uuid", "uuid"),
    ("source.repo_url", "repo_url"),
];

/// What is said of a base model or a data set.
const OF_SOURCE: &[&str] = &[
    "name",
    "author",
    "version",
    "organization",
    "description",
    "url",
    "doi",
    "uuid",
    "repo_url",
];

/// More base models or data sets than any model names.
const MAX_SOURCES: u64 = 1000;

/// `README.md`, if there is anything to say.
pub(super) fn model_card(gguf: &Gguf) -> Option<String> {
    let text = |key: &str| gguf.get(&format!("general.{key}")).and_then(Value::as_str);
    let mut card: Vec<(&str, Json)> = Vec::new();
    for (key, name) in TEXTS {
        card.extend(text(key).map(|text| (*name, json!(text))));
    }
    for (what, name) in [("base_model", "base_model"), ("dataset", "datasets")] {
        let count = gguf.unsigned_opt(&format!("general.{what}.count"));
        let count = count.ok().flatten().unwrap_or(0).min(MAX_SOURCES);
        let sources: Vec<Json> = (0..count)
            .map(|at| source(|key| text(&format!("{what}.{at}.{key}"))))
            .collect();
        if !sources.is_empty() {
            card.push((name, json!(sources)));
        }
    }
    for (key, name) in [("tags", "tags"), ("languages", "language")] {
        if let Ok(texts) = gguf.strings(&format!("general.{key}")) {
            card.push((name, json!(texts)));
        }
    }
    if card.is_empty() {
        return None;
    }
    // Every JSON value is a YAML value.
    let lines = card.iter().fold(String::new(), |mut lines, (key, value)| {
        let _ = writeln!(lines, "{key}: {value}");
        lines
    });
    Some(format!("---\n{lines}---\n"))
}

/// A model or data set: its name on the hub where it has one, else all that is known.
fn source<'a>(text: impl Fn(&str) -> Option<&'a str>) -> Json {
    let on_hub = text("repo_url").and_then(|url| url.strip_prefix("https://huggingface.co/"));
    if let Some(id) = on_hub.filter(|id| id.matches('/').count() == 1) {
        return json!(id);
    }
    let known = OF_SOURCE.iter().filter_map(|key| Some((*key, text(key)?)));
    known
        .map(|(key, text)| (key.to_owned(), json!(text)))
        .collect::<Map<_, _>>()
        .into()
}

/// The sampler's settings, as transformers names them; it has no others.
pub(super) fn sampling(gguf: &Gguf) -> Map<String, Json> {
    let mut config = Map::new();
    for (key, name) in [
        ("temp", "temperature"),
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("penalty_repeat", "repetition_penalty"),
    ] {
        let value = match gguf.get(&format!("general.sampling.{key}")) {
            Some(Value::F32(value)) => json!(shortest(*value)),
            Some(value) => match value.as_u64() {
                Some(value) => json!(value),
                None => continue,
            },
            None => continue,
        };
        config.insert(name.into(), value);
    }
    // Without it transformers takes none of the others.
    if config.keys().any(|key| key != "repetition_penalty") {
        config.insert("do_sample".into(), json!(true));
    }
    config
}
