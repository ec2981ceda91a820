//! The configuration: a TOML file, with flags over it.
//!
//! In: text of the file, flags. Out: a checked [`Config`] in which every value is set. An unknown key is refused
//! with the nearest name that is known. Secrets are never values here, only files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::wire::Limits;
use crate::wire::topics::valid_id;

mod address;

pub use address::Address;

/// Where the embedded broker listens unless told otherwise.
pub const EMBEDDED: &str = "embedded://127.0.0.1:1883";

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It is not TOML, or a value has the wrong type.
    #[error("configuration {path}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        message: String,
    },
    /// A key that is not known.
    #[error("configuration {path}: unknown key `{key}`; hint: {hint}")]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key with its section.
        key: String,
        /// The nearest one.
        hint: String,
    },
    /// A value that cannot be.
    #[error("{key}: {message}")]
    Value {
        /// The key with its section, or the flag.
        key: &'static str,
        /// What is wrong; with a hint.
        message: String,
    },
}

fn value(key: &'static str, message: impl Into<String>) -> ConfigError {
    ConfigError::Value {
        key,
        message: message.into(),
    }
}

/// `[broker]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BrokerSection {
    /// `mqtt://HOST[:PORT]`, `mqtts://HOST[:PORT]` or `embedded[://ADDR:PORT]`
    pub url: String,
    /// User name.
    pub username: Option<String>,
    /// File that holds the password.
    pub password_file: Option<PathBuf>,
    /// PEM file with the authorities to trust for `mqtts://`; the system's by default.
    pub ca: Option<PathBuf>,
    /// Seconds between two signs of life, 5 to 3600.
    pub keep_alive_s: u16,
    /// Seconds that the broker keeps requests for a device that is away.
    pub session_expiry_s: u32,
}

impl Default for BrokerSection {
    fn default() -> Self {
        Self {
            url: if cfg!(feature = "embedded-broker") {
                EMBEDDED
            } else {
                "mqtt://127.0.0.1:1883"
            }
            .to_owned(),
            username: None,
            password_file: None,
            ca: None,
            keep_alive_s: 30,
            session_expiry_s: 7 * 24 * 3600,
        }
    }
}

/// `[model]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// The GGUF file.
    pub path: Option<PathBuf>,
    /// Context in tokens, shared by all requests under way and by the beginnings that are kept for later ones. One
    /// request gets at most what the model was trained for.
    pub n_ctx: u32,
    /// Requests under way at a time.
    pub slots: u32,
    /// Threads; 0 is one for each physical core.
    pub threads: u32,
    /// Type of the keys in the KV cache: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl.
    pub cache_type_k: String,
    /// Type of the values in the KV cache.
    pub cache_type_v: String,
    /// Most tokens of prefill in one step.
    pub prefill_chunk: u32,
    /// Milliseconds that one step of prefill should take at most: between two steps a cancel is heard, and other
    /// requests get their next token.
    pub prefill_ms: u32,
    /// Bytes of memory that the model may take; 0 is what is available when it is loaded.
    pub memory_bytes: u64,
    /// Seconds without a request after which the model is unloaded, until the next request; 0 is never.
    pub idle_unload_s: u64,
    /// Seconds without a sign of life after which the worker is ended and started anew.
    pub hang_s: u64,
}

impl Default for ModelSection {
    fn default() -> Self {
        Self {
            path: None,
            n_ctx: 2048,
            slots: 8,
            threads: 0,
            cache_type_k: "f16".to_owned(),
            cache_type_v: "f16".to_owned(),
            prefill_chunk: 512,
            prefill_ms: 250,
            memory_bytes: 0,
            idle_unload_s: 0,
            hang_s: 120,
        }
    }
}

/// `[prefix]`: beginnings of prompts, kept as KV so that the next request which begins so need not compute them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixSection {
    /// Beginnings kept in the context at a time.
    pub entries: u32,
    /// Shortest one that is written to the disk, in tokens.
    pub disk_tokens: u32,
    /// Bytes of them on the disk, where they live through a restart; 0 is none.
    pub disk_bytes: u64,
}

impl Default for PrefixSection {
    fn default() -> Self {
        Self {
            entries: 16,
            disk_tokens: 128,
            disk_bytes: 128 * 1024 * 1024,
        }
    }
}

/// `[sampling]`: what a request gets that does not say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingSection {
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: i32,
    /// 0 keeps all.
    pub min_p: f32,
    /// Divides the logits of tokens seen before; 1 is off.
    pub repeat_penalty: f32,
    /// Subtracted once for each time that a token was seen; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from tokens seen at all; 0 is off.
    pub presence_penalty: f32,
    /// How many of the last tokens count as seen; 0 is none, -1 all.
    pub repeat_last_n: i32,
}

impl Default for SamplingSection {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 0.95,
            top_k: 40,
            min_p: 0.05,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 64,
        }
    }
}

