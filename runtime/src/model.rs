//! The model file: what can be said about a GGUF before llama.cpp sees it.
//!
//! In: a path. Out: its [`Header`] (name, architecture, tensors, what the layers remember), its SHA-256, and a clear
//! error for a file that is missing, cut short or something else. llama.cpp answers those with a null pointer. Source: the
//! GGUF specification, ggml docs/gguf.md.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::wire::request::hex;

mod ggml;
mod header;
mod layers;
mod reader;

pub use ggml::GgmlType;
pub use header::{Header, Tensor};
pub use layers::{Layer, Layers};
use reader::{Damage, Reader};

/// What is wrong with a model file.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// It cannot be read.
    #[error("model {path}: {source}; hint: --model names a .gguf file")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It is something else.
    #[error("model {path} is not a GGUF file; hint: `pipit-convert model` makes one from a checkpoint")]
    NotGguf {
        /// The file.
        path: PathBuf,
    },
    /// It is a GGUF that this version does not read.
    #[error("model {path} is GGUF version {version}; versions 2 and 3 are read; hint: convert it again")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// It ends too early.
    #[error(
        "model {path} is cut short: it has {bytes} bytes and needs at least {needs}; hint: copy it again"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The least it needs.
        needs: u64,
    },
    /// Its header makes no sense.
    #[error("model {path}: its header is damaged: {what}; hint: copy it again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        what: String,
    },
}

/// Reads the header and checks that every tensor lies inside the file.
///
/// # Errors
/// [`ModelError`]
pub fn inspect(path: &Path) -> Result<Header, ModelError> {
    let io = |source| ModelError::Io {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if !meta.is_file() {
        return Err(io(std::io::Error::other("is not a file")));
    }
    let bytes = meta.len();
    let mut reader = Reader::new(BufReader::new(file));
    if !matches!(reader.array(), Ok([b'G', b'G', b'U', b'F'])) {
        return Err(ModelError::NotGguf {
            path: path.to_owned(),
        });
    }
    let version = reader.u32().map_err(|_| ModelError::NotGguf {
        path: path.to_owned(),
    })?;
    if !(2..=3).contains(&version) {
        return Err(ModelError::Version {
            path: path.to_owned(),
            version,
        });
    }
    let (mut header, needs) = header::read(&mut reader).map_err(|what| match what {
        Damage::End => ModelError::Truncated {
            path: path.to_owned(),
            bytes,
            needs: bytes + 1,
        },
        Damage::What(what) => ModelError::Damaged {
            path: path.to_owned(),
            what,
        },
    })?;
    if bytes < needs {
        return Err(ModelError::Truncated {
            path: path.to_owned(),
            bytes,
            needs,
        });
    }
    header.bytes = bytes;
    Ok(header)
}

/// SHA-256 of a file, in hexadecimal digits.
///
/// # Errors
/// I/O errors.
pub fn sha256(path: &Path) -> std::io::Result<String> {
    sha256_of(File::open(path)?)
}

/// SHA-256 of what a reader gives.
///
/// # Errors
/// I/O errors.
pub fn sha256_of(mut file: impl Read) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
