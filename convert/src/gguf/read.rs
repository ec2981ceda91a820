//! Reads a GGUF file, or the parts of a split one: the header into memory, the tensors as views of the mapped files.

mod bytes;
mod header;
mod parts;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use header::Parsed;

use super::{Array, GgufError, TensorType, Value, split};

/// An opened GGUF file, whole or in parts.
#[derive(Debug)]
pub struct Gguf {
    /// One file, or all parts in their order.
    files: Vec<OpenFile>,
    version: u32,
    alignment: u64,
    metadata: Vec<(String, Value)>,
    by_key: BTreeMap<String, usize>,
    tensors: Vec<TensorInfo>,
    by_name: BTreeMap<String, usize>,
}

#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    bytes: Bytes,
    data_start: usize,
}

/// What the header says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name.
    pub name: String,
    /// The dimensions in ggml's order: the first one is the length of a row.
    pub dimensions: Vec<u64>,
    /// The element type.
    pub kind: TensorType,
    /// Where the tensor starts, from the start of its file's data section.
    pub offset: u64,
    /// The number of bytes.
    pub size: u64,
    /// Which part of a split file holds it, from 0.
    pub file: usize,
}

impl TensorInfo {
    /// The length of a row.
    pub fn row_elements(&self) -> u64 {
        self.dimensions.first().copied().unwrap_or(1)
    }

    /// The number of rows.
    pub fn rows(&self) -> u64 {
        self.dimensions.iter().skip(1).product()
    }

    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.dimensions.iter().product()
    }
}

impl Gguf {
    /// Opens, maps and checks a file. Of a split file, any part may be named; the others are found beside it.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let first = Self::read(path)?;
        match parts::beside(path, &first)? {
            None => Ok(first),
            Some(paths) => Self::join(&paths, first.unsigned(split::TENSORS)?),
        }
    }

    /// Reads a file that is in memory. Of a split file this is the one part.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, GgufError> {
        Self::one(Path::new("(bytes)"), Bytes::Owned(bytes))
    }

    fn read(path: &Path) -> Result<Self, GgufError> {
        let bytes = Bytes::map(path).map_err(|source| GgufError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        Self::one(path, bytes)
    }

    fn one(path: &Path, bytes: Bytes) -> Result<Self, GgufError> {
        let Parsed {
            version,
            alignment,
            data_start,
            metadata,
            by_key,
            tensors,
        } = header::parse(path, &bytes)?;
        let names = tensors.iter().map(|tensor| tensor.name.clone());
        let by_name = names.enumerate().map(|(at, name)| (name, at)).collect();
        let path = path.to_path_buf();
        Ok(Self {
            files: vec![OpenFile {
                path,
                bytes,
                data_start,
            }],
            version,
            alignment,
            metadata,
            by_key,
            tensors,
            by_name,
        })
    }

    /// Makes one of all parts, which hold so many tensors together. The keys are those of the first part.
    fn join(paths: &[PathBuf], tensors: u64) -> Result<Self, GgufError> {
        let read = |at: usize| -> Result<Self, GgufError> {
            let part = Self::read(&paths[at])?;
            parts::check(&part, at, paths.len(), tensors)?;
            Ok(part)
        };
        let mut whole = read(0)?;
        for at in 1..paths.len() {
            let part = read(at)?;
            whole.files.extend(part.files);
            for tensor in part.tensors {
                let place = whole.tensors.len();
                if whole.by_name.insert(tensor.name.clone(), place).is_some() {
                    let why = format!("the tensor {} stands in an earlier part too", tensor.name);
                    return Err(whole.part_error(at, why));
                }
                whole.tensors.push(TensorInfo { file: at, ..tensor });
            }
        }
        let found = whole.tensors.len();
        if found as u64 != tensors {
            let why = format!("{} is {tensors}, and the parts hold {found}", split::TENSORS);
            return Err(whole.part_error(0, why));
        }
        Ok(whole)
    }

    /// The file, or the first part.
    pub fn path(&self) -> &Path {
        &self.files[0].path
    }

    /// All files: one, or the parts in their order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// The version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The alignment of the tensors in bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The size of the file in bytes, of all parts together.
    pub fn file_size(&self) -> u64 {
        self.files.iter().map(|file| file.bytes.len() as u64).sum()
    }

    /// All keys with their values, in the file's order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.by_key.get(key).map(|&at| &self.metadata[at].1)
    }

    /// A string that must be there.
    pub fn string(&self, key: &str) -> Result<&str, GgufError> {
        self.need(key)?
            .as_str()
            .ok_or_else(|| self.key_error(key, "is no string"))
    }

    /// An integer that must be there.
    pub fn unsigned(&self, key: &str) -> Result<u64, GgufError> {
        self.need(key)?
            .as_u64()
            .ok_or_else(|| self.key_error(key, "is no unsigned integer"))
    }

    /// An integer, if the key is there.
    pub fn unsigned_opt(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.get(key).map(|_| self.unsigned(key)).transpose()
    }

    /// A 32-bit floating-point number that must be there.
    pub fn float(&self, key: &str) -> Result<f32, GgufError> {
        match self.need(key)? {
            Value::F32(value) => Ok(*value),
            _ => Err(self.key_error(key, "is no f32")),
        }
    }

    /// A truth value, if the key is there.
    pub fn bool_opt(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.key_error(key, "is no bool")),
        }
    }

    /// An array of strings that must be there.
    pub fn strings(&self, key: &str) -> Result<&[String], GgufError> {
        match self.need(key)? {
            Value::Array(Array::String(texts)) => Ok(texts),
            _ => Err(self.key_error(key, "is no array of strings")),
        }
    }

    /// The error that a key is not what it should be.
    pub fn key_error(&self, key: &str, why: &str) -> GgufError {
        GgufError::Key {
            path: self.path().to_path_buf(),
            key: key.to_owned(),
            why: why.to_owned(),
        }
    }

    fn need(&self, key: &str) -> Result<&Value, GgufError> {
        self.get(key).ok_or_else(|| self.key_error(key, "is missing"))
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&at| &self.tensors[at])
    }

    /// The bytes of a tensor of this file.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        let file = &self.files[tensor.file];
        let start = file.data_start + tensor.offset as usize;
        &file.bytes[start..start + tensor.size as usize]
    }

    /// Gives the memory back that reading a tensor took, so that what is resident does not grow with what was read.
    pub fn release(&self, name: &str) {
        if let Some(tensor) = self.tensor(name) {
            let file = &self.files[tensor.file];
            let start = file.data_start + tensor.offset as usize;
            file.bytes.release(start..start + tensor.size as usize);
        }
    }

    fn part_error(&self, part: usize, why: String) -> GgufError {
        let path = self
            .files
            .get(part)
            .map_or_else(|| self.path(), |file| &file.path);
        GgufError::Part {
            path: path.to_path_buf(),
            why,
        }
    }
}
