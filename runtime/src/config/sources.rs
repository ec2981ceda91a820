//! The places that layers come from, and the files of them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{ConfigError, Setting, folder};

/// Where layers come from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Folder of the system's configuration.
    pub system: Option<PathBuf>,
    /// Folder of the user's configuration.
    pub user: Option<PathBuf>,
    /// A file that is read in place of those two.
    pub file: Option<PathBuf>,
    /// Variables of the environment; those that are no settings are passed over.
    pub variables: Vec<(String, String)>,
    /// What flags say.
    pub flags: Vec<Setting>,
}

impl Sources {
    /// `/etc/pipit`, the user's XDG folder and the environment of this process.
    pub fn of_process() -> Self {
        Self {
            system: Some(PathBuf::from("/etc/pipit")),
            user: folder("XDG_CONFIG_HOME")
                .or_else(|| folder("HOME").map(|home| home.join(".config")))
                .map(|folder| folder.join("pipit")),
            file: None,
            variables: std::env::vars_os()
                .map(|(name, text)| {
                    let text = text.to_string_lossy().into_owned();
                    (name.to_string_lossy().into_owned(), text)
                })
                .collect(),
            flags: Vec::new(),
        }
    }

    /// Files in the order in which they are read, with their text. Searched ones need not be there.
    pub(super) fn files(&self) -> Result<Vec<(PathBuf, String)>, ConfigError> {
        if let Some(file) = &self.file {
            return match std::fs::read_to_string(file) {
                Ok(text) => Ok(vec![(file.clone(), text)]),
                Err(source) => Err(unreadable(file, source)),
            };
        }
        let mut paths = Vec::new();
        if let Some(system) = &self.system {
            paths.push(system.join("config.toml"));
            paths.extend(drop_ins(&system.join("config.d"))?);
        }
        paths.extend(self.user.iter().map(|user| user.join("config.toml")));
        let mut files = Vec::new();
        for path in paths {
            match std::fs::read_to_string(&path) {
                Ok(text) => files.push((path, text)),
                Err(error) if is_absent(&error) => {}
                // A service may be kept from its user's home (ProtectHome of systemd).
                Err(error)
                    if error.kind() == ErrorKind::PermissionDenied
                        && path.parent() == self.user.as_deref() => {}
                Err(error) => return Err(unreadable(&path, error)),
            }
        }
        Ok(files)
    }
}

fn unreadable(path: &Path, source: std::io::Error) -> ConfigError {
    ConfigError::Io {
        path: path.to_owned(),
        source,
    }
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// The `.toml` files of a folder by name; none where there is no folder.
fn drop_ins(folder: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(folder, error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| unreadable(folder, error))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}
