//! Prefixes on the disk: the KV of long beginnings that were asked for more than once, for the time after a restart.
//!
//! A file is `PIPITKV1`, the length of a JSON header (u32), the header, the tokens (i32), llama.cpp's state of the
//! sequence, and the CRC-32 of all that; numbers are little-endian. The header names everything that the state depends
//! on: the model's SHA-256, the adapter, the types of the KV cache, the build of llama.cpp. A file of another model, of
//! another build, a cut or damaged one is ignored: the beginning is computed again. llama.cpp's own reader aborts on some
//! damage, so nothing reaches it that fails the checksum.
//!
//! A file holds what people wrote, as the journal does, and lies in the same folder that nobody else may read. It is
//! written once, not on every use: flash wears.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use llama_cpp_2::token::LlamaToken;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::engine::Settings;
use crate::engine::context::State;
use crate::wire::request::hex;

const MAGIC: &[u8; 8] = b"PIPITKV1";
/// The state's layout is llama.cpp's own: another build may have another.
const BUILD: &str = "llama-cpp-sys-2 0.1.161";
/// Beginnings that are watched at a time, whether they are shared again.
const WATCHED: usize = 256;
const MOST_HEADER: usize = 64 * 1024;
const MOST_TOKENS: usize = 1 << 20;

/// Where the files are, and how much.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The folder; made when it is not there.
    pub folder: PathBuf,
    /// Most bytes of all files.
    pub bytes: u64,
    /// Shortest beginning, in tokens.
    pub tokens: u32,
}

/// Why a file is of no use.
#[derive(Debug, thiserror::Error)]
#[error("prefix {path}: {what}")]
pub struct DiskError {
    path: PathBuf,
    what: String,
}

/// What the state in a file depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    model: String,
    adapter: Option<String>,
    cache_types: (String, String),
    build: String,
    tokens: usize,
    state_bytes: usize,
}

#[derive(Clone, Debug)]
struct Known {
    path: PathBuf,
    adapter: Option<String>,
    tokens: Vec<LlamaToken>,
    bytes: u64,
    written: SystemTime,
}

/// A file that holds a beginning of a prompt.
#[derive(Debug)]
pub struct Found {
    path: PathBuf,
    /// Its length.
    pub tokens: usize,
}

/// The files of one model.
#[derive(Debug)]
pub struct Disk {
    place: Place,
    model: String,
    cache_types: (String, String),
    /// Size and date of each adapter's file stand for its content.
    adapters: HashMap<String, String>,
    known: Vec<Known>,
    /// Files of other models and builds: they only take room.
    foreign: Vec<(PathBuf, u64, SystemTime)>,
    /// The job that shared a beginning first.
    watched: HashMap<[u8; 32], u64>,
}

impl Disk {
    /// Looks what is there for the model with this SHA-256.
    pub fn open(place: &Place, model: &str, settings: &Settings) -> Self {
        let adapters = settings.adapters.iter().map(|(name, path)| {
            let date = |meta: &std::fs::Metadata| {
                let since = meta
                    .modified()
                    .ok()?
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .ok()?;
                Some(since.as_nanos())
            };
            let meta = std::fs::metadata(path).ok();
            let identity = meta.map(|meta| format!("{name} {} {:?}", meta.len(), date(&meta)));
            (name.clone(), identity.unwrap_or_else(|| name.clone()))
        });
        let mut disk = Self {
            place: place.clone(),
            model: model.to_owned(),
            cache_types: (settings.cache_type_k.clone(), settings.cache_type_v.clone()),
            adapters: adapters.collect(),
            known: Vec::new(),
            foreign: Vec::new(),
            watched: HashMap::new(),
        };
        if let Err(error) = std::fs::create_dir_all(&place.folder) {
            tracing::warn!("prefix {}: {error}", place.folder.display());
        }
        for file in std::fs::read_dir(&place.folder).into_iter().flatten().flatten() {
            disk.look(&file.path());
        }
        if !disk.known.is_empty() {
            tracing::info!("{} beginnings of prompts are kept on the disk", disk.known.len());
        }
        disk
    }

