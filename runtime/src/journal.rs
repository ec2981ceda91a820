//! The journal: an append-only file that says which requests were accepted, answered and delivered.
//!
//! In: [`Record`]s. Out: the same records at the next start, and a promise: what [`Journal::sync`] has returned
//! for is on the disk. The file is `PIPITJ1\n` and then records, each a little-endian u32 length, the CRC-32 of
//! the payload, and the payload (JSON). A last record that was cut by a crash is dropped at the next start; so
//! is everything after the first damaged record, because nothing after it can be trusted to be aligned.
//!
//! [`table`] is what the records add up to, [`writer`] is the thread that owns the file while the daemon runs.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::wire::{ErrorCode, Reply, Request};

pub mod table;
pub mod writer;

const MAGIC: &[u8; 8] = b"PIPITJ1\n";
const HEADER_BYTES: usize = 8;
/// A length beyond this is damage, not a record.
const MOST_RECORD_BYTES: usize = 16 * 1024 * 1024;

/// (reply topic, id): see [`Request::key`].
pub type Key = (String, String);

/// An answer as it is kept: everything that is needed to publish it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredAnswer {
    /// Where it goes.
    pub reply: Reply,
    /// The payload.
    pub body: String,
    /// Whether `body` is JSON.
    pub json: bool,
    /// Set when the answer is an error.
    pub error: Option<ErrorCode>,
    /// [`Request::fingerprint`]
    pub fingerprint: Option<String>,
}

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// A request was taken: it will be answered.
    Accepted {
        /// Unix time, milliseconds.
        at: u64,
        /// The request.
        request: Box<Request>,
    },
    /// It was answered.
    Done {
        /// Unix time, milliseconds.
        at: u64,
        /// The request's key.
        key: Key,
        /// The answer.
        answer: Box<StoredAnswer>,
    },
    /// The broker has taken the answer.
    Delivered {
        /// The request's key.
        key: Key,
    },
    /// Nothing about it is to be kept.
    Erased {
        /// The request's key.
        key: Key,
    },
}

/// What can go wrong with the journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system said no.
    #[error("journal {path}: {action}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is something else.
    #[error(
        "journal {path} is not a journal of this version; hint: move it away, or name another --state-dir"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A record does not fit.
    #[error("journal {path}: a record of {bytes} bytes is too large")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: usize,
    },
}

/// The open file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Length of the part that is known to be whole.
    bytes: u64,
    /// Length of the part that is known to be on the disk.
    synced: u64,
}

/// What was read at the start.
#[derive(Debug)]
pub struct Replayed {
    /// Every whole record, in order.
    pub records: Vec<Record>,
    /// Bytes that were cut off the end.
    pub dropped_bytes: u64,
}

