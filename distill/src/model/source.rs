//! Where a model's tensors come from: a checkpoint folder, or a GGUF file under Hugging Face's names.

use std::path::Path;
use std::sync::Arc;

use pipit_convert::checkpoint::{Checkpoint, CheckpointError};
use pipit_convert::import::{GgufCheckpoint, GgufTensor};

use super::quantized::{GgufRows, MappedRows};
use super::{Config, ModelError, QuantizedRows};

/// An opened folder or file. Tensors stay on disk until they are asked for.
#[derive(Debug)]
pub(crate) enum Source {
    Folder(Arc<Checkpoint>),
    File(GgufCheckpoint),
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        Ok(match path.is_file() {
            true => Self::File(GgufCheckpoint::open(path)?),
            false => Self::Folder(Arc::new(Checkpoint::open(path)?)),
        })
    }

    /// The folder or file.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Folder(checkpoint) => checkpoint.dir(),
            Self::File(file) => file.path(),
        }
    }

    pub(crate) fn config(&self) -> Result<Config, ModelError> {
        match self {
            Self::Folder(checkpoint) => Config::read(checkpoint),
            Self::File(file) => Config::parse(file.path(), file.config()),
        }
    }

    /// The names of all tensors.
    pub(crate) fn names(&self) -> Vec<&str> {
        match self {
            Self::Folder(checkpoint) => checkpoint.names().collect(),
            Self::File(file) => file.names().collect(),
        }
    }

    fn in_file<'a>(&self, file: &'a GgufCheckpoint, name: &str) -> Result<&'a GgufTensor, ModelError> {
        let missing = || CheckpointError::MissingTensor {
            path: self.path().to_path_buf(),
            tensor: name.to_owned(),
        };
        Ok(file.tensor(name).ok_or_else(missing)?)
    }

    pub(crate) fn shape(&self, name: &str) -> Result<Vec<usize>, ModelError> {
        Ok(match self {
            Self::Folder(checkpoint) => checkpoint.tensor(name)?.shape.to_vec(),
            Self::File(file) => self.in_file(file, name)?.shape().to_vec(),
        })
    }

    /// All elements. What reading took of the file's memory is given back.
    pub(crate) fn to_f32(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        match self {
            Self::Folder(checkpoint) => {
                let values = checkpoint.tensor(name)?.to_f32()?;
                checkpoint.release(name);
                Ok(values)
            }
            Self::File(file) => {
                let tensor = self.in_file(file, name)?;
                tensor.to_f32().map_err(|source| self.bad_blocks(name, source))
            }
        }
    }

    /// A matrix as it stands on disk, to be read row by row; all its numbers are finite.
    pub(crate) fn rows(&self, name: &str) -> Result<Arc<dyn QuantizedRows>, ModelError> {
        let no_matrix = || ModelError::NoMatrix {
            path: self.path().to_path_buf(),
            tensor: name.to_owned(),
        };
        match self {
            Self::Folder(checkpoint) => {
                let rows = MappedRows::new(checkpoint, name)?.ok_or_else(no_matrix)?;
                if !rows.is_finite() {
                    return Err(self.not_finite(name));
                }
                Ok(Arc::new(rows))
            }
            Self::File(file) => {
                let tensor = self.in_file(file, name)?;
                tensor.check().map_err(|source| self.bad_blocks(name, source))?;
                Ok(Arc::new(GgufRows::new(tensor).ok_or_else(no_matrix)?))
            }
        }
    }

    pub(crate) fn not_finite(&self, name: &str) -> ModelError {
        ModelError::NotFinite {
            path: self.path().to_path_buf(),
            tensor: name.to_owned(),
        }
    }

    fn bad_blocks(&self, name: &str, source: pipit_convert::quantize::QuantizeError) -> ModelError {
        ModelError::Unreadable {
            path: self.path().to_path_buf(),
            tensor: name.to_owned(),
            source,
        }
    }
}
