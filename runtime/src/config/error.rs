//! What is wrong with a configuration, and where.

use std::fmt;
use std::path::PathBuf;

use super::Origin;

/// One problem.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file of the configuration cannot be read.
    #[error("{path} cannot be read: {source}; hint: is it there, and may this user read it?")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It is not TOML.
    #[error(
        "{origin}: not TOML: {message}; hint: text stands in quotes, a section is [name], each stands once"
    )]
    Syntax {
        /// File and line.
        origin: Origin,
        /// The parser's reason.
        message: String,
    },
    /// A key that is not known.
    #[error("{origin}: unknown key `{key}`; hint: {hint}")]
    UnknownKey {
        /// Where it stands.
        origin: Origin,
        /// The key with its section.
        key: String,
        /// The nearest one.
        hint: String,
    },
    /// A value that cannot be.
    #[error("{}{key}: {message}", origin.as_ref().map(|origin| format!("{origin}: ")).unwrap_or_default())]
    Value {
        /// Where it stands; `None` for a configuration that was made by a program.
        origin: Option<Origin>,
        /// The key with its section.
        key: String,
        /// What is wrong; with a hint.
        message: String,
    },
}

impl ConfigError {
    /// A value that cannot be, from nowhere in particular.
    pub(crate) fn value(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Value {
            origin: None,
            key: key.into(),
            message: message.into(),
        }
    }

    /// The same, and where the value came from.
    pub(super) fn with_origin(self, of: impl FnOnce(&str) -> Origin) -> Self {
        match self {
            Self::Value {
                origin: None,
                key,
                message,
            } => Self::Value {
                origin: Some(of(&key)),
                key,
                message,
            },
            other => other,
        }
    }
}

/// Every problem of a configuration, at least one.
#[derive(Debug)]
pub struct Problems(pub Vec<ConfigError>);

impl Problems {
    /// `Err` when there is one.
    pub(super) fn none_in(problems: Vec<ConfigError>) -> Result<(), Self> {
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Self(problems))
        }
    }
}

impl fmt::Display for Problems {
    /// One a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.0.iter().enumerate() {
            if at > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
