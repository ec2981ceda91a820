//! The configuration: TOML files, variables and flags, in layers.
//!
//! In: [`Sources`]. Out: [`Layers`], a checked [`Config`] in which every value knows where it came from; or
//! [`Problems`], every one with its place, its key and a hint. Secrets are never values here, only files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::wire::Limits;

mod address;
mod check;
mod error;
mod file;
mod keys;
mod layers;
mod listen;
mod origin;
pub mod secret;
mod sections;
mod show;
mod sources;
mod variables;

pub use address::Address;
pub use error::{ConfigError, Problems};
pub use keys::Key;
pub use layers::{Layers, Setting};
pub use listen::Listen;
pub use origin::Origin;
pub use sections::{
    AdminSection, BrokerSection, ContentSection, HomeAssistantSection, HttpSection, InstallSection,
    JournalSection, MetricsSection, ModelSection, PoolSection, PrefixSection, ReplySection, SamplingSection,
};
pub use sources::Sources;

/// Where the embedded broker listens unless told otherwise.
pub const EMBEDDED: &str = "embedded://127.0.0.1:1883";

/// Every key with a comment and its default, all of them commented out: a file to begin with.
pub const DEFAULT_TOML: &str = include_str!("config/default.toml");

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
    /// Which models may be installed.
    pub install: InstallSection,
    /// Who may change the device.
    pub admin: AdminSection,
    /// The fleet.
    pub pool: PoolSection,
    /// Where programs ask over HTTP.
    pub http: HttpSection,
    /// Whether Home Assistant finds the device.
    pub home_assistant: HomeAssistantSection,
    /// LoRA adapters (GGUF files) by the name that a request calls them.
    pub adapters: BTreeMap<String, PathBuf>,
    /// Files of tasks by the name that is their topic.
    pub tasks: BTreeMap<String, PathBuf>,
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
    /// What is kept in words.
    pub content: ContentSection,
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
            install: InstallSection::default(),
            admin: AdminSection::default(),
            pool: PoolSection::default(),
            http: HttpSection::default(),
            home_assistant: HomeAssistantSection::default(),
            adapters: BTreeMap::new(),
            tasks: BTreeMap::new(),
            prefix: PrefixSection::default(),
            sampling: SamplingSection::default(),
            reply: ReplySection::default(),
            limits: Limits::default(),
            journal: JournalSection::default(),
            content: ContentSection::default(),
            metrics: MetricsSection::default(),
        }
    }
}

impl Config {
    /// The folder of the state: as configured, else systemd's STATE_DIRECTORY, else the user's XDG folder.
    ///
    /// # Errors
    /// When none of them is known.
    pub fn state_dir(&self) -> Result<PathBuf, ConfigError> {
        self.state_dir
            .clone()
            .or_else(|| folder("STATE_DIRECTORY"))
            .or_else(|| folder("XDG_STATE_HOME").map(|folder| folder.join("pipit")))
            .or_else(|| folder("HOME").map(|home| home.join(".local/state/pipit")))
            .ok_or_else(|| {
                ConfigError::value(
                    "state_dir",
                    "no folder for the state; hint: --state-dir names one",
                )
            })
    }
}

/// A folder that a variable of the environment names.
fn folder(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
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

#[cfg(test)]
mod tests {
    use super::keys::Keys;
    use super::*;

    /// [`DEFAULT_TOML`] with its settings in force: `#key = value` is a setting, `# text` is not.
    fn uncommented() -> toml::Table {
        let lines = DEFAULT_TOML.lines().map(|line| match line.strip_prefix('#') {
            Some(setting) if !setting.is_empty() && !setting.starts_with(' ') => setting,
            _ => line,
        });
        lines.collect::<Vec<_>>().join("\n").parse().unwrap()
    }

    #[test]
    fn the_file_to_begin_with_changes_nothing() {
        let config: Config = toml::from_str(DEFAULT_TOML).unwrap();
        assert_eq!(config, Config::default());
    }

    #[test]
    fn the_file_to_begin_with_names_every_key_and_its_default() {
        let table = uncommented();
        let mut named = 0;
        for (key, default) in Keys::all().iter() {
            let said = match &key.section {
                Some(section) => table.get(section).and_then(|inner| inner.get(&key.name)),
                None => table.get(&key.name),
            };
            let said = said.unwrap_or_else(|| panic!("config/default.toml does not name {key}"));
            named += 1;
            // The name of the machine and the default broker are not the same in every build; an example stands for
            // what has no default.
            let varies = key.name == "device" || key.name == "url" && !cfg!(feature = "embedded-broker");
            if let Some(default) = default.as_ref().filter(|_| !varies) {
                assert_eq!(said, default, "{key}");
            }
        }
        assert!(named > 30, "{named}");
        // It says nothing that the configuration does not know, and its examples can be.
        let mut config: Config = table.try_into().unwrap();
        config.broker.url = BrokerSection::default().url;
        config.http.listen = config.http.listen.filter(|_| cfg!(feature = "http"));
        assert!(config.problems().is_empty(), "{:?}", config.problems());
    }
}
