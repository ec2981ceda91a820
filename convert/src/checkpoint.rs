//! A Hugging Face checkpoint folder: `config.json` and safetensors, one file or shards, memory-mapped.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
pub use safetensors::Dtype;
use safetensors::SafeTensors;
use serde_json::{Map, Value};

/// What can be wrong with a checkpoint folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The path is not a folder with a `config.json` and safetensors.
    #[error("{path} is no checkpoint: {why}\nhint: a checkpoint is a folder with config.json and model.safetensors (or shards with model.safetensors.index.json)")]
    NoCheckpoint {
        /// The folder that was named.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// A file of the folder cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file does not parse, or does not hold what it must.
    #[error("{path}: {why}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A safetensors file breaks the format (truncated, ranges that overlap or leave the file, …).
    #[error("{path} is no valid safetensors file: {why}")]
    Shard {
        /// The file.
        path: PathBuf,
        /// What the format's reader said.
        why: String,
    },
    /// The index and the shards disagree, or a tensor stands in two shards.
    #[error("{path}: tensor {tensor}: {why}")]
    Index {
        /// The index, or the shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How they disagree.
        why: String,
    },
    /// A tensor that is needed is not there.
    #[error("{path} has no tensor {tensor}")]
    MissingTensor {
        /// The folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has a type that cannot be turned into numbers here.
    #[error("tensor {tensor} has type {dtype:?}; F32, F16 and BF16 are read")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
    },
}

/// An opened checkpoint folder. Tensors stay on disk until they are asked for.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Map<String, Value>,
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
}

impl Checkpoint {
    /// Opens the folder: reads `config.json`, maps the shards and checks their headers.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let no = |why: &str| CheckpointError::NoCheckpoint { path: dir.to_path_buf(), why: why.to_owned() };
        if !dir.is_dir() {
            return Err(no(if dir.exists() { "it is not a folder" } else { "it does not exist" }));
        }
        if !dir.join("config.json").is_file() {
            return Err(no("it has no config.json"));
        }
        let config = read_json_object(&dir.join("config.json"))?;
        let mut checkpoint =
            Self { dir: dir.to_path_buf(), config, shards: Vec::new(), tensors: BTreeMap::new() };
        let index = dir.join("model.safetensors.index.json");
        if index.is_file() {
            checkpoint.open_index(&index)?;
        } else if dir.join("model.safetensors").is_file() {
            checkpoint.open_shard(dir.join("model.safetensors"))?;
        } else {
            return Err(no("it has no model.safetensors and no model.safetensors.index.json"));
        }
        Ok(checkpoint)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json` as it stands.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The shards, in the order in which they were opened.
    pub fn shard_paths(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        let (name, at) = self.tensors.get_key_value(name).ok_or_else(|| CheckpointError::MissingTensor {
            path: self.dir.clone(),
            tensor: name.to_owned(),
        })?;
        Ok(TensorView {
            name,
            dtype: at.dtype,
            shape: &at.shape,
            bytes: &self.shards[at.shard].bytes[at.start..at.end],
        })
    }

    fn open_index(&mut self, index: &Path) -> Result<(), CheckpointError> {
        let json = read_json_object(index)?;
        let bad = |why: String| CheckpointError::Json { path: index.to_path_buf(), why };
        let map = json
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| bad("it has no object `weight_map`".into()))?;
        let mut files: Vec<&str> = Vec::new();
        for (tensor, file) in map {
            let file =
                file.as_str().ok_or_else(|| bad(format!("the file of tensor {tensor} is not a string")))?;
            let one_name = matches!(
                Path::new(file).components().collect::<Vec<_>>().as_slice(),
                [Component::Normal(_)]
            );
            if !one_name {
                return Err(bad(format!("tensor {tensor} names the file {file:?}, which leaves the folder")));
            }
            if !files.contains(&file) {
                files.push(file);
            }
        }
        files.sort_unstable();
        for file in files {
            self.open_shard(self.dir.join(file))?;
        }
        for (tensor, file) in map {
            let here = self.tensors.get(tensor).map(|at| self.shards[at.shard].path.file_name());
            if here.flatten().and_then(|name| name.to_str()) != file.as_str() {
                return Err(CheckpointError::Index {
                    path: index.to_path_buf(),
                    tensor: tensor.clone(),
                    why: format!("it is not in {file}"),
                });
            }
        }
        if let Some(extra) = self.tensors.keys().find(|name| !map.contains_key(*name)) {
            return Err(CheckpointError::Index {
                path: index.to_path_buf(),
                tensor: extra.clone(),
                why: "a shard holds it, the index does not name it".into(),
            });
        }
        Ok(())
    }

    fn open_shard(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let read = |source| CheckpointError::Read { path: path.clone(), source };
        let file = File::open(&path).map_err(read)?;
        // SAFETY: the map is read-only. If another program truncates the file while it is mapped, the process
        // is killed by SIGBUS; that is the price of not copying gigabytes, as in every reader of this format.
        #[expect(unsafe_code, reason = "memory-mapping is unsafe by nature")]
        let bytes = unsafe { Mmap::map(&file) }.map_err(read)?;
        let bad = |why: String| CheckpointError::Shard { path: path.clone(), why };
        let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let data = header + 8;
        for (name, info) in metadata.tensors() {
            let at = TensorRef {
                shard: self.shards.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data + info.data_offsets.0,
                end: data + info.data_offsets.1,
            };
            if at.end > bytes.len() {
                return Err(bad(format!("tensor {name} ends beyond the end of the file (truncated?)")));
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
}

impl TensorView<'_> {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// All elements as f32. F16 and BF16 are widened exactly.
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
        let end = start + out.len();
        match self.dtype {
            Dtype::F32 => {
                for (value, raw) in out.iter_mut().zip(self.bytes[start * 4..end * 4].chunks_exact(4)) {
                    *value = f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
                }
            }
            Dtype::F16 => {
                for (value, raw) in out.iter_mut().zip(self.bytes[start * 2..end * 2].chunks_exact(2)) {
                    *value = f16::from_le_bytes([raw[0], raw[1]]).to_f32();
                }
            }
            Dtype::BF16 => {
                for (value, raw) in out.iter_mut().zip(self.bytes[start * 2..end * 2].chunks_exact(2)) {
                    *value = bf16::from_le_bytes([raw[0], raw[1]]).to_f32();
                }
            }
            dtype => return Err(CheckpointError::Dtype { tensor: self.name.to_owned(), dtype }),
        }
        Ok(())
    }
}

/// Reads a file that must hold one JSON object.
pub fn read_json_object(path: &Path) -> Result<Map<String, Value>, CheckpointError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| CheckpointError::Read { path: path.to_path_buf(), source })?;
    serde_json::from_str(&text)
        .map_err(|e| CheckpointError::Json { path: path.to_path_buf(), why: e.to_string() })
}
