//! The store of installed models: what was fetched, verified and tried, and which of it is served.
//!
//! In: a [`Source`] (a folder, a file or a URL with a signed [`Manifest`]). Out: files named by their sha256, and one
//! small [`Place`] file that says which manifest is served and which one before it. It lies in `models/` of the state
//! folder:
//!
//! ```text
//! files/SHA256.gguf           models and adapters; SHA256.part is one on its way
//! manifests/ID.json           what was installed, with ID.json.minisig
//! place.json                  {"active": ID, "previous": ID, …}: written beside and renamed, so it is never half
//! wanted.json                 an installation that was ordered over MQTT and is not done
//! lock, room                  who changes the store; who needs the memory of the model that is served
//! ```
//!
//! [`install`] goes through the steps in order, and a crash between any two of them changes nothing that is served:
//! the switch is the rename of `place.json`. The daemon looks at that file and changes its worker.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

pub mod canary;
mod error;
pub mod install;
pub mod key;
pub mod manifest;
pub mod pack;
pub mod place;
pub mod served;
pub mod source;

pub use error::StoreError;
pub use key::Keys;
pub use manifest::Manifest;
pub use place::Place;
pub use served::Served;
pub use source::Source;

/// The folder `models/` of a state folder.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
}

/// The right to change the store, until it is dropped or its process ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "closing the file gives the lock back")] File);

impl Store {
    /// The store of a state folder. Nothing is made before something is installed.
    pub fn of(state: &Path) -> Self {
        Self {
            folder: state.join("models"),
        }
    }

    /// Whether anything was ever installed.
    pub fn exists(&self) -> bool {
        self.place_path().exists()
    }

    /// The file with these contents.
    pub fn file(&self, sha256: &str) -> PathBuf {
        self.folder.join("files").join(format!("{sha256}.gguf"))
    }

    pub(super) fn part(&self, sha256: &str) -> PathBuf {
        self.folder.join("files").join(format!("{sha256}.part"))
    }

    fn manifest_path(&self, id: &str) -> PathBuf {
        self.folder.join("manifests").join(format!("{id}.json"))
    }

    pub(super) fn place_path(&self) -> PathBuf {
        self.folder.join("place.json")
    }

    /// Where an order that came over MQTT is kept until it is done.
    pub fn wanted_path(&self) -> PathBuf {
        self.folder.join("wanted.json")
    }

    /// Makes the folders.
    ///
    /// # Errors
    /// I/O errors.
    pub fn make(&self) -> Result<(), StoreError> {
        for folder in [
            self.folder.clone(),
            self.folder.join("files"),
            self.folder.join("manifests"),
        ] {
            fs::create_dir_all(&folder).map_err(|source| StoreError::io(&folder, source))?;
        }
        Ok(())
    }

    /// Waits for the right to change what the store says.
    ///
    /// # Errors
    /// I/O errors.
    pub fn lock(&self) -> Result<Lock, StoreError> {
        self.lock_file("lock", FlockOperation::LockExclusive)
    }

    /// The right to install: one at a time.
    ///
    /// # Errors
    /// [`StoreError::Busy`]
    pub fn lock_installation(&self) -> Result<Lock, StoreError> {
        self.lock_file("installing", FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| match error {
                StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::WouldBlock => {
                    StoreError::Busy
                }
                other => other,
            })
    }

    /// Asks the daemon to unload its model, until the lock is dropped: [`Self::room_is_wanted`].
    ///
    /// # Errors
    /// I/O errors.
    pub fn make_room(&self) -> Result<Lock, StoreError> {
        self.lock_file("room", FlockOperation::LockExclusive)
    }

