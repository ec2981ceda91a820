//! What the types of a configuration do not say: ranges, names, files that must be there.

use std::fs::File;
use std::path::Path;

use super::keys::nearest_word;
use super::{Address, Config, ConfigError, Listen, secret};
use crate::store::Keys;
use crate::wire::topics::valid_id;

/// ggml's types that a KV cache can have.
const CACHE_TYPES: &[&str] = &[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl",
];

impl Config {
    /// Checks what the types do not say.
    ///
    /// # Errors
    /// The first of [`Config::problems`].
    pub fn check(&self) -> Result<(), ConfigError> {
        self.problems().into_iter().next().map_or(Ok(()), Err)
    }

    /// Every value that cannot be. Needs no file.
    pub fn problems(&self) -> Vec<ConfigError> {
        let mut found = self.names();
        found.extend(self.ranges());
        found.extend(self.sampling());
        found
    }

    /// Names, topics and the broker's address.
    fn names(&self) -> Vec<ConfigError> {
        let mut found = Vec::new();
        let mut wrong = |key: &str, message: String| found.push(ConfigError::value(key, message));
        if !valid_id(&self.device) {
            wrong(
                "device",
                format!(
                    "`{}` is no device name; hint: 1 to 64 of A-Z a-z 0-9 _ . -",
                    self.device
                ),
            );
        }
        if self.device == "pool" {
            wrong(
                "device",
                "`pool` is a level of its own in the topics; hint: another name".to_owned(),
            );
        }
        if let Some(pool) = &self.pool.name
            && !valid_id(pool)
        {
            wrong(
                "pool.name",
                format!("`{pool}` is no name of a pool; hint: 1 to 64 of A-Z a-z 0-9 _ . -"),
            );
        }
        for (key, start, like) in [
            ("root", &self.root, "`pipit` or `home/pipit`"),
            (
                "home_assistant.prefix",
                &self.home_assistant.prefix,
                "`homeassistant`",
            ),
        ] {
            if !begins_a_topic(start) {
                wrong(
                    key,
                    format!("`{start}` cannot begin a topic; hint: one like {like}"),
                );
            }
        }
        for prefix in &self.reply.prefixes {
            if prefix.trim_matches('/').is_empty()
                || prefix.starts_with('$')
                || prefix.contains(['+', '#', '\0'])
            {
                wrong(
                    "reply.prefixes",
                    format!("`{prefix}` is no prefix of topics; hint: one like `reply/`"),
                );
            }
        }
        for (key, name) in [
            ("model.cache_type_k", &self.model.cache_type_k),
            ("model.cache_type_v", &self.model.cache_type_v),
        ] {
            if !CACHE_TYPES.contains(&name.as_str()) {
                let hint = nearest_word(name, CACHE_TYPES).map_or_else(
                    || format!("known are {}", CACHE_TYPES.join(", ")),
                    |near| format!("did you mean `{near}`?"),
                );
                wrong(key, format!("`{name}` is no type of a KV cache; hint: {hint}"));
            }
        }
        if let Err(message) = Keys::new(&self.install.trusted_keys, false) {
            wrong("install.trusted_keys", message);
        }
        found.extend(self.login());
        if let Some(listen) = &self.http.listen {
            found.extend(Listen::parse(listen, &self.http).err());
        }
        found.extend(Address::parse(&self.broker.url).err());
        found
    }

    /// What goes together at the broker's door.
    fn login(&self) -> Vec<ConfigError> {
        let broker = &self.broker;
        let mut found = Vec::new();
        let mut wrong = |key: &str, message: &str| found.push(ConfigError::value(key, message));
        if broker.password_file.is_some() && broker.username.is_none() {
            wrong(
                "broker.password_file",
                "there is no user to whom the password belongs; hint: [broker] username",
            );
        }
        match (&broker.certificate, &broker.key) {
            (Some(_), None) => wrong("broker.certificate", "it has no key; hint: [broker] key"),
            (None, Some(_)) => wrong("broker.key", "it has no certificate; hint: [broker] certificate"),
            (Some(_), Some(_)) if broker.ca.is_none() => wrong(
                "broker.certificate",
                "a broker that asks for certificates has an authority of its own; hint: [broker] ca",
            ),
            (Some(_), Some(_))
                if matches!(
                    Address::parse(&broker.url),
                    Ok(Address::Remote { tls: false, .. })
                ) =>
            {
                wrong(
                    "broker.certificate",
                    "the connection is not encrypted; hint: mqtts:// in [broker] url",
                );
            }
            _ => {}
        }
        found
    }

