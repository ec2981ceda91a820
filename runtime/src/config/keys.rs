//! The keys that there are, and the nearest one to a key that there is not.

use std::fmt;

use serde_json::Value as Json;

use super::Config;

/// The sections whose keys are names that the user chooses, and whose values are paths.
pub(super) const NAMED: [&str; 2] = ["adapters", "tasks"];

/// The name of one value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// `None` for the few that stand above all sections.
    pub section: Option<String>,
    /// Name in the section.
    pub name: String,
}

impl Key {
    /// A key as it is written with its section: `model.n_ctx`.
    pub fn parse(text: &str) -> Self {
        match text.split_once('.') {
            Some((section, name)) => Self::in_section(section, name),
            None => Self::top(text),
        }
    }

    pub(super) fn top(name: impl Into<String>) -> Self {
        Self {
            section: None,
            name: name.into(),
        }
    }

    pub(super) fn in_section(section: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            section: Some(section.into()),
            name: name.into(),
        }
    }

    /// The variable of the environment that sets it.
    pub(super) fn variable(&self) -> String {
        let name = match &self.section {
            Some(section) => format!("PIPIT_{section}__{}", self.name),
            None => format!("PIPIT_{}", self.name),
        };
        name.to_ascii_uppercase()
    }

    /// Whether its value is the path of a file or a folder.
    pub(super) fn is_path(&self) -> bool {
        let section = self.section.as_deref();
        section.is_some_and(|section| NAMED.contains(&section))
            || matches!(
                (section, self.name.as_str()),
                (None, "state_dir")
                    | (Some("model"), "path")
                    | (Some("metrics"), "energy_sensor")
                    | (Some("broker"), "ca" | "certificate" | "key" | "password_file")
                    | (Some("http"), "key_file")
            )
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.section {
            Some(section) => write!(f, "{section}.{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// Every key in the order of the structs, with its default where it has one.
pub(super) struct Keys {
    keys: Vec<(Key, Option<toml::Value>)>,
    sections: Vec<String>,
}

impl Keys {
    /// Read from what serde makes of the default configuration. By way of JSON, because that has a null for a key
    /// without a default; through its text, because 0.95 as f32 is 0.95 there and not 0.949999988.
    pub(super) fn all() -> Self {
        let text = serde_json::to_string(&Config::default()).unwrap_or_default();
        let Ok(Json::Object(entries)) = serde_json::from_str(&text) else {
            return Self {
                keys: Vec::new(),
                sections: Vec::new(),
            };
        };
        let value = |json: &Json| toml::Value::try_from(json).ok().filter(|_| !json.is_null());
        let (mut keys, mut sections) = (Vec::new(), Vec::new());
        for (name, entry) in &entries {
            match entry {
                Json::Object(inner) => {
                    sections.push(name.clone());
                    keys.extend(
                        inner
                            .iter()
                            .map(|(key, entry)| (Key::in_section(name, key), value(entry))),
                    );
                }
                _ => keys.push((Key::top(name), value(entry))),
            }
        }
        Self { keys, sections }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(Key, Option<toml::Value>)> {
        self.keys.iter()
    }

    pub(super) fn sections(&self) -> &[String] {
        &self.sections
    }

    pub(super) fn has_section(&self, name: &str) -> bool {
        self.sections.iter().any(|section| section == name)
    }

    pub(super) fn has(&self, key: &Key) -> bool {
        let named = key
            .section
            .as_deref()
            .is_some_and(|section| NAMED.contains(&section));
        named || self.keys.iter().any(|(known, _)| known == key)
    }

    /// What a value of this key looks like, for a hint.
    pub(super) fn example(&self, key: &Key) -> String {
        match self.keys.iter().find(|(known, _)| known == key) {
            Some((_, Some(value))) => format!("its default is {value}"),
            _ => "text in quotes".to_owned(),
        }
    }

    /// What the user may have meant by a key that is not known; `spell` writes a key as it would stand there.
    pub(super) fn hint(&self, wrong: &Key, spell: impl Fn(&Key) -> String) -> String {
        if let Some(key) = self.nearest(wrong) {
            return format!("did you mean `{}`?", spell(&key));
        }
        let list = |names: Vec<String>| format!("known are {}", names.join(", "));
        let section = wrong.section.as_deref();
        match section.filter(|section| self.has_section(section)) {
            Some(section) => list(
                self.keys
                    .iter()
                    .filter(|(known, _)| known.section.as_deref() == Some(section))
                    .map(|(known, _)| spell(known))
                    .collect(),
            ),
            None => list(
                self.keys
                    .iter()
                    .filter(|(known, _)| known.section.is_none())
                    .map(|(known, _)| known.name.clone())
                    .chain(self.sections.iter().map(|section| format!("[{section}]")))
                    .collect(),
            ),
        }
    }

    fn nearest(&self, wrong: &Key) -> Option<Key> {
        // The right name in the wrong section.
        let mut same = self.keys.iter().filter(|(known, _)| known.name == wrong.name);
        if let (Some((key, _)), None) = (same.next(), same.next()) {
            return Some(key.clone());
        }
        let text = wrong.to_string();
        let sections = self.sections.iter().map(Key::top);
        self.keys
            .iter()
            .map(|(known, _)| known.clone())
            .chain(sections)
            .map(|known| (strsim::osa_distance(&text, &known.to_string()), known))
            .min_by_key(|(distance, _)| *distance)
            .filter(|(distance, _)| *distance <= 2 + text.len() / 4)
            .map(|(_, known)| known)
    }
}

/// The nearest of some words, where one is near.
pub(super) fn nearest_word<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|known| (strsim::osa_distance(word, known), *known))
        .min()
        .filter(|(distance, _)| *distance <= 2)
        .map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_without_a_default_are_known_too() {
        let keys = Keys::all();
        for (key, default) in [
            ("model.path", None),
            ("state_dir", None),
            ("sampling.top_p", Some(toml::Value::Float(0.95))),
            ("model.n_ctx", Some(toml::Value::Integer(2048))),
        ] {
            let known = keys.iter().find(|(known, _)| *known == Key::parse(key));
            assert_eq!(known.map(|(_, default)| default.clone()), Some(default), "{key}");
        }
        assert!(keys.has(&Key::parse("adapters.any thing.at all")));
        assert!(!keys.has(&Key::parse("model.nctx")));
    }

    #[test]
    fn the_nearest_key() {
        let keys = Keys::all();
        for (wrong, hint) in [
            ("model.nctx", "did you mean `model.n_ctx`?"),
            ("model.paht", "did you mean `model.path`?"),
            ("brokr", "did you mean `broker`?"),
            ("devise", "did you mean `device`?"),
            ("broker.password-file", "did you mean `broker.password_file`?"),
            // The right name in the wrong place.
            ("n_ctx", "did you mean `model.n_ctx`?"),
            ("model.temperature", "did you mean `sampling.temperature`?"),
            (
                "metrics.zzzzzzzzz",
                "known are metrics.interval_s, metrics.energy_sensor",
            ),
        ] {
            assert_eq!(keys.hint(&Key::parse(wrong), Key::to_string), hint, "{wrong}");
        }
        let hint = keys.hint(&Key::parse("zzzzzzzzz"), Key::to_string);
        assert!(hint.contains("device") && hint.contains("[model]"), "{hint}");
        let hint = keys.hint(&Key::parse("model.nctx"), Key::variable);
        assert_eq!(hint, "did you mean `PIPIT_MODEL__N_CTX`?");
    }
}
