//! Where a model comes from: a folder with a manifest, the manifest itself, a bare GGUF file, or a URL.
//!
//! In: what the user wrote. Out: the manifest as it was signed, its signature, and readers of the files beside it that
//! begin where an earlier attempt stopped (HTTP: `Range`, RFC 9110 section 14).

use std::fs::{self, File};
use std::io::{Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ureq::Agent;
use ureq::tls::{RootCerts, TlsConfig};

use super::manifest::{FileEntry, MOST_BYTES};
use super::{Manifest, StoreError};
use crate::model;

/// The manifest's name in a folder and behind a URL that ends in `/`.
pub const MANIFEST: &str = "manifest.json";
/// Largest signature that is read.
const MOST_SIGNATURE: u64 = 4096;
/// One attempt to fetch; the next one goes on where it stopped.
const ATTEMPT: Duration = Duration::from_secs(600);

/// A place that models come from.
#[derive(Debug)]
pub enum Source {
    /// A manifest in a folder.
    Folder {
        /// The manifest.
        manifest: PathBuf,
    },
    /// A GGUF file without a manifest: one is made of it, and it has no signature.
    Bare(PathBuf),
    /// A manifest behind HTTP.
    Url {
        /// Asks.
        agent: Agent,
        /// The manifest.
        manifest: String,
    },
}

/// A manifest as it was read.
#[derive(Debug)]
pub struct Signed {
    /// What was signed.
    pub bytes: Vec<u8>,
    /// The minisign signature, where there is one.
    pub signature: Option<Vec<u8>>,
    /// Where it was read.
    pub place: String,
}

impl Source {
    /// Understands a path or a URL.
    ///
    /// # Errors
    /// [`StoreError::Source`]
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        if text.starts_with("http://") || text.starts_with("https://") {
            return Self::url(text);
        }
        let path = PathBuf::from(text);
        let fail = |message: &str| StoreError::Source {
            source_name: text.to_owned(),
            message: message.to_owned(),
            hint: "a folder with manifest.json, a .gguf file, or http(s)://…/manifest.json",
        };
        if path.is_dir() {
            let manifest = path.join(MANIFEST);
            return match manifest.is_file() {
                true => Ok(Self::Folder { manifest }),
                false => Err(fail("the folder has no manifest.json")),
            };
        }
        if !path.is_file() {
            return Err(fail("there is no such file"));
        }
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => Ok(Self::Folder { manifest: path }),
            Some("gguf") => Ok(Self::Bare(path)),
            _ => Err(fail("it is no model and no manifest")),
        }
    }

    /// A URL of a manifest, or of the folder that it lies in.
    ///
    /// # Errors
    /// [`StoreError::Source`]
    pub fn url(text: &str) -> Result<Self, StoreError> {
        let whole = match text.ends_with('/') {
            true => format!("{text}{MANIFEST}"),
            false => text.to_owned(),
        };
        let is_url = ["http://", "https://"]
            .iter()
            .any(|scheme| whole.strip_prefix(scheme).is_some_and(|rest| rest.contains('/')));
        if !is_url || !whole.ends_with(".json") || whole.contains(['?', '#']) || has_login(&whole) {
            return Err(StoreError::Source {
                source_name: text.to_owned(),
                message: "it is no address of a manifest".to_owned(),
                hint: "http(s)://HOST/…/manifest.json, without login and query",
            });
        }
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let agent = Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_recv_body(Some(ATTEMPT))
            .http_status_as_error(false)
            .max_redirects(5)
            .tls_config(tls)
            .build()
            .new_agent();
        Ok(Self::Url {
            agent,
            manifest: whole,
        })
    }

    /// Reads the manifest and its signature.
    ///
    /// # Errors
    /// [`StoreError::Source`]
    pub fn manifest(&self) -> Result<Signed, StoreError> {
        match self {
            Self::Folder { manifest } => {
                let signature = with_suffix(manifest, ".minisig");
                Ok(Signed {
                    bytes: read_file(manifest, MOST_BYTES as u64 + 1)?,
                    signature: match signature.exists() {
                        true => Some(read_file(&signature, MOST_SIGNATURE)?),
                        false => None,
                    },
                    place: manifest.display().to_string(),
                })
            }
            Self::Bare(path) => Ok(Signed {
                bytes: serde_json::to_vec(&bare(path)?).unwrap_or_default(),
                signature: None,
                place: path.display().to_string(),
            }),
            Self::Url { agent, manifest } => {
                let get = |url: &str, most: u64| -> Result<Option<Vec<u8>>, StoreError> {
                    let mut response = agent.get(url).call().map_err(|error| unreachable(url, &error))?;
                    match response.status().as_u16() {
                        200 => {}
                        404 | 410 => return Ok(None),
                        status => return Err(refused(url, status)),
                    }
                    let read = response.body_mut().with_config().limit(most).read_to_vec();
                    read.map(Some).map_err(|error| unreachable(url, &error))
                };
                let bytes = get(manifest, MOST_BYTES as u64 + 1)?.ok_or_else(|| refused(manifest, 404))?;
                Ok(Signed {
                    bytes,
                    signature: get(&format!("{manifest}.minisig"), MOST_SIGNATURE)?,
                    place: manifest.clone(),
                })
            }
        }
    }

    /// Opens a file of the manifest at byte `from`, or at 0 where the source cannot go on there; returns which.
    ///
    /// # Errors
    /// [`StoreError::Source`]
    pub fn open(&self, file: &FileEntry, from: u64) -> Result<(u64, Box<dyn Read>), StoreError> {
        match self {
            Self::Folder { manifest } => open_file(&manifest.with_file_name(&file.file), from),
            Self::Bare(path) => open_file(path, from),
            Self::Url { agent, manifest } => {
                let folder = manifest.rsplit_once('/').map_or("", |(folder, _)| folder);
                let url = format!("{folder}/{}", file.file);
                let mut request = agent.get(&url);
                if from > 0 {
                    request = request.header("Range", format!("bytes={from}-"));
                }
                let response = request.call().map_err(|error| unreachable(&url, &error))?;
                let begins = match response.status().as_u16() {
                    200 => 0,
                    206 if content_begins(&response) == Some(from) => from,
                    // What was there is as long as the file, or longer: from the beginning, and the hash decides.
                    416 if from > 0 => return self.open(file, 0),
                    status => return Err(refused(&url, status)),
                };
                Ok((begins, Box::new(response.into_body().into_reader())))
            }
        }
    }

    /// Reads a whole file and compares its hash.
    ///
    /// # Errors
    /// [`StoreError::Hash`], [`StoreError::Source`]
    pub fn check(&self, file: &FileEntry) -> Result<(), StoreError> {
        let (_, input) = self.open(file, 0)?;
        check(input, file)
    }

    /// Whether a failed read may go better the next time.
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Url { .. })
    }
}