    /// Whole numbers that have a least or a most.
    fn ranges(&self) -> Vec<ConfigError> {
        let (model, limits) = (&self.model, &self.limits);
        let least = [
            ("model.n_ctx", u64::from(model.n_ctx), 16),
            ("model.slots", u64::from(model.slots), 1),
            ("model.prefill_chunk", u64::from(model.prefill_chunk), 1),
            ("model.prefill_ms", u64::from(model.prefill_ms), 1),
            ("model.hang_s", model.hang_s, 10),
            ("limits.max_tokens", u64::from(limits.max_tokens), 1),
            ("limits.queue", limits.queue as u64, 1),
            ("limits.client_queue", limits.client_queue as u64, 1),
            ("limits.request_bytes", limits.request_bytes as u64, 1),
            ("limits.depth", limits.depth as u64, 1),
            ("limits.messages", limits.messages as u64, 1),
            ("journal.bytes", self.journal.bytes as u64, 1),
            ("broker.keep_alive_s", u64::from(self.broker.keep_alive_s), 5),
        ];
        let mut found: Vec<ConfigError> = least
            .into_iter()
            .filter(|(_, value, least)| value < least)
            .map(|(key, value, least)| {
                ConfigError::value(key, format!("{value} is too small; hint: at least {least}"))
            })
            .collect();
        if !(1..=1024).contains(&self.pool.hold) {
            found.push(ConfigError::value(
                "pool.hold",
                format!("{} cannot be; hint: 1 to 1024", self.pool.hold),
            ));
        }
        if self.broker.keep_alive_s > 3600 {
            found.push(ConfigError::value(
                "broker.keep_alive_s",
                format!("{} is too large; hint: at most 3600", self.broker.keep_alive_s),
            ));
        }
        found
    }

    /// The same ranges as in a request.
    fn sampling(&self) -> Vec<ConfigError> {
        let sampling = &self.sampling;
        let least_penalty = f32::MIN_POSITIVE;
        let ranges = [
            ("sampling.temperature", sampling.temperature, 0.0, 10.0),
            ("sampling.top_p", sampling.top_p, 0.0, 1.0),
            ("sampling.min_p", sampling.min_p, 0.0, 1.0),
            (
                "sampling.repeat_penalty",
                sampling.repeat_penalty,
                least_penalty,
                10.0,
            ),
            (
                "sampling.frequency_penalty",
                sampling.frequency_penalty,
                -2.0,
                2.0,
            ),
            ("sampling.presence_penalty", sampling.presence_penalty, -2.0, 2.0),
        ];
        let mut found: Vec<ConfigError> = ranges
            .into_iter()
            // A NaN is in no range.
            .filter(|(_, value, low, high)| !(low..=high).contains(&value))
            .map(|(key, value, low, high)| {
                let low = if low == least_penalty {
                    "above 0".to_owned()
                } else {
                    format!("from {low}")
                };
                ConfigError::value(key, format!("{value} cannot be; hint: a number {low} to {high}"))
            })
            .collect();
        if sampling.top_k < 0 {
            found.push(ConfigError::value(
                "sampling.top_k",
                format!("{} cannot be; hint: 0 keeps all tokens", sampling.top_k),
            ));
        }
        if sampling.repeat_last_n < -1 {
            found.push(ConfigError::value(
                "sampling.repeat_last_n",
                format!("{} cannot be; hint: -1 is all tokens", sampling.repeat_last_n),
            ));
        }
        found
    }