    /// Whether an installation needs the memory of the model that is served.
    pub fn room_is_wanted(&self) -> bool {
        let Ok(file) = File::open(self.folder.join("room")) else {
            return false;
        };
        flock(&file, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
    }

    fn lock_file(&self, name: &str, operation: FlockOperation) -> Result<Lock, StoreError> {
        let path = self.folder.join(name);
        let io = |source| StoreError::io(&path, source);
        // One that another user made can be locked all the same.
        let file = File::open(&path).or_else(|_| File::create(&path)).map_err(io)?;
        flock(&file, operation).map_err(|error| StoreError::io(&path, error.into()))?;
        Ok(Lock(file))
    }

    /// Reads an installed manifest.
    ///
    /// # Errors
    /// [`StoreError::NotInstalled`], and what is wrong with it.
    pub fn manifest(&self, id: &str) -> Result<Manifest, StoreError> {
        let path = self.manifest_path(id);
        match fs::read(&path) {
            Ok(bytes) => Manifest::parse(&bytes, &path.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(StoreError::NotInstalled { id: id.to_owned() })
            }
            Err(error) => Err(StoreError::io(&path, error)),
        }
    }

    /// Ids of everything that is installed, by name.
    pub fn ids(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.join("manifests"));
        let mut ids: Vec<String> = entries
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                name.strip_suffix(".json").map(ToOwned::to_owned)
            })
            .collect();
        ids.sort();
        ids
    }

    /// Checks signature and sha256 of everything that is installed; returns the ids.
    ///
    /// # Errors
    /// The first thing that is not good.
    pub fn verify(&self, config: &crate::config::Config) -> Result<Vec<String>, StoreError> {
        let ids = self.ids();
        for id in &ids {
            let source = Source::parse(&self.manifest_path(id).display().to_string())?;
            let (manifest, _) = install::verified(&source, config)?;
            for file in manifest.files() {
                source::check_file(&self.file(&file.sha256), &file)?;
            }
        }
        Ok(ids)
    }

    /// Whether an installed model has a signature, which is then a trusted key's.
    ///
    /// # Errors
    /// A signature that is not good, or none where one is wanted.
    pub fn check_signature(&self, id: &str, config: &crate::config::Config) -> Result<bool, StoreError> {
        let source = Source::parse(&self.manifest_path(id).display().to_string())?;
        let (_, signed) = install::verified(&source, config)?;
        Ok(signed.signature.is_some())
    }

    /// What is installed, for people and programs.
    pub fn listing(&self) -> serde_json::Value {
        let place = self.place().unwrap_or_default();
        let models = self.ids().into_iter().filter_map(|id| {
            let manifest = self.manifest(&id).ok()?;
            Some(serde_json::json!({
                "model": id,
                "name": manifest.name,
                "version": manifest.version,
                "license": manifest.license,
                "sha256": manifest.model.sha256,
                "bytes": manifest.files().map(|file| file.bytes).sum::<u64>(),
                "adapters": manifest.adapters.keys().collect::<Vec<_>>(),
                "active": place.active == id,
                "previous": place.previous.as_ref() == Some(&id),
            }))
        });
        serde_json::json!({ "models": models.collect::<Vec<_>>(), "given_up": place.given_up })
    }

    /// Removes what neither the active nor the previous model needs, nor `also`. Best effort: what stays is removed the
    /// next time.
    pub(super) fn clean(&self, place: &Place, also: &[&str]) {
        let mut kept_files = Vec::new();
        for id in self.ids() {
            let needed = place.names(&id) || also.contains(&id.as_str());
            match self.manifest(&id) {
                Ok(manifest) if needed => kept_files.extend(manifest.files().map(|file| file.sha256.clone())),
                // One that is needed and cannot be read is left for someone to look at.
                Err(_) if needed => return,
                _ => {
                    let path = self.manifest_path(&id);
                    let _ = fs::remove_file(path.with_extension("json.minisig"));
                    let _ = fs::remove_file(path);
                }
            }
        }
        for entry in fs::read_dir(self.folder.join("files"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            let stem = path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .unwrap_or_default();
            if !kept_files.iter().any(|kept| kept == stem) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Writes a file beside `path`, waits until it is on the disk, and gives it its name: it is there whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    use std::io::Write as _;
    let beside = path.with_extension("new");
    let written = (|| {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        sync_folder(path)
    })();
    written.map_err(|source| StoreError::io(path, source))
}

/// A rename or a new file is safe when its folder is.
pub(super) fn sync_folder(path: &Path) -> std::io::Result<()> {
    path.parent()
        .map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

#[cfg(test)]
mod tests;