/// `[reply]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplySection {
    /// Topics under which a client may ask for its answer, besides the device's own `res/`.
    pub prefixes: Vec<String>,
}

impl Default for ReplySection {
    fn default() -> Self {
        Self {
            prefixes: vec!["reply/".to_owned()],
        }
    }
}

/// `[journal]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JournalSection {
    /// Bytes of requests and answers that are kept; when what is owed to clients is more, the answer is `queue_full`.
    pub bytes: usize,
    /// Hours that a delivered answer is kept, for requests that come again.
    pub answer_hours: u64,
}

impl Default for JournalSection {
    fn default() -> Self {
        Self {
            bytes: 16 * 1024 * 1024,
            answer_hours: 24,
        }
    }
}

/// `[metrics]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsSection {
    /// Seconds between two messages; 0 sends none.
    pub interval_s: u64,
}

impl Default for MetricsSection {
    fn default() -> Self {
        Self { interval_s: 30 }
    }
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// First level of every topic.
    pub root: String,
    /// Name of this device: `[A-Za-z0-9_.-]{1,64}`.
    pub device: String,
    /// Folder of the journal and of what is computed once.
    pub state_dir: Option<PathBuf>,
    /// Seconds that a request under way may take to finish when the daemon is told to stop.
    pub grace_s: u64,
    /// The broker.
    pub broker: BrokerSection,
    /// The model.
    pub model: ModelSection,
    /// LoRA adapters (GGUF files) by the name that a request calls them.
    pub adapters: BTreeMap<String, PathBuf>,
    /// Beginnings of prompts.
    pub prefix: PrefixSection,
    /// Defaults of requests.
    pub sampling: SamplingSection,
    /// Where answers may go.
    pub reply: ReplySection,
    /// Caps on requests.
    pub limits: Limits,
    /// What is kept.
    pub journal: JournalSection,
    /// Counters.
    pub metrics: MetricsSection,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "pipit".to_owned(),
            device: host_name(),
            state_dir: None,
            grace_s: 5,
            broker: BrokerSection::default(),
            model: ModelSection::default(),
            adapters: BTreeMap::new(),
            prefix: PrefixSection::default(),
            sampling: SamplingSection::default(),
            reply: ReplySection::default(),
            limits: Limits::default(),
            journal: JournalSection::default(),
            metrics: MetricsSection::default(),
        }
    }
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Reads the text of a file; `path` is for messages.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let syntax = |message: String| ConfigError::Syntax {
            path: path.to_owned(),
            message: message.trim().to_owned(),
        };
        let table: toml::Table = text
            .parse()
            .map_err(|error: toml::de::Error| syntax(error.to_string()))?;
        if let Some((key, hint)) = unknown_key(&table) {
            return Err(ConfigError::UnknownKey {
                path: path.to_owned(),
                key,
                hint,
            });
        }
        toml::from_str(text).map_err(|error| syntax(error.to_string()))
    }

    /// Checks what the types do not say.
    ///
    /// # Errors
    /// [`ConfigError::Value`]
    pub fn check(&self) -> Result<(), ConfigError> {
        if !valid_id(&self.device) {
            return Err(value(
                "device",
                format!(
                    "`{}` is no device name; hint: 1 to 64 of A-Z a-z 0-9 _ . -",
                    self.device
                ),
            ));
        }
        if self.root.is_empty()
            || self.root.len() > 128
            || self.root.starts_with(['/', '$'])
            || self.root.ends_with('/')
            || self.root.contains(['+', '#', '\0'])
        {
            return Err(value("root", format!("`{}` cannot begin a topic", self.root)));
        }
        if !(5..=3600).contains(&self.broker.keep_alive_s) {
            return Err(value("broker.keep_alive_s", "must be 5 to 3600"));
        }
        if let Some(prefix) = self.reply.prefixes.iter().find(|prefix| {
            prefix.trim_matches('/').is_empty()
                || prefix.starts_with('$')
                || prefix.contains(['+', '#', '\0'])
        }) {
            return Err(value(
                "reply.prefixes",
                format!("`{prefix}` is no prefix of topics; hint: one like `reply/`"),
            ));
        }
        if self.limits.max_tokens == 0 || self.limits.queue == 0 || self.limits.request_bytes == 0 {
            return Err(value(
                "limits",
                "max_tokens, queue and request_bytes must be at least 1",
            ));
        }
        if self.model.n_ctx < 16 || self.model.hang_s < 10 || self.model.slots == 0 {
            return Err(value(
                "model",
                "n_ctx must be at least 16, hang_s at least 10, slots at least 1",
            ));
        }
        Address::parse(&self.broker.url).map(drop)
    }

    /// The folder of the state: as configured, else systemd's STATE_DIRECTORY, else the user's XDG folder.
    ///
    /// # Errors
    /// When none of them is known.
    pub fn state_dir(&self) -> Result<PathBuf, ConfigError> {
        let from = |name: &str| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        self.state_dir
            .clone()
            .or_else(|| from("STATE_DIRECTORY"))
            .or_else(|| from("XDG_STATE_HOME").map(|folder| folder.join("pipit")))
            .or_else(|| from("HOME").map(|home| home.join(".local/state/pipit")))
            .ok_or_else(|| {
                value(
                    "state_dir",
                    "no folder for the state; hint: --state-dir names one",
                )
            })
    }
}

