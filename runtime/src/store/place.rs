//! The place file: which installed model is served, which one before it, and how the active one fares.
//!
//! It is written beside and renamed. A file that is not understood (a disk that lies about what it has written) is
//! replaced by the newest manifest whose files are all there.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use serde::{Deserialize, Serialize};

use super::{Store, StoreError, write_whole};
use crate::model;

/// Starts of a worker in a row without a sign that it is good, after which the model before it is served again. More
/// than a single request can cost, because a request that ends the worker three times is given up.
pub const MOST_STARTS: u32 = 5;

/// What is served.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The model that is served.
    pub active: String,
    /// The one that was served before it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub previous: Option<String>,
    /// Whether the active one has answered, or lived for a while, since it was activated.
    #[serde(default)]
    pub proven: bool,
    /// Starts of its worker before it was.
    #[serde(default)]
    pub starts: u32,
    /// A model that was given up by itself, and why.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub given_up: Option<GivenUp>,
}

/// A model that was rolled back by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUp {
    /// Its id.
    pub id: String,
    /// Why.
    pub why: String,
}

impl Place {
    /// Whether an id is the active or the previous one.
    pub fn names(&self, id: &str) -> bool {
        self.active == id || self.previous.as_deref() == Some(id)
    }

    /// With another model active; the one before is kept.
    pub fn activated(&self, id: &str) -> Self {
        let previous = match self.active == id || self.active.is_empty() {
            true => self.previous.clone(),
            false => Some(self.active.clone()),
        };
        Self {
            active: id.to_owned(),
            previous: previous.filter(|previous| previous != id),
            ..Self::default()
        }
    }

    /// Back to the model before.
    ///
    /// # Errors
    /// [`StoreError::NoPrevious`]
    pub fn rolled_back(&self) -> Result<Self, StoreError> {
        let previous = self.previous.clone().ok_or(StoreError::NoPrevious)?;
        Ok(self.activated(&previous))
    }
}

/// What tells one content of the place file from another without reading it.
pub type Stamp = Option<(u64, i64, i64)>;

impl Store {
    /// Reads the place file; `None` when nothing was ever installed.
    pub fn place(&self) -> Option<Place> {
        let bytes = fs::read(self.place_path()).ok()?;
        match serde_json::from_slice(&bytes) {
            Ok(place) => Some(place),
            Err(error) => {
                let found = self.newest_whole();
                tracing::error!(
                    "{} is not understood ({error}): {}",
                    self.place_path().display(),
                    found.as_deref().unwrap_or("nothing else is installed")
                );
                let place = Place {
                    active: found?,
                    ..Place::default()
                };
                // Best effort: the next look finds the same.
                let _ = write_whole(
                    &self.place_path(),
                    &serde_json::to_vec(&place).unwrap_or_default(),
                );
                Some(place)
            }
        }
    }

    /// Changes with every change of the place file.
    pub fn stamp(&self) -> Stamp {
        let meta = fs::metadata(self.place_path()).ok()?;
        Some((meta.ino(), meta.mtime(), meta.mtime_nsec()))
    }

    /// Changes the place under the lock; `change` gets what it is now.
    ///
    /// # Errors
    /// Those of `change`, and I/O errors.
    pub fn change(
        &self,
        change: impl FnOnce(Place) -> Result<Place, StoreError>,
    ) -> Result<Place, StoreError> {
        let _lock = self.lock()?;
        let place = change(self.place().unwrap_or_default())?;
        let bytes = serde_json::to_vec_pretty(&place).unwrap_or_default();
        write_whole(&self.place_path(), &bytes)?;
        Ok(place)
    }

    /// The manifest that was written last and whose files are all what it says.
    fn newest_whole(&self) -> Option<String> {
        let whole = |id: &String| {
            self.manifest(id).is_ok_and(|manifest| {
                manifest.files().all(|file| {
                    model::sha256(&self.file(&file.sha256)).is_ok_and(|found| found == file.sha256)
                })
            })
        };
        let written = |id: &String| {
            fs::metadata(self.manifest_path(id))
                .and_then(|meta| meta.modified())
                .ok()
        };
        self.ids().into_iter().filter(whole).max_by_key(written)
    }
}