    fn look(&mut self, path: &Path) {
        if path.extension().is_some_and(|extension| extension == "new") {
            // Left by a crash.
            let _ = std::fs::remove_file(path);
            return;
        }
        let Ok(meta) = std::fs::metadata(path) else { return };
        let written = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        match read_header(path) {
            Ok((header, tokens)) if self.fits(&header) => self.known.push(Known {
                path: path.to_owned(),
                adapter: header.adapter,
                tokens,
                bytes: meta.len(),
                written,
            }),
            Ok(_) => self.foreign.push((path.to_owned(), meta.len(), written)),
            Err(error) => {
                tracing::debug!("{error}");
                if path.extension().is_some_and(|extension| extension == "kv") {
                    self.foreign.push((path.to_owned(), meta.len(), written));
                }
            }
        }
    }

    fn fits(&self, header: &Header) -> bool {
        header.model == self.model && header.cache_types == self.cache_types && header.build == BUILD
    }

    fn identity(&self, adapter: Option<&str>) -> Option<String> {
        adapter.map(|name| {
            self.adapters
                .get(name)
                .cloned()
                .unwrap_or_else(|| name.to_owned())
        })
    }

    /// The longest kept beginning of `tokens`.
    pub fn find(&self, adapter: Option<&str>, tokens: &[LlamaToken]) -> Option<Found> {
        let adapter = self.identity(adapter);
        self.known
            .iter()
            .filter(|known| known.adapter == adapter && tokens.starts_with(&known.tokens))
            .max_by_key(|known| known.tokens.len())
            .map(|known| Found {
                path: known.path.clone(),
                tokens: known.tokens.len(),
            })
    }

    /// Reads a file's state.
    ///
    /// # Errors
    /// A damaged file; it is removed.
    pub fn load(&mut self, found: &Found) -> Result<State, DiskError> {
        let outcome = read_state(&found.path);
        if outcome.is_err() {
            self.known.retain(|known| known.path != found.path);
            let _ = std::fs::remove_file(&found.path);
        }
        // The checksum says that these are the bytes that `store` wrote, and the header (checked by `open`) that the same
        // build of llama.cpp made them from the same model with the same cache types.
        outcome.map(State::trusted)
    }

    /// Most bytes of all files.
    pub fn most_bytes(&self) -> u64 {
        self.place.bytes
    }

    /// Whether this beginning, which the prompt of `job` shares with an earlier one, is to be written now: it is long
    /// enough, not there yet, and `certain` to be of use again or shared for the second time. (A conversation shares its
    /// whole past with itself, once.)
    pub fn wants(&mut self, job: u64, adapter: Option<&str>, tokens: &[LlamaToken], certain: bool) -> bool {
        if tokens.len() < self.place.tokens as usize || self.place.bytes == 0 {
            return false;
        }
        let identity = self.identity(adapter);
        let there = self
            .known
            .iter()
            .any(|known| known.adapter == identity && known.tokens.starts_with(tokens));
        if there || certain {
            return !there;
        }
        if self.watched.len() >= WATCHED {
            self.watched.clear();
        }
        let first = *self.watched.entry(digest(&identity, tokens)).or_insert(job);
        first != job
    }

    /// Writes the state of a sequence of just these tokens, on a thread of its own; the oldest files make room.
    pub fn store(&mut self, state: State, adapter: Option<&str>, tokens: &[LlamaToken]) {
        let adapter = self.identity(adapter);
        let state_bytes = state.bytes().len();
        let header = Header {
            model: self.model.clone(),
            adapter: adapter.clone(),
            cache_types: self.cache_types.clone(),
            build: BUILD.to_owned(),
            tokens: tokens.len(),
            state_bytes,
        };
        let bytes = (state_bytes + tokens.len() * 4) as u64;
        if !self.make_room(bytes) {
            return;
        }
        let name = hex(&digest(&Some(format!("{} {adapter:?}", self.model)), tokens)[..16]);
        let path = self.place.folder.join(format!("{name}.kv"));
        self.known.push(Known {
            path: path.clone(),
            adapter,
            tokens: tokens.to_vec(),
            bytes,
            written: SystemTime::now(),
        });
        let tokens = tokens.to_vec();
        let write = move || {
            if let Err(error) = write(&path, &header, &tokens, state.bytes()) {
                tracing::warn!("prefix {}: {error}", path.display());
            }
        };
        if let Err(error) = std::thread::Builder::new().name("prefix".to_owned()).spawn(write) {
            tracing::warn!("prefix: {error}");
        }
    }

