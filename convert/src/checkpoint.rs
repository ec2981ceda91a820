//! A Hugging Face checkpoint folder: `config.json` and safetensors, one file or shards, memory-mapped.

mod tensors;

use std::path::{Component, Path, PathBuf};

pub use safetensors::Dtype;
use serde_json::{Map, Value};
pub use tensors::{TensorFiles, TensorView};

/// What can be wrong with a checkpoint folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The path is not a folder with a `config.json` and safetensors.
    #[error(
        "{path} is no checkpoint: {why}\nhint: a checkpoint is a folder with config.json and model.safetensors (or shards with model.safetensors.index.json)"
    )]
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
    tensors: TensorFiles,
}

impl Checkpoint {
    /// Opens the folder: reads `config.json`, maps the shards and checks their headers.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let no = |why: &str| CheckpointError::NoCheckpoint {
            path: dir.to_path_buf(),
            why: why.to_owned(),
        };
        if !dir.is_dir() {
            return Err(no(if dir.exists() {
                "it is not a folder"
            } else {
                "it does not exist"
            }));
        }
        if !dir.join("config.json").is_file() {
            return Err(no("it has no config.json"));
        }
        let config = read_json_object(&dir.join("config.json"))?;
        let mut checkpoint = Self {
            dir: dir.to_path_buf(),
            config,
            tensors: TensorFiles::default(),
        };
        let index = dir.join("model.safetensors.index.json");
        if index.is_file() {
            checkpoint.open_index(&index)?;
        } else if dir.join("model.safetensors").is_file() {
            checkpoint.tensors.add(dir.join("model.safetensors"))?;
        } else {
            return Err(no(
                "it has no model.safetensors and no model.safetensors.index.json",
            ));
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
        self.tensors.paths()
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.names()
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains(name)
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        self.tensors
            .tensor(name)
            .ok_or_else(|| CheckpointError::MissingTensor {
                path: self.dir.clone(),
                tensor: name.to_owned(),
            })
    }

    fn open_index(&mut self, index: &Path) -> Result<(), CheckpointError> {
        let json = read_json_object(index)?;
        let bad = |why: String| CheckpointError::Json {
            path: index.to_path_buf(),
            why,
        };
        let map = json
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| bad("it has no object `weight_map`".into()))?;
        let mut files: Vec<&str> = Vec::new();
        for (tensor, file) in map {
            let file = file
                .as_str()
                .ok_or_else(|| bad(format!("the file of tensor {tensor} is not a string")))?;
            let one_name = matches!(
                Path::new(file).components().collect::<Vec<_>>().as_slice(),
                [Component::Normal(_)]
            );
            if !one_name {
                return Err(bad(format!(
                    "tensor {tensor} names the file {file:?}, which leaves the folder"
                )));
            }
            if !files.contains(&file) {
                files.push(file);
            }
        }
        files.sort_unstable();
        for file in files {
            self.tensors.add(self.dir.join(file))?;
        }
        for (tensor, file) in map {
            let here = self.tensors.path_of(tensor).and_then(Path::file_name);
            if here.and_then(|name| name.to_str()) != file.as_str() {
                return Err(CheckpointError::Index {
                    path: index.to_path_buf(),
                    tensor: tensor.clone(),
                    why: format!("it is not in {file}"),
                });
            }
        }
        if let Some(extra) = self.tensors.names().find(|name| !map.contains_key(*name)) {
            return Err(CheckpointError::Index {
                path: index.to_path_buf(),
                tensor: extra.to_owned(),
                why: "a shard holds it, the index does not name it".into(),
            });
        }
        Ok(())
    }
}

/// Reads a file that must hold one JSON object.
pub fn read_json_object(path: &Path) -> Result<Map<String, Value>, CheckpointError> {
    let text = std::fs::read_to_string(path).map_err(|source| CheckpointError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    serde_json::from_str(&text).map_err(|e| CheckpointError::Json {
        path: path.to_path_buf(),
        why: e.to_string(),
    })
}
