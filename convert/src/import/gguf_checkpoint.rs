//! A GGUF file seen as the checkpoint that it would become: `config.json`, the tokenizer's files, and the tensors
//! under Hugging Face's names. Nothing is copied: rows become numbers when they are asked for.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value as Json};

use super::{Described, ImportError, check_tensors, describe, read_rows};
use crate::arch::TensorRule;
use crate::gguf::{Gguf, GgufError, TensorType};
use crate::quantize::{self, QuantizeError};

/// An opened file. Its blocks stay on disk, memory-mapped.
#[derive(Debug)]
pub struct GgufCheckpoint {
    gguf: Arc<Gguf>,
    config: Map<String, Json>,
    /// Name and content of every file of the folder but the weights.
    files: Vec<(String, String)>,
    tensors: BTreeMap<String, GgufTensor>,
}

/// One tensor of the file, in the checkpoint's order of rows.
#[derive(Debug, Clone)]
pub struct GgufTensor {
    gguf: Arc<Gguf>,
    rule: TensorRule,
    /// Its place among the file's tensors.
    at: usize,
}

impl GgufCheckpoint {
    /// Opens the file and checks that it has the tensors that its keys promise, and no others.
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        let gguf = Arc::new(Gguf::open(path)?);
        let Described {
            arch,
            config,
            files,
            rules,
            ..
        } = describe(&gguf, TensorType::F32)?;
        check_tensors(&gguf, arch, &config, &rules)?;
        let mut tensors = BTreeMap::new();
        for rule in rules {
            let at = gguf.tensors().iter().position(|tensor| tensor.name == rule.gguf);
            let at = at.ok_or_else(|| GgufError::MissingTensor {
                path: path.to_path_buf(),
                tensor: rule.gguf.clone(),
            })?;
            let gguf = gguf.clone();
            tensors.insert(rule.hf.clone(), GgufTensor { gguf, rule, at });
        }
        Ok(Self {
            gguf,
            config,
            files,
            tensors,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.gguf.path()
    }

    /// What `config.json` would say.
    pub fn config(&self) -> &Map<String, Json> {
        &self.config
    }

    /// Writes `config.json`, `generation_config.json`, the tokenizer's files and the chat template into a folder
    /// that exists.
    pub fn write_files(&self, dir: &Path) -> Result<(), ImportError> {
        super::write_files(&self.files, dir).map_err(|source| ImportError::Write {
            path: dir.to_path_buf(),
            source,
        })
    }

    /// The checkpoint's names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.get(name)
    }
}

impl GgufTensor {
    /// The name in the checkpoint.
    pub fn name(&self) -> &str {
        &self.rule.hf
    }

    /// The shape in the checkpoint.
    pub fn shape(&self) -> &[usize] {
        &self.rule.shape
    }

    /// The type of its blocks.
    pub fn kind(&self) -> TensorType {
        self.gguf.tensors()[self.at].kind
    }

    /// The bytes of its blocks.
    pub fn bytes(&self) -> usize {
        self.data().len()
    }

    fn data(&self) -> &[u8] {
        self.gguf.data(&self.gguf.tensors()[self.at])
    }

    /// Checks that the type can be turned into numbers, and that all of them are finite.
    pub fn check(&self) -> Result<(), QuantizeError> {
        let (_, columns) = self.rule.rows_and_columns();
        quantize::check_blocks(self.kind(), self.data())?;
        self.read_rows(0..1, &mut vec![0.0; columns])
    }

    /// All elements as f32.
    pub fn to_f32(&self) -> Result<Vec<f32>, QuantizeError> {
        let (rows, columns) = self.rule.rows_and_columns();
        let mut out = vec![0.0; rows * columns];
        self.read_rows(0..rows, &mut out)?;
        Ok(out)
    }

    /// Rows of a matrix as f32; `out` has room for just these.
    ///
    /// # Panics
    /// When the rows leave the matrix.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), QuantizeError> {
        let (_, columns) = self.rule.rows_and_columns();
        assert_eq!(out.len(), rows.len() * columns, "room for just the rows");
        read_rows(self.kind(), self.data(), &self.rule, rows.start, out)
    }
}
