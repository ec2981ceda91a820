//! The model file: what can be said about a GGUF before llama.cpp sees it.
//!
//! In: a path. Out: name, architecture and quantisation from its header, its SHA-256, and a clear error for a
//! file that is missing, cut short or something else. llama.cpp answers those with a null pointer. Source: the
//! GGUF specification, ggml docs/gguf.md.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::wire::request::hex;

/// Caps on a header: real ones have some dozens of keys and some thousands of tensors.
const MOST_ENTRIES: u64 = 1 << 20;
const MOST_STRING: u64 = 1 << 26;

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

/// What a header says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// `general.name`
    pub name: Option<String>,
    /// `general.architecture`
    pub architecture: String,
    /// From `general.file_type`, spelled as llama.cpp spells it.
    pub quantisation: String,
    /// Bytes of the file.
    pub bytes: u64,
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
    let mut reader = Reader {
        inner: BufReader::new(file),
        at: 0,
    };
    let mut magic = [0; 4];
    if reader.fill(&mut magic).is_err() || &magic != b"GGUF" {
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
    let (mut header, needs) = read_header(&mut reader).map_err(|what| match what {
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
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

enum Damage {
    End,
    What(String),
}

impl From<std::io::Error> for Damage {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Self::End,
            _ => Self::What(error.to_string()),
        }
    }
}

struct Reader<R> {
    inner: R,
    at: u64,
}

impl<R: Read> Reader<R> {
    fn fill(&mut self, out: &mut [u8]) -> std::io::Result<()> {
        self.inner.read_exact(out)?;
        self.at += out.len() as u64;
        Ok(())
    }

    fn u32(&mut self) -> std::io::Result<u32> {
        let mut out = [0; 4];
        self.fill(&mut out)?;
        Ok(u32::from_le_bytes(out))
    }

    fn u64(&mut self) -> std::io::Result<u64> {
        let mut out = [0; 8];
        self.fill(&mut out)?;
        Ok(u64::from_le_bytes(out))
    }

    fn skip(&mut self, bytes: u64) -> std::io::Result<()> {
        let skipped = std::io::copy(&mut (&mut self.inner).take(bytes), &mut std::io::sink())?;
        self.at += skipped;
        if skipped < bytes {
            Err(std::io::ErrorKind::UnexpectedEof.into())
        } else {
            Ok(())
        }
    }

    fn string(&mut self) -> Result<String, Damage> {
        let length = self.u64()?;
        if length > MOST_STRING {
            return Err(Damage::What(format!("a string of {length} bytes")));
        }
        // `take` keeps a false length from allocating what is not there.
        let mut out = Vec::new();
        (&mut self.inner).take(length).read_to_end(&mut out)?;
        self.at += out.len() as u64;
        if (out.len() as u64) < length {
            return Err(Damage::End);
        }
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    /// Skips a value; returns it when it is a string or a u32.
    fn value(&mut self, kind: u32, depth: u32) -> Result<Option<String>, Damage> {
        match kind {
            0 | 1 | 7 => self.skip(1)?,
            2 | 3 => self.skip(2)?,
            4 => return Ok(Some(self.u32()?.to_string())),
            5 | 6 => self.skip(4)?,
            10..=12 => self.skip(8)?,
            8 => return Ok(Some(self.string()?)),
            9 if depth < 2 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                if count > MOST_STRING {
                    return Err(Damage::What(format!("an array of {count} values")));
                }
                for _ in 0..count {
                    self.value(kind, depth + 1)?;
                }
            }
            other => return Err(Damage::What(format!("a value of type {other}"))),
        }
        Ok(None)
    }
}

/// Everything after the version; returns the header and the least size of the file.
fn read_header<R: Read>(reader: &mut Reader<R>) -> Result<(Header, u64), Damage> {
    let (tensors, keys) = (reader.u64()?, reader.u64()?);
    if tensors > MOST_ENTRIES || keys > MOST_ENTRIES {
        return Err(Damage::What(format!("{tensors} tensors and {keys} keys")));
    }
    let mut header = Header {
        quantisation: "unknown".to_owned(),
        ..Header::default()
    };
    let mut alignment = 32_u64;
    for _ in 0..keys {
        let key = reader.string()?;
        let kind = reader.u32()?;
        let Some(value) = reader.value(kind, 0)? else {
            continue;
        };
        match key.as_str() {
            "general.architecture" => header.architecture = value,
            "general.name" => header.name = Some(value),
            "general.file_type" => header.quantisation = file_type(value.parse().unwrap_or(u32::MAX)),
            "general.alignment" => alignment = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    if !alignment.is_power_of_two() {
        return Err(Damage::What(format!("an alignment of {alignment}")));
    }
    let mut most = 0_u64;
    for _ in 0..tensors {
        let name = reader.string()?;
        let dimensions = reader.u32()?;
        if dimensions > 4 {
            return Err(Damage::What(format!("tensor {name}: {dimensions} dimensions")));
        }
        let mut elements = 1_u64;
        for _ in 0..dimensions {
            elements = elements
                .checked_mul(reader.u64()?)
                .ok_or_else(|| Damage::What(format!("tensor {name}: its shape overflows")))?;
        }
        let (block, block_bytes) = block(reader.u32()?);
        let end = (elements / block)
            .checked_mul(block_bytes)
            .and_then(|bytes| reader.u64().ok()?.checked_add(bytes))
            .ok_or(Damage::End)?;
        most = most.max(end);
    }
    let data = reader.at.next_multiple_of(alignment);
    Ok((
        header,
        if tensors == 0 {
            reader.at
        } else {
            data.saturating_add(most)
        },
    ))
}

/// Elements and bytes of a block of a ggml type (ggml/src/ggml.c, type_traits). A type that is not known here
/// counts as nothing: then only its offset is checked.
fn block(kind: u32) -> (u64, u64) {
    match kind {
        0 | 26 => (1, 4),
        1 | 25 | 30 => (1, 2),
        2 | 20 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        9 => (32, 36),
        10 => (256, 84),
        11 | 21 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        15 => (256, 292),
        16 | 35 => (256, 66),
        17 => (256, 74),
        18 => (256, 98),
        19 => (256, 50),
        22 => (256, 82),
        23 => (256, 136),
        24 => (1, 1),
        27 | 28 => (1, 8),
        29 => (256, 56),
        34 => (256, 54),
        39 => (32, 17),
        _ => (1, 0),
    }
}

/// Name of a `llama_ftype` (llama.cpp include/llama.h).
fn file_type(number: u32) -> String {
    let name = match number {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4",
        other => return format!("file type {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A GGUF with one F32 tensor of 8 elements at offset 0.
    fn tiny() -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend(1_u64.to_le_bytes());
        out.extend(2_u64.to_le_bytes());
        let string = |out: &mut Vec<u8>, text: &str| {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        };
        string(&mut out, "general.architecture");
        out.extend(8_u32.to_le_bytes());
        string(&mut out, "llama");
        string(&mut out, "general.file_type");
        out.extend(4_u32.to_le_bytes());
        out.extend(15_u32.to_le_bytes());
        string(&mut out, "w");
        out.extend(1_u32.to_le_bytes());
        out.extend(8_u64.to_le_bytes());
        out.extend(0_u32.to_le_bytes());
        out.extend(0_u64.to_le_bytes());
        out.resize(out.len().next_multiple_of(32) + 32, 0);
        out
    }

    fn look(content: &[u8]) -> Result<Header, ModelError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, content).unwrap();
        inspect(&path)
    }

    #[test]
    fn whole_and_cut() {
        let content = tiny();
        let header = look(&content).unwrap();
        assert_eq!(
            (header.architecture.as_str(), header.quantisation.as_str()),
            ("llama", "Q4_K_M")
        );
        for cut in 8..content.len() {
            assert!(
                matches!(look(&content[..cut]), Err(ModelError::Truncated { .. })),
                "cut at {cut}"
            );
        }
        assert!(matches!(look(b"GGML whatever"), Err(ModelError::NotGguf { .. })));
        assert!(matches!(look(b""), Err(ModelError::NotGguf { .. })));
        assert!(matches!(
            inspect(Path::new("/nonexistent.gguf")),
            Err(ModelError::Io { .. })
        ));
        assert!(matches!(inspect(Path::new("/")), Err(ModelError::Io { .. })));
    }

    #[test]
    fn sha256_of_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, b"abc").unwrap();
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            sha256(&path).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    proptest! {
        #[test]
        fn garbage_never_panics(at in any::<prop::sample::Index>(), bytes in proptest::collection::vec(any::<u8>(), 1..12)) {
            let mut content = tiny();
            let at = at.index(content.len() - 8) + 8;
            for (offset, byte) in bytes.iter().enumerate() {
                if let Some(place) = content.get_mut(at + offset) { *place = *byte; }
            }
            let _ = look(&content);
        }
    }
}
