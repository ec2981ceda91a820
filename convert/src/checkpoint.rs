//! A Hugging Face checkpoint folder: `config.json` and safetensors, one file or shards, memory-mapped.

mod element;
mod error;
mod folder;
mod index;
mod quantized;
mod tensors;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

pub use error::CheckpointError;
pub use folder::{refuse_links, refuse_pickle};
use quantized::{Scale, Scheme};
pub use safetensors::Dtype;
use serde_json::{Map, Value};
pub use tensors::{TensorFiles, TensorView};

use crate::json;

/// An opened checkpoint folder. Tensors stay on disk until they are asked for.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Map<String, Value>,
    tensors: TensorFiles,
    /// The scales of the weights that are quantised.
    scales: BTreeMap<String, Scale>,
    /// The tensors that hold scales, and are none of the model's own.
    hidden: BTreeSet<String>,
}

impl Checkpoint {
    /// Opens the folder: reads `config.json`, maps the shards and checks their headers.
    ///
    /// Refused by name are links that leave the folder, pickles, configurations that ask for code to be run, and
    /// quantisations that are not read.
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
        folder::refuse_links(dir)?;
        let config = read_json_object(&dir.join("config.json"))?;
        folder::refuse_code(dir, &config)?;
        let index = dir.join("model.safetensors.index.json");
        let tensors = if index.is_file() {
            index::open(dir, &index)?
        } else if dir.join("model.safetensors").is_file() {
            TensorFiles::open(&dir.join("model.safetensors"))?
        } else {
            folder::refuse_pickle(dir)?;
            return Err(no(
                "it has no model.safetensors and no model.safetensors.index.json",
            ));
        };
        let mut checkpoint = Self {
            dir: dir.to_path_buf(),
            config,
            tensors,
            scales: BTreeMap::new(),
            hidden: BTreeSet::new(),
        };
        checkpoint.read_scales()?;
        Ok(checkpoint)
    }

    /// Pairs the weights of a quantised checkpoint with their scales. Those, and what the configuration says of
    /// them, are not seen from outside: the tensors are those of the model, as numbers.
    fn read_scales(&mut self) -> Result<(), CheckpointError> {
        let refused = |how| CheckpointError::Quantized {
            path: self.dir.clone(),
            how,
        };
        let Some(scheme) = Scheme::of(&self.config).map_err(refused)? else {
            return match quantized::given_away(&self.tensors) {
                None => Ok(()),
                Some((method, tensor)) => Err(refused(format!(
                    "quantised by {method} (it has {tensor}), and config.json does not say how"
                ))),
            };
        };
        for name in self.tensors.names() {
            if scheme.hides(name, |weight| self.tensors.contains(weight)) {
                self.hidden.insert(name.to_owned());
                continue;
            }
            let Some(weight) = self
                .tensors
                .tensor(name)
                .filter(|weight| scheme.scales(weight.dtype))
            else {
                continue;
            };
            let scale_name = scheme.scale_name(name);
            let scales = self
                .tensors
                .tensor(&scale_name)
                .ok_or_else(|| CheckpointError::Scale {
                    tensor: scale_name.clone(),
                    why: format!("it is missing, and {name} has the type {:?}", weight.dtype),
                })?;
            let scale = scheme.scale(&scales, weight.shape)?;
            self.scales.insert(name.to_owned(), scale);
        }
        self.config.remove("quantization_config");
        self.config.remove("compression_config");
        Ok(())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json` as it stands, without what it says of a quantisation that is read.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The shards, in the order in which they were opened.
    pub fn shard_paths(&self) -> impl Iterator<Item = &Path> {
        self.tensors.paths()
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.names().filter(|name| !self.hidden.contains(*name))
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains(name) && !self.hidden.contains(name)
    }

    /// Gives the memory back that reading a tensor took, so that what is resident does not grow with what was read.
    pub fn release(&self, name: &str) {
        self.tensors.release(name);
    }

    /// The tensor of this name, which has a type that can be read as numbers.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        let view = self
            .tensors
            .tensor(name)
            .ok_or_else(|| CheckpointError::MissingTensor {
                path: self.dir.clone(),
                tensor: name.to_owned(),
            })?;
        let view = TensorView {
            scale: self.scales.get(name),
            ..view
        };
        view.check_dtype()?;
        Ok(view)
    }
}

/// Reads a file that must hold one JSON object, as [`crate::json`] says.
pub fn read_json_object(path: &Path) -> Result<Map<String, Value>, CheckpointError> {
    let bytes = json::read_bytes(path).map_err(|source| CheckpointError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    json::from_slice(&bytes).map_err(|e| CheckpointError::Json {
        path: path.to_path_buf(),
        why: e.to_string(),
    })
}