impl Journal {
    /// Opens or makes the journal and reads it.
    ///
    /// # Errors
    /// I/O errors, and a file that is not a journal.
    pub fn open(path: &Path) -> Result<(Self, Replayed), JournalError> {
        let fail = |action| {
            move |source| JournalError::Io {
                path: path.to_owned(),
                action,
                source,
            }
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(fail("open"))?;
        let mut content = Vec::new();
        file.read_to_end(&mut content).map_err(fail("read"))?;
        let total = content.len() as u64;
        let (records, good) = match content.strip_prefix(MAGIC) {
            Some(body) => {
                let (records, good) = read_records(body);
                (records, (MAGIC.len() + good) as u64)
            }
            // A crash while the file was made.
            None if MAGIC.starts_with(&content) => {
                file.set_len(0).map_err(fail("truncate"))?;
                file.rewind().map_err(fail("seek"))?;
                file.write_all(MAGIC).map_err(fail("write"))?;
                file.sync_all().map_err(fail("sync"))?;
                sync_folder(path).map_err(fail("sync folder of"))?;
                let journal = Self {
                    path: path.to_owned(),
                    file,
                    bytes: MAGIC.len() as u64,
                    synced: MAGIC.len() as u64,
                };
                return Ok((
                    journal,
                    Replayed {
                        records: Vec::new(),
                        dropped_bytes: 0,
                    },
                ));
            }
            None => {
                return Err(JournalError::Foreign {
                    path: path.to_owned(),
                });
            }
        };
        if good < total {
            file.set_len(good).map_err(fail("truncate"))?;
            file.sync_all().map_err(fail("sync"))?;
        }
        file.seek(SeekFrom::Start(good)).map_err(fail("seek"))?;
        let journal = Self {
            path: path.to_owned(),
            file,
            bytes: good,
            synced: good,
        };
        Ok((
            journal,
            Replayed {
                records,
                dropped_bytes: total - good,
            },
        ))
    }

    /// Writes records at the end. They are safe after [`Self::sync`].
    ///
    /// # Errors
    /// I/O errors, a full disk among them. The file is cut back to where it was: the records are either all
    /// there or not at all.
    pub fn append(&mut self, records: &[Record]) -> Result<(), JournalError> {
        let mut out = Vec::new();
        for record in records {
            self.encode(record, &mut out)?;
        }
        if let Err(source) = self.file.write_all(&out) {
            self.cut(self.bytes);
            return Err(JournalError::Io {
                path: self.path.clone(),
                action: "write",
                source,
            });
        }
        self.bytes += out.len() as u64;
        Ok(())
    }

    /// Waits until everything appended is on the disk.
    ///
    /// # Errors
    /// I/O errors. The file is cut back to what the last sync that went well has made safe: a request that its client
    /// was told of as refused must not be found, and run, at the next start.
    pub fn sync(&mut self) -> Result<(), JournalError> {
        if let Err(source) = self.file.sync_data() {
            self.cut(self.synced);
            return Err(JournalError::Io {
                path: self.path.clone(),
                action: "sync",
                source,
            });
        }
        self.synced = self.bytes;
        Ok(())
    }

    /// Best effort: a torn tail that cannot be cut now is cut at the next start.
    fn cut(&mut self, bytes: u64) {
        let _ = self.file.set_len(bytes);
        let _ = self.file.seek(SeekFrom::Start(bytes));
        self.bytes = bytes;
    }

    /// Replaces the file by one that holds only `records`: a new file beside it, synced, then renamed.
    ///
    /// # Errors
    /// I/O errors; the old file is then still in use and whole.
    pub fn compact(&mut self, records: &[Record]) -> Result<(), JournalError> {
        let path = self.path.clone();
        let beside = self.path.with_extension("new");
        let fail = |action| {
            let path = path.clone();
            move |source| JournalError::Io { path, action, source }
        };
        let mut out = MAGIC.to_vec();
        for record in records {
            self.encode(record, &mut out)?;
        }
        let written = (|| {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&beside)?;
            file.write_all(&out)?;
            file.sync_all()?;
            std::fs::rename(&beside, &self.path)?;
            sync_folder(&self.path)?;
            Ok(file)
        })();
        match written {
            Ok(file) => {
                self.file = file;
                self.bytes = out.len() as u64;
                self.synced = self.bytes;
                Ok(())
            }
            Err(source) => {
                let _ = std::fs::remove_file(&beside);
                Err(fail("compact")(source))
            }
        }
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn encode(&self, record: &Record, out: &mut Vec<u8>) -> Result<(), JournalError> {
        let payload = serde_json::to_vec(record).map_err(|source| JournalError::Io {
            path: self.path.clone(),
            action: "encode",
            source: source.into(),
        })?;
        if payload.len() > MOST_RECORD_BYTES {
            return Err(JournalError::TooLarge {
                path: self.path.clone(),
                bytes: payload.len(),
            });
        }
        out.extend((payload.len() as u32).to_le_bytes());
        out.extend(crc32fast::hash(&payload).to_le_bytes());
        out.extend(payload);
        Ok(())
    }
}

/// Reads whole records from the beginning; returns them and how many bytes they take.
fn read_records(body: &[u8]) -> (Vec<Record>, usize) {
    let (mut records, mut at) = (Vec::new(), 0);
    while let Some((record, next)) = read_record(body, at) {
        records.push(record);
        at = next;
    }
    (records, at)
}

fn read_record(body: &[u8], at: usize) -> Option<(Record, usize)> {
    let header = body.get(at..at + HEADER_BYTES)?;
    let length = u32::from_le_bytes(header[..4].try_into().ok()?) as usize;
    let crc = u32::from_le_bytes(header[4..].try_into().ok()?);
    if length > MOST_RECORD_BYTES {
        return None;
    }
    let payload = body.get(at + HEADER_BYTES..at + HEADER_BYTES + length)?;
    if crc32fast::hash(payload) != crc {
        return None;
    }
    Some((serde_json::from_slice(payload).ok()?, at + HEADER_BYTES + length))
}

/// A rename or a new file is safe when its folder is.
fn sync_folder(path: &Path) -> std::io::Result<()> {
    match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