/// This machine's name, with what an id may not hold replaced by `-`.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .or_else(|_| std::fs::read_to_string("/etc/hostname"))
        .unwrap_or_default();
    let id: String = name
        .trim()
        .chars()
        .map(|letter| {
            if letter.is_ascii_alphanumeric() || "_.-".contains(letter) {
                letter
            } else {
                '-'
            }
        })
        .take(64)
        .collect();
    if id.is_empty() { "pipit".to_owned() } else { id }
}

/// The first key of `table` that is not known, and a hint.
fn unknown_key(table: &toml::Table) -> Option<(String, String)> {
    let known = known_keys();
    for (key, entry) in table {
        let section = |name: &str| known.iter().any(|known| known.starts_with(&format!("{name}.")));
        match entry {
            toml::Value::Table(_) if key == "adapters" => {}
            toml::Value::Table(inner) if section(key) => {
                for field in inner.keys() {
                    let full = format!("{key}.{field}");
                    if !known.contains(&full) {
                        return Some((full.clone(), nearest(&full, &known)));
                    }
                }
            }
            _ if known.contains(key) || section(key) => {}
            _ => {
                let mut names: Vec<String> = known
                    .iter()
                    .map(|known| known.split('.').next().unwrap_or_default().to_owned())
                    .collect();
                names.dedup();
                return Some((key.clone(), nearest(key, &names)));
            }
        }
    }
    None
}

/// Every key there is, as `section.key`.
fn known_keys() -> Vec<String> {
    let mut keys: Vec<String> = [
        "broker.username",
        "broker.password_file",
        "broker.ca",
        "model.path",
        "state_dir",
        "adapters",
    ]
    .map(ToOwned::to_owned)
    .to_vec();
    // Keys without a default are absent here: they are listed above.
    if let Ok(toml::Value::Table(table)) = toml::Value::try_from(Config::default()) {
        for (key, entry) in table {
            match entry {
                toml::Value::Table(inner) => keys.extend(inner.keys().map(|field| format!("{key}.{field}"))),
                _ => keys.push(key),
            }
        }
    }
    keys.sort();
    keys
}

fn nearest(key: &str, known: &[String]) -> String {
    match known.iter().min_by_key(|known| distance(key, known)) {
        Some(best) if distance(key, best) <= 2 + key.len() / 4 => format!("did you mean `{best}`?"),
        _ => format!("known are {}", known.join(", ")),
    }
}

/// Levenshtein distance in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.bytes().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (above + 1)
                .min(row[j] + 1)
                .min(diagonal + usize::from(left != right));
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("pipit.toml"))
    }

    #[test]
    fn values_and_defaults() {
        let config =
            parse("device = \"a\"\n[model]\nn_ctx = 512\npath = \"m.gguf\"\n[broker]\nca = \"c\"").unwrap();
        assert_eq!((config.device.as_str(), config.model.n_ctx), ("a", 512));
        assert_eq!(config.limits, Limits::default());
        assert!(config.check().is_ok());
        // What the defaults say is a configuration.
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(parse(&text).unwrap(), Config::default());
    }

    #[test]
    fn unknown_keys_get_the_nearest_name() {
        for (text, key, near) in [
            ("[model]\nnctx = 5", "model.nctx", "model.n_ctx"),
            ("[brokr]\nurl = \"x\"", "brokr", "broker"),
            ("devise = \"a\"", "devise", "device"),
            (
                "[broker]\npassword-file = \"x\"",
                "broker.password-file",
                "broker.password_file",
            ),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(
                error.contains(&format!("`{key}`")) && error.contains(&format!("`{near}`")),
                "{error}"
            );
        }
        assert!(matches!(parse("model = "), Err(ConfigError::Syntax { .. })));
        assert!(matches!(
            parse("[model]\nn_ctx = \"x\""),
            Err(ConfigError::Syntax { .. })
        ));
        assert!(matches!(parse("model = 3"), Err(ConfigError::Syntax { .. })));
    }

    #[test]
    fn values_that_cannot_be() {
        for text in [
            "device = \"a b\"",
            "root = \"a/#\"",
            "root = \"$x\"",
            "[broker]\nkeep_alive_s = 1",
            "[broker]\nurl = \"http://x\"",
            "[reply]\nprefixes = [\"/\"]",
            "[limits]\nqueue = 0",
        ] {
            assert!(parse(text).unwrap().check().is_err(), "{text}");
        }
    }
}
