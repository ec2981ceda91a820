//! What can go wrong with an installation.

use std::path::{Path, PathBuf};

use crate::config::ConfigError;
use crate::model::ModelError;
use crate::plan::PlanError;

/// Why a model was not installed, or cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The source cannot be read.
    #[error("{source_name}: {message}; hint: {hint}")]
    Source {
        /// The path or URL.
        source_name: String,
        /// What is wrong.
        message: String,
        /// What may help.
        hint: &'static str,
    },
    /// The manifest says something that cannot be.
    #[error("manifest {place}: {message}; hint: `pipit model pack` writes one")]
    Manifest {
        /// Where it was read.
        place: String,
        /// What is wrong.
        message: String,
    },
    /// There is no signature, and one is wanted.
    #[error(
        "{place} is not signed; hint: `minisign -Sm manifest.json` signs it; [install] allow_unsigned = true takes it as it is"
    )]
    Unsigned {
        /// The manifest.
        place: String,
    },
    /// No key is trusted.
    #[error(
        "no key is trusted, so no signature can be good; hint: [install] trusted_keys = [\"RW…\"], the second line of minisign.pub"
    )]
    NoKeys,
    /// The signature is not that of a trusted key over this manifest.
    #[error("the signature of {place} is not good: {message}; hint: {hint}")]
    Signature {
        /// The manifest.
        place: String,
        /// Why.
        message: String,
        /// What may help.
        hint: &'static str,
    },
    /// A file is not the one that was signed.
    #[error("{name}: its sha256 is {found}, the manifest says {expected}; hint: copy or fetch it again")]
    Hash {
        /// The file's name in the manifest.
        name: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Not enough room.
    #[error(
        "{folder}: {free} free, {needed} needed; hint: free some, or move the state folder with state_dir"
    )]
    Room {
        /// The store.
        folder: PathBuf,
        /// For people.
        needed: String,
        /// For people.
        free: String,
    },
    /// The model file.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The memory.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model was tried and did not do what its manifest promises.
    #[error("the model was tried and is not taken: {message}; the model before goes on")]
    Canary {
        /// What happened.
        message: String,
    },
    /// Another installation runs.
    #[error("another installation is under way; hint: wait until it is done")]
    Busy,
    /// Nothing has this name.
    #[error("`{id}` is not installed; hint: `pipit model list` says what is")]
    NotInstalled {
        /// The name.
        id: String,
    },
    /// There is nothing to go back to.
    #[error("there is no model before this one; hint: `pipit model list` says what is installed")]
    NoPrevious,
}

impl StoreError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    /// Whether a file, a signature or an answer is not what it should be: exit code 3.
    pub fn is_verification(&self) -> bool {
        matches!(
            self,
            Self::Unsigned { .. }
                | Self::NoKeys
                | Self::Signature { .. }
                | Self::Hash { .. }
                | Self::Canary { .. }
                | Self::Model(_)
                | Self::Manifest { .. }
        )
    }
}
