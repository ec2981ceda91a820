//! Layers: files, variables and flags, the later over the earlier, become one checked configuration.
//!
//! Lowest first: the built-in defaults; `config.toml` of the system; its `config.d/*.toml` by name; the user's
//! `config.toml`; variables `PIPIT_SECTION__KEY`; flags. A file that is named replaces the files that are searched.
//! A value that a higher layer hides is checked all the same.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::keys::{Key, Keys};
use super::{Config, ConfigError, Origin, Problems, Sources, file, variables};

/// One value that a layer sets.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// Its name.
    pub key: Key,
    /// As TOML has it.
    pub value: toml::Value,
    /// Who says so.
    pub origin: Origin,
}

impl Setting {
    /// What a flag says: `--ctx`, `model.n_ctx`, 1024.
    pub fn flag(name: &'static str, key: &str, value: impl Into<toml::Value>) -> Self {
        Self {
            key: Key::parse(key),
            value: value.into(),
            origin: Origin::Flag { name },
        }
    }
}

/// A configuration and where each of its values came from.
#[derive(Debug)]
pub struct Layers {
    /// What all layers together say, checked.
    pub config: Config,
    /// Files that were read, lowest first.
    pub files: Vec<PathBuf>,
    /// What is set, and by whom; all other values are defaults.
    pub settings: BTreeMap<Key, Setting>,
}

impl Layers {
    /// Reads all layers.
    ///
    /// # Errors
    /// Every problem of every layer.
    pub fn read(sources: &Sources) -> Result<Self, Problems> {
        let keys = Keys::all();
        let texts = sources.files().map_err(|error| Problems(vec![error]))?;
        let mut problems = Vec::new();
        let mut all = Vec::new();
        for (path, text) in &texts {
            all.extend(file::settings(path, text, &keys, &mut problems));
        }
        all.extend(variables::settings(&sources.variables, &keys));
        all.extend(sources.flags.iter().cloned());

        let mut settings = BTreeMap::new();
        for setting in all {
            match fit(&setting, &keys) {
                Ok(()) => drop(settings.insert(setting.key.clone(), setting)),
                Err(problem) => problems.push(problem),
            }
        }
        Problems::none_in(problems)?;
        let config = typed(settings.values().map(|setting| (&setting.key, &setting.value)))
            // Each value was tried alone.
            .map_err(|message| Problems(vec![ConfigError::value("configuration", message)]))?;
        let layers = Self {
            config,
            files: texts.into_iter().map(|(path, _)| path).collect(),
            settings,
        };
        Problems::none_in(layers.placed(layers.config.problems()))?;
        Ok(layers)
    }

    /// Checks that every file that the configuration names can be read.
    ///
    /// # Errors
    /// Every one that cannot.
    pub fn check_files(&self) -> Result<(), Problems> {
        Problems::none_in(self.placed(self.config.file_problems()))
    }

    /// Who set a value.
    pub fn origin(&self, key: &Key) -> Origin {
        self.settings
            .get(key)
            .map_or(Origin::Default, |setting| setting.origin.clone())
    }

    /// Problems of values, with the places that the values came from.
    fn placed(&self, problems: Vec<ConfigError>) -> Vec<ConfigError> {
        problems
            .into_iter()
            .map(|problem| problem.with_origin(|key| self.origin(&Key::parse(key))))
            .collect()
    }
}

/// Whether a key is known and its value has the right type.
fn fit(setting: &Setting, keys: &Keys) -> Result<(), ConfigError> {
    let Setting { key, value, origin } = setting;
    if !keys.has(key) {
        let hint = match origin {
            Origin::Variable { .. } => keys.hint(key, Key::variable),
            _ => keys.hint(key, Key::to_string),
        };
        return Err(ConfigError::UnknownKey {
            origin: origin.clone(),
            key: key.to_string(),
            hint,
        });
    }
    typed([(key, value)])
        .map(drop)
        .map_err(|message| ConfigError::Value {
            origin: Some(origin.clone()),
            key: key.to_string(),
            message: format!("{message}; hint: {}", keys.example(key)),
        })
}

/// The defaults with these values over them.
pub(super) fn typed<'a>(
    settings: impl IntoIterator<Item = (&'a Key, &'a toml::Value)>,
) -> Result<Config, String> {
    let mut table = toml::Table::new();
    for (key, value) in settings {
        let inner = match &key.section {
            None => &mut table,
            Some(section) => match table.entry(section).or_insert_with(|| toml::Table::new().into()) {
                toml::Value::Table(inner) => inner,
                _ => return Err(format!("{section} is a section and a value")),
            },
        };
        inner.insert(key.name.clone(), value.clone());
    }
    table
        .try_into()
        .map_err(|error: toml::de::Error| error.message().to_owned())
}

#[cfg(test)]
#[path = "layers_tests.rs"]
mod tests;