    fn make_room(&mut self, bytes: u64) -> bool {
        if bytes > self.place.bytes {
            return false;
        }
        let mut files: Vec<(SystemTime, PathBuf, u64)> = self
            .known
            .iter()
            .map(|known| (known.written, known.path.clone(), known.bytes))
            .chain(
                self.foreign
                    .iter()
                    .map(|(path, bytes, written)| (*written, path.clone(), *bytes)),
            )
            .collect();
        files.sort();
        let mut total: u64 = files.iter().map(|(_, _, bytes)| bytes).sum();
        for (_, path, size) in files {
            if total + bytes <= self.place.bytes {
                break;
            }
            total -= size;
            let _ = std::fs::remove_file(&path);
            self.known.retain(|known| known.path != path);
            self.foreign.retain(|(known, ..)| *known != path);
        }
        true
    }
}

/// What of a prompt is worth a file: its system messages where the shared part has all of them, else the shared part
/// without the few tokens in which two questions happen to begin alike.
pub fn worth_keeping(beginning: usize, shared: usize) -> usize {
    if beginning > 0 && shared >= beginning {
        beginning
    } else {
        shared / 32 * 32
    }
}

fn digest(adapter: &Option<String>, tokens: &[LlamaToken]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(adapter.as_deref().unwrap_or_default());
    hash.update([0]);
    for token in tokens {
        hash.update(token.0.to_le_bytes());
    }
    hash.finalize().into()
}

fn write(path: &Path, header: &Header, tokens: &[LlamaToken], state: &[u8]) -> std::io::Result<()> {
    let beside = path.with_extension("new");
    let header = serde_json::to_vec(header)?;
    let mut head = MAGIC.to_vec();
    head.extend((header.len() as u32).to_le_bytes());
    head.extend(header);
    for token in tokens {
        head.extend(token.0.to_le_bytes());
    }
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head);
    crc.update(state);
    let mut file = File::create(&beside)?;
    file.write_all(&head)?;
    file.write_all(state)?;
    file.write_all(&crc.finalize().to_le_bytes())?;
    file.sync_all()?;
    std::fs::rename(&beside, path)
}

/// The header and the tokens, without the state.
fn read_header(path: &Path) -> Result<(Header, Vec<LlamaToken>), DiskError> {
    let fail = |what: &str| DiskError {
        path: path.to_owned(),
        what: what.to_owned(),
    };
    let mut file = File::open(path).map_err(|error| fail(&error.to_string()))?;
    let mut start = [0; 12];
    file.read_exact(&mut start).map_err(|_| fail("it is cut short"))?;
    let (magic, length) = start.split_at(8);
    let length = length
        .try_into()
        .map_or(usize::MAX, |bytes| u32::from_le_bytes(bytes) as usize);
    if magic != MAGIC || length > MOST_HEADER {
        return Err(fail("it is something else"));
    }
    let mut header = vec![0; length];
    file.read_exact(&mut header)
        .map_err(|_| fail("it is cut short"))?;
    let header: Header = serde_json::from_slice(&header).map_err(|_| fail("its header is damaged"))?;
    if header.tokens > MOST_TOKENS {
        return Err(fail("its header is damaged"));
    }
    let mut tokens = vec![0; header.tokens * 4];
    file.read_exact(&mut tokens)
        .map_err(|_| fail("it is cut short"))?;
    let tokens = tokens
        .chunks_exact(4)
        .map(|bytes| LlamaToken(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])))
        .collect();
    Ok((header, tokens))
}

/// The state, when the checksum of the whole file is right.
fn read_state(path: &Path) -> Result<Vec<u8>, DiskError> {
    let fail = |what: &str| DiskError {
        path: path.to_owned(),
        what: what.to_owned(),
    };
    let (header, _) = read_header(path)?;
    let mut content = std::fs::read(path).map_err(|error| fail(&error.to_string()))?;
    let end = content
        .len()
        .checked_sub(4)
        .ok_or_else(|| fail("it is cut short"))?;
    let crc = content[end..].try_into().map_or(0, u32::from_le_bytes);
    if crc32fast::hash(&content[..end]) != crc {
        return Err(fail("its checksum is wrong"));
    }
    content.truncate(end);
    let begin = end
        .checked_sub(header.state_bytes)
        .ok_or_else(|| fail("it is cut short"))?;
    content.drain(..begin);
    Ok(content)
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
