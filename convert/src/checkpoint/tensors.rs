//! Safetensors files, memory-mapped: names to typed, shaped views of the bytes on disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::de::IgnoredAny;

use super::quantized::Scale;
use super::{CheckpointError, element};
use crate::{json, pages};

/// The tensors of one or more safetensors files. They stay on disk until they are asked for.
#[derive(Debug, Default)]
pub struct TensorFiles {
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorRef>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    bytes: Mmap,
}

#[derive(Debug)]
struct TensorRef {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// The longest dimension that is read: what computes with the result counts in 32 bits.
const MAX_DIMENSION: usize = i32::MAX as usize;

/// One tensor: its type, its shape (outermost dimension first) and its bytes, little-endian, row-major.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// The shape, outermost dimension first.
    pub shape: &'a [usize],
    /// The elements.
    pub bytes: &'a [u8],
    /// What the elements are multiplied by, if the checkpoint is quantised.
    pub(super) scale: Option<&'a Scale>,
}

impl TensorFiles {
    /// Opens a single file.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let mut files = Self::default();
        files.add(path.to_path_buf())?;
        Ok(files)
    }

    /// Maps one more file and checks its header.
    pub fn add(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let read = |source| CheckpointError::Read {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(read)?;
        // SAFETY: the map is read-only. If another program truncates the file while it is mapped, the process
        // is killed by SIGBUS; that is the price of not copying gigabytes, as in every reader of this format.
        #[expect(unsafe_code, reason = "memory-mapping is unsafe by nature")]
        let bytes = unsafe { Mmap::map(&file) }.map_err(read)?;
        self.add_mapped(path, bytes)
    }

    fn add_mapped(&mut self, path: PathBuf, bytes: Mmap) -> Result<(), CheckpointError> {
        let bad = |why: String| CheckpointError::Shard {
            path: path.clone(),
            why,
        };
        let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| match e {
            SafeTensorError::MetadataIncompleteBuffer
            | SafeTensorError::HeaderTooSmall
            | SafeTensorError::InvalidHeaderLength => bad(format!(
                "it is truncated, or something was appended ({e})\nhint: fetch or copy the file again"
            )),
            other => bad(other.to_string()),
        })?;
        let data = header + 8;
        json::from_slice::<IgnoredAny>(&bytes[8..data]).map_err(|e| bad(format!("its header: {e}")))?;
        for (name, info) in metadata.tensors() {
            if info.shape.iter().any(|n| *n > MAX_DIMENSION) {
                return Err(bad(format!("tensor {name} has the shape {:?}", info.shape)));
            }
            let at = TensorRef {
                shard: self.shards.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data + info.data_offsets.0,
                end: data + info.data_offsets.1,
            };
            if at.end > bytes.len() {
                return Err(bad(format!(
                    "tensor {name} ends beyond the end of the file (truncated?)"
                )));
            }
            if self.tensors.insert(name.clone(), at).is_some() {
                return Err(CheckpointError::Index {
                    path: path.clone(),
                    tensor: name,
                    why: "it stands in two shards".into(),
                });
            }
        }
        self.shards.push(Shard { path, bytes });
        Ok(())
    }

    /// The files, in the order in which they were opened.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// The file that holds the tensor of this name.
    pub fn path_of(&self, name: &str) -> Option<&Path> {
        self.tensors
            .get(name)
            .map(|at| self.shards[at.shard].path.as_path())
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Gives the memory back that reading a tensor took, so that what is resident does not grow with what was read.
    pub fn release(&self, name: &str) {
        if let Some(at) = self.tensors.get(name) {
            pages::release(&self.shards[at.shard].bytes, at.start..at.end);
        }
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, at) = self.tensors.get_key_value(name)?;
        Some(TensorView {
            name,
            dtype: at.dtype,
            shape: &at.shape,
            bytes: &self.shards[at.shard].bytes[at.start..at.end],
            scale: None,
        })
    }
}

impl TensorView<'_> {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the elements can be turned into numbers.
    pub fn check_dtype(&self) -> Result<(), CheckpointError> {
        if element::readable(self.dtype, self.scale.is_some()) {
            return Ok(());
        }
        Err(CheckpointError::Dtype {
            tensor: self.name.to_owned(),
            dtype: self.dtype,
        })
    }

    /// All elements as f32. Every type that is read is widened exactly; scales are multiplied in f32.
    pub fn to_f32(&self) -> Result<Vec<f32>, CheckpointError> {
        let mut out = vec![0.0; self.elements()];
        self.read_f32(0, &mut out)?;
        Ok(out)
    }

    /// Elements `start..start + out.len()`, counted over the flattened tensor, as f32.
    ///
    /// # Panics
    /// When the range leaves the tensor.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
        self.check_dtype()?;
        element::read(self.dtype, self.bytes, start, out);
        if let Some(scale) = self.scale {
            scale.apply(self.shape.last().copied().unwrap_or(1), start, out);
        }
        Ok(())
    }
}
