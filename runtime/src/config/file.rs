//! One TOML file becomes settings, each with its line.

use std::path::Path;

use serde::Deserialize as _;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::keys::{Key, Keys};
use super::secret::CREDENTIAL;
use super::{ConfigError, Origin, Setting};

/// What a file sets, in the order of its lines. A relative path is one beside the file.
pub(super) fn settings(
    path: &Path,
    text: &str,
    keys: &Keys,
    problems: &mut Vec<ConfigError>,
) -> Vec<Setting> {
    let at = |offset: usize| Origin::File {
        file: path.to_owned(),
        line: 1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count(),
    };
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        problems.extend(errors.iter().map(|error| ConfigError::Syntax {
            origin: at(error.span().map_or(0, |span| span.start)),
            message: error.message().trim().replace('\n', "; "),
        }));
        return Vec::new();
    }
    // (offset, key, value)
    let mut found = Vec::new();
    for (name, entry) in table.into_inner() {
        let (offset, name) = (name.span().start, name.into_inner().into_owned());
        if !keys.has_section(&name) {
            found.push((offset, Key::top(name), entry));
        } else if let DeValue::Table(inner) = entry.into_inner() {
            found.extend(inner.into_iter().map(|(key, value)| {
                let offset = key.span().start;
                (offset, Key::in_section(&name, key.into_inner()), value)
            }));
        } else {
            problems.push(ConfigError::Value {
                origin: Some(at(offset)),
                message: format!("it is a section; hint: [{name}], and its keys on the lines below"),
                key: name,
            });
        }
    }
    found.sort_by_key(|(offset, ..)| *offset);
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut settings = Vec::new();
    for (offset, key, value) in found {
        match toml::Value::deserialize(ValueDeserializer::from(value)) {
            Ok(value) => settings.push(Setting {
                value: if key.is_path() {
                    beside(folder, value)
                } else {
                    value
                },
                origin: at(offset),
                key,
            }),
            Err(error) => problems.push(ConfigError::Value {
                origin: Some(at(offset)),
                key: key.to_string(),
                message: format!("{}; hint: {}", error.message(), keys.example(&key)),
            }),
        }
    }
    settings
}

fn beside(folder: &Path, value: toml::Value) -> toml::Value {
    match value {
        toml::Value::String(path)
            if Path::new(&path).is_relative() && !path.is_empty() && !path.starts_with(CREDENTIAL) =>
        {
            folder.join(path).to_string_lossy().into_owned().into()
        }
        other => other,
    }
}
