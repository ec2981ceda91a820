//! An installation: from a source to the model that is served, step by step.
//!
//! ```text
//! manifest → signature → room on the disk → fetch (goes on where it stopped) → sha256 → header and memory plan
//!         → canary → place.json is renamed: the switch → what is not needed any more goes
//! ```
//!
//! Until the last rename nothing that is served has changed, whatever happens.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::statvfs;
use serde::Serialize;

use super::canary::Trial;
use super::manifest::FileEntry;
use super::{Keys, Manifest, Served, Source, Store, StoreError, sync_folder, write_whole};
use crate::config::{Config, ConfigError};
use crate::doctor::storage;
use crate::fault::{self, Point};
use crate::model;
use crate::plan::{available, mebibytes};

/// What stays free on the disk besides the journal.
const MARGIN: u64 = 16 << 20;
/// How long the daemon may take to unload its model.
const ROOM_PATIENCE: Duration = Duration::from_secs(30);
/// Attempts in a row that bring nothing.
const ATTEMPTS: u32 = 5;

/// What an installation needs to know.
#[derive(Debug)]
pub struct World<'a> {
    /// How the model will be served.
    pub config: &'a Config,
    /// The state folder.
    pub state: &'a Path,
    /// This program.
    pub program: PathBuf,
}

/// How far it has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Progress {
    /// A file is fetched.
    Fetch {
        /// Its name.
        file: String,
        /// Bytes that are there.
        bytes: u64,
        /// Bytes of all of it.
        of: u64,
    },
    /// The model that is served is unloaded, because both do not fit into the memory.
    Room,
    /// The model is tried.
    Canary,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Installed {
    /// The model that is served now.
    pub model: String,
    /// The one before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<String>,
    /// Whether it was served already.
    pub unchanged: bool,
}

/// Reads and judges a manifest: signature first.
///
/// # Errors
/// [`StoreError`]
pub fn verified(source: &Source, config: &Config) -> Result<(Manifest, super::source::Signed), StoreError> {
    let keys = Keys::new(&config.install.trusted_keys, config.install.allow_unsigned)
        .map_err(|message| ConfigError::value("install.trusted_keys", message))?;
    let signed = source.manifest()?;
    keys.verify(&signed.bytes, signed.signature.as_deref(), &signed.place)?;
    let manifest = Manifest::parse(&signed.bytes, &signed.place)?;
    Ok((manifest, signed))
}