fn has_login(url: &str) -> bool {
    let host = url.split("://").nth(1).and_then(|rest| rest.split('/').next());
    host.is_some_and(|host| host.contains('@'))
}

/// The first byte of a `Content-Range: bytes 5-9/10`.
fn content_begins<B>(response: &ureq::http::Response<B>) -> Option<u64> {
    let range = response.headers().get("content-range")?.to_str().ok()?;
    range
        .strip_prefix("bytes ")?
        .split('-')
        .next()?
        .trim()
        .parse()
        .ok()
}

fn unreachable(url: &str, error: &ureq::Error) -> StoreError {
    StoreError::Source {
        source_name: url.to_owned(),
        message: error.to_string(),
        hint: "is the server there, and does this device trust its certificate?",
    }
}

fn refused(url: &str, status: u16) -> StoreError {
    StoreError::Source {
        source_name: url.to_owned(),
        message: format!("the server answers {status}"),
        hint: "the files of a model lie beside its manifest.json",
    }
}

fn read_file(path: &Path, most: u64) -> Result<Vec<u8>, StoreError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes));
    read.map_err(|source| StoreError::io(path, source))?;
    Ok(bytes)
}

fn open_file(path: &Path, from: u64) -> Result<(u64, Box<dyn Read>), StoreError> {
    let open = || -> std::io::Result<File> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(from))?;
        Ok(file)
    };
    let file = open().map_err(|source| StoreError::io(path, source))?;
    Ok((from, Box::new(file)))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The manifest of a file that has none.
fn bare(path: &Path) -> Result<Manifest, StoreError> {
    model::inspect(path)?;
    let entry = entry(path)?;
    let stem = entry.file.trim_end_matches(".gguf");
    let name: String = stem
        .chars()
        .map(
            |letter| match letter.is_ascii_alphanumeric() || "_.-".contains(letter) {
                true => letter,
                false => '-',
            },
        )
        .take(40)
        .collect();
    Ok(Manifest::new(&name, "unversioned", entry))
}

/// Compares the hash of a file.
pub(super) fn check_file(path: &Path, file: &FileEntry) -> Result<(), StoreError> {
    let (_, input) = open_file(path, 0)?;
    check(input, file)
}

fn check(input: impl Read, file: &FileEntry) -> Result<(), StoreError> {
    // One byte more than there may be is enough to see that it is another file.
    let found = model::sha256_of(input.take(file.bytes.saturating_add(1)));
    let found = found.map_err(|error| StoreError::Source {
        source_name: file.file.clone(),
        message: error.to_string(),
        hint: "try again",
    })?;
    match found == file.sha256 {
        true => Ok(()),
        false => Err(StoreError::Hash {
            name: file.file.clone(),
            expected: file.sha256.clone(),
            found,
        }),
    }
}

/// A file as a manifest has it.
///
/// # Errors
/// I/O errors.
pub fn entry(path: &Path) -> Result<FileEntry, StoreError> {
    let io = |source| StoreError::io(path, source);
    let name = path.file_name().and_then(|name| name.to_str());
    Ok(FileEntry {
        file: name.unwrap_or("model.gguf").to_owned(),
        sha256: model::sha256(path).map_err(io)?,
        bytes: fs::metadata(path).map_err(io)?.len(),
    })
}