    /// Every file that the configuration names and that cannot be read. What is in them is nobody's business here.
    pub fn file_problems(&self) -> Vec<ConfigError> {
        let named = [
            ("model.path", &self.model.path),
            ("broker.ca", &self.broker.ca),
            ("broker.password_file", &self.broker.password_file),
            ("broker.certificate", &self.broker.certificate),
            ("broker.key", &self.broker.key),
            ("http.key_file", &self.http.key_file),
            ("metrics.energy_sensor", &self.metrics.energy_sensor),
        ];
        let named = named
            .into_iter()
            .filter_map(|(key, path)| Some((key.to_owned(), secret::file(path.as_deref()?))));
        let adapters = self
            .adapters
            .iter()
            .map(|(name, path)| (format!("adapters.{name}"), path.clone()))
            .chain(
                self.tasks
                    .iter()
                    .map(|(name, path)| (format!("tasks.{name}"), path.clone())),
            );
        named
            .chain(adapters)
            .filter_map(|(key, path)| {
                let why = unreadable(&path)?;
                Some(ConfigError::value(
                    key,
                    format!(
                        "{} {why}; hint: is it there, and may this user read it?",
                        path.display()
                    ),
                ))
            })
            .collect()
    }
}

fn begins_a_topic(start: &str) -> bool {
    (1..=128).contains(&start.len())
        && !start.starts_with(['/', '$'])
        && !start.ends_with('/')
        && !start.contains(['+', '#', '\0'])
}

/// Why a file cannot be read.
fn unreadable(path: &Path) -> Option<String> {
    match File::open(path).and_then(|file| file.metadata()) {
        Ok(meta) if meta.is_dir() => Some("is a folder".to_owned()),
        Ok(_) => None,
        Err(error) => Some(format!("cannot be read: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_cannot_be_are_named_all_at_once() {
        assert!(Config::default().check().is_ok());
        let text = r#"
            device = "a b"
            root = "a/#"
            [broker]
            url = "http://x"
            keep_alive_s = 1
            password_file = "p"
            key = "k"
            [model]
            n_ctx = 15
            slots = 0
            prefill_chunk = 0
            hang_s = 9
            cache_type_k = "q8"
            cache_type_v = "nonsense"
            [sampling]
            temperature = nan
            top_p = 1.5
            min_p = -0.1
            top_k = -1
            repeat_penalty = 0.0
            frequency_penalty = 3.0
            presence_penalty = -3.0
            repeat_last_n = -2
            [reply]
            prefixes = ["/", "ok/", "a/+"]
            [limits]
            queue = 0
            max_tokens = 0
            request_bytes = 0
            [journal]
            bytes = 0
            [install]
            trusted_keys = ["RWQ"]
            [pool]
            name = "a/b"
            hold = 0
        "#;
        let config: Config = toml::from_str(text).unwrap();
        let problems = config.problems();
        let mut keys: Vec<&str> = problems
            .iter()
            .map(|problem| match problem {
                ConfigError::Value { key, message, .. } => {
                    assert!(message.contains("hint:"), "{key}: {message}");
                    key.as_str()
                }
                other => panic!("{other}"),
            })
            .collect();
        // Every key of the text, and one twice: two prefixes are wrong.
        let table: toml::Table = text.parse().unwrap();
        let mut named = vec!["reply.prefixes".to_owned()];
        for (name, entry) in table {
            match entry {
                toml::Value::Table(inner) => named.extend(inner.keys().map(|key| format!("{name}.{key}"))),
                _ => named.push(name),
            }
        }
        named.sort();
        keys.sort_unstable();
        assert_eq!(keys, named);
        let text = format!("{problems:?}");
        assert!(text.contains("`q8_0`"), "{text}");
    }

    #[test]
    fn keep_alive_has_a_most() {
        let mut config = Config::default();
        config.broker.keep_alive_s = 3601;
        assert!(config.check().is_err());
    }

    #[test]
    fn roots_that_cannot_begin_a_topic() {
        for root in ["", "/a", "$share", "a/", "a+b", "a\0b"] {
            let config = Config {
                root: root.to_owned(),
                ..Config::default()
            };
            assert!(config.check().is_err(), "{root:?}");
        }
    }

    #[test]
    fn files_that_are_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("there");
        std::fs::write(&there, "x").unwrap();
        let mut config = Config::default();
        config.model.path = Some(there.clone());
        config.broker.ca = Some(folder.path().join("absent.pem"));
        config.adapters.insert("good".to_owned(), there);
        config.adapters.insert("bad".to_owned(), folder.path().to_owned());
        let said: Vec<String> = config.file_problems().iter().map(ToString::to_string).collect();
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(
            said[0].starts_with("broker.ca: ") && said[0].contains("absent.pem"),
            "{said:?}"
        );
        assert!(
            said[1].starts_with("adapters.bad: ") && said[1].contains("is a folder"),
            "{said:?}"
        );
    }
}