/// Installs and activates a model.
///
/// # Errors
/// [`StoreError`]; what is served has then not changed.
pub fn install(
    source: &Source,
    world: &World<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Installed, StoreError> {
    let store = Store::of(world.state);
    store.make()?;
    let _one_at_a_time = store.lock_installation()?;
    let (manifest, signed) = verified(source, world.config)?;
    let id = manifest.id(&signed.bytes);
    let place = store.place().unwrap_or_default();
    check_room(&store, &manifest, world.config, || store.clean(&place, &[&id]))?;
    for file in manifest.files() {
        fetch(&store, source, &file, progress)?;
    }
    if place.active == id {
        return Ok(Installed {
            model: id,
            previous: place.previous,
            unchanged: true,
        });
    }
    let path = store.manifest_path(&id);
    if let Some(signature) = &signed.signature {
        write_whole(&path.with_extension("json.minisig"), signature)?;
    }
    write_whole(&path, &signed.bytes)?;
    fault::passed(Point::ModelWritten);
    let result = activate_locked(&store, &id, world, progress);
    let place = store.place().unwrap_or_default();
    // Also when it was not taken: then nothing of it stays.
    store.clean(&place, &[]);
    result
}

/// Tries an installed model and switches to it.
///
/// # Errors
/// [`StoreError`]; what is served has then not changed.
pub fn activate(
    id: &str,
    world: &World<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Installed, StoreError> {
    let store = Store::of(world.state);
    store.manifest(id)?;
    let _one_at_a_time = store.lock_installation()?;
    activate_locked(&store, id, world, progress)
}

/// Goes back to the model before, which has served before and is not tried again. Where another model than `from` is
/// active, that was done already.
///
/// # Errors
/// [`StoreError::NoPrevious`]
pub fn roll_back(store: &Store, from: Option<&str>) -> Result<Installed, StoreError> {
    if !store.exists() {
        return Err(StoreError::NoPrevious);
    }
    let mut unchanged = false;
    let place = store.change(|place| {
        unchanged = from.is_some_and(|from| from != place.active);
        if unchanged { Ok(place) } else { place.rolled_back() }
    })?;
    Ok(Installed {
        model: place.active,
        previous: place.previous,
        unchanged,
    })
}

fn activate_locked(
    store: &Store,
    id: &str,
    world: &World<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Installed, StoreError> {
    let served = Served::installed(store, id)?;
    let (_, plan) = served.plan(world.config)?;
    for adapter in served.adapters.values() {
        model::inspect(adapter)?;
    }
    // Held until the place is changed: the daemon then loads the right one.
    let mut room = None;
    let check = || plan.check(available(Path::new("/"), world.config.model.memory_bytes).as_ref());
    if let Err(error) = check() {
        if !storage::State::of(world.config).in_use() {
            return Err(error.into());
        }
        progress(Progress::Room);
        room = Some(store.make_room()?);
        let since = Instant::now();
        while let Err(error) = check() {
            if since.elapsed() > ROOM_PATIENCE {
                return Err(error.into());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    progress(Progress::Canary);
    let mut settings = served
        .settings(world.config, world.state)
        .map_err(|source| StoreError::io(world.state, source))?;
    // It learns nothing, and leaves nothing.
    settings.prefix_disk = None;
    let trial = Trial {
        program: world.program.clone(),
        settings,
        hang: Duration::from_secs(world.config.model.hang_s),
    };
    let golden = store.manifest(id)?.golden;
    trial
        .run(&golden, &plan)
        .map_err(|message| StoreError::Canary { message })?;
    fault::passed(Point::ModelTried);
    let place = store.change(|place| Ok(place.activated(id)))?;
    fault::passed(Point::ModelSwitched);
    drop(room);
    Ok(Installed {
        model: place.active,
        previous: place.previous,
        unchanged: false,
    })
}

/// Room for what is not there yet, and for a journal that is written anew.
fn check_room(
    store: &Store,
    manifest: &Manifest,
    config: &Config,
    clean: impl FnOnce(),
) -> Result<(), StoreError> {
    let bytes = |path: PathBuf| fs::metadata(path).map_or(0, |meta| meta.len());
    let missing: u64 = manifest
        .files()
        .map(|file| {
            let there = bytes(store.file(&file.sha256)).max(bytes(store.part(&file.sha256)));
            file.bytes.saturating_sub(there)
        })
        .sum();
    let needed = missing
        .saturating_add(MARGIN)
        .saturating_add((config.journal.bytes as u64).saturating_mul(3));
    let free = || {
        let disk = statvfs(&store.folder).map_err(|error| StoreError::io(&store.folder, error.into()))?;
        Ok::<u64, StoreError>(disk.f_bavail.saturating_mul(disk.f_frsize))
    };
    if free()? < needed {
        clean();
    }
    let free = free()?;
    if free < needed {
        return Err(StoreError::Room {
            folder: store.folder.clone(),
            needed: mebibytes(needed),
            free: mebibytes(free),
        });
    }
    Ok(())
}

/// Brings one file into the store, or proves that the one there is the right one.
pub(super) fn fetch(
    store: &Store,
    source: &Source,
    file: &FileEntry,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), StoreError> {
    let (path, part) = (store.file(&file.sha256), store.part(&file.sha256));
    let hash = |path: &Path| model::sha256(path).map_err(|source| StoreError::io(path, source));
    if path.exists() {
        if hash(&path)? == file.sha256 {
            return Ok(());
        }
        fs::remove_file(&path).map_err(|source| StoreError::io(&path, source))?;
    }
    let mut barren = 0;
    loop {
        let before = fs::metadata(&part).map_or(0, |meta| meta.len());
        let copied = copy(source, file, &part, progress);
        let after = fs::metadata(&part).map_or(0, |meta| meta.len());
        match copied {
            Ok(()) => break,
            Err(error) if source.is_remote() && barren < ATTEMPTS => {
                barren = if after > before { 0 } else { barren + 1 };
                tracing::warn!("{error}; going on at byte {after}");
                std::thread::sleep(Duration::from_millis(500) * (1 << barren));
            }
            Err(error) => return Err(error),
        }
    }
    let found = hash(&part)?;
    if found != file.sha256 {
        // What is there is of no use to the next attempt.
        let _ = fs::remove_file(&part);
        return Err(StoreError::Hash {
            name: file.file.clone(),
            expected: file.sha256.clone(),
            found,
        });
    }
    fault::passed(Point::ModelFetched);
    fs::rename(&part, &path)
        .and_then(|()| sync_folder(&path))
        .map_err(|source| StoreError::io(&path, source))?;
    fault::passed(Point::ModelStored);
    Ok(())
}

/// Appends to `part` what is missing. No more than the manifest says is ever written.
fn copy(
    source: &Source,
    file: &FileEntry,
    part: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), StoreError> {
    let io = |source| StoreError::io(part, source);
    let mut out = OpenOptions::new()
        .create(true)
        .append(true)
        .open(part)
        .map_err(io)?;
    let mut there = out.metadata().map_err(io)?.len();
    if there > file.bytes {
        out.set_len(0).map_err(io)?;
        there = 0;
    }
    if there < file.bytes {
        let (begins, mut input) = source.open(file, there)?;
        if begins != there {
            out.set_len(begins).map_err(io)?;
            there = begins;
        }
        let mut buffer = vec![0; 1 << 20];
        while there < file.bytes {
            let most =
                usize::try_from(file.bytes - there).map_or(buffer.len(), |left| left.min(buffer.len()));
            let read = input
                .read(&mut buffer[..most])
                .map_err(|error| StoreError::Source {
                    source_name: file.file.clone(),
                    message: error.to_string(),
                    hint: "try again: it goes on where it stopped",
                })?;
            if read == 0 {
                return Err(StoreError::Source {
                    source_name: file.file.clone(),
                    message: format!("it ends after {there} of {} bytes", file.bytes),
                    hint: "try again: it goes on where it stopped",
                });
            }
            out.write_all(&buffer[..read]).map_err(io)?;
            there += read as u64;
            fault::passed(Point::ModelFetching);
            progress(Progress::Fetch {
                file: file.file.clone(),
                bytes: there,
                of: file.bytes,
            });
        }
    }
    out.sync_all().map_err(io)
}
