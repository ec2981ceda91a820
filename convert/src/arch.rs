//! What the program knows of each architecture: the names, shapes and order of its tensors on both sides, and
//! how `config.json` and the keys of a GGUF file translate into each other.
//!
//! One file per architecture; [`ALL`] is the list that `pipit-convert archs` prints.

mod decoder;
pub mod gemma2;
pub mod gemma3;
pub mod granite;
mod keys;
pub mod lfm2;
pub mod llama;
pub mod olmo2;
pub mod phi3;
pub mod qwen2;
pub mod qwen3;
mod rope;
pub mod smollm3;
mod table;

pub(crate) use decoder::shortest;
use serde_json::{Map, Value as Json};

use crate::gguf::{Gguf, GgufError, Value};

/// All architectures that are built.
pub const ALL: &[&Architecture] = &[
    &llama::LLAMA,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &gemma2::GEMMA2,
    &gemma3::GEMMA3,
    &phi3::PHI3,
    &smollm3::SMOLLM3,
    &granite::GRANITE,
    &olmo2::OLMO2,
    &lfm2::LFM2,
];

/// What follows from a `config.json`.
pub type FromConfig<T> = fn(config: &Map<String, Json>) -> Result<T, ArchError>;

/// One architecture: a table of functions, so that a new one is one new file.
#[derive(Debug)]
pub struct Architecture {
    /// The name in `general.architecture` of a GGUF file.
    pub name: &'static str,
    /// The names in `architectures` of `config.json`. The first one is written by `import`.
    pub hugging_face: &'static [&'static str],
    /// The models that people know it by.
    pub models: &'static str,
    /// The tiny checkpoints of tests/fixtures/architectures that prove it.
    pub fixtures: &'static [&'static str],
    /// The real models that go both ways in the tests.
    pub real: &'static [&'static str],
    /// The kinds of scaled rotation (`rope_type` of `config.json`), besides `default`.
    pub rope: &'static [&'static str],
    /// `config.json` to the tensors that the checkpoint must have.
    pub tensors: FromConfig<Vec<TensorRule>>,
    /// `config.json` to tensors that only the GGUF file has, such as `rope_freqs.weight`.
    pub extra_tensors: FromConfig<Vec<ExtraTensor>>,
    /// `config.json` to the keys of a GGUF file that start with the architecture's name.
    pub metadata: FromConfig<Vec<(String, Value)>>,
    /// The keys of a GGUF file to `config.json`, without the names of tokens and types.
    pub config: fn(gguf: &Gguf) -> Result<Map<String, Json>, ArchError>,
}

/// One tensor on both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorRule {
    /// The name in the checkpoint.
    pub hf: String,
    /// The name in the GGUF file.
    pub gguf: String,
    /// The shape in the checkpoint: `[rows, columns]`, `[elements]`, or `[rows, 1, columns]`, which a GGUF file
    /// holds as a matrix.
    pub shape: Vec<usize>,
    /// How the rows are ordered in the GGUF file.
    pub rows: RowOrder,
    /// What happens to the elements on their way into the GGUF file.
    pub change: Change,
    /// Whether the tensor is F32 whatever type the user asks for, as in both of llama.cpp's tools.
    pub always_f32: bool,
}

impl TensorRule {
    /// The number of rows and their length, as they are read and written: a vector is one row, or, where its
    /// elements are reordered, many rows of one element.
    pub fn rows_and_columns(&self) -> (usize, usize) {
        match (self.shape.as_slice(), self.rows) {
            (&[rows, columns] | &[rows, 1, columns], _) => (rows, columns),
            (shape, RowOrder::Same) => (1, shape.iter().product()),
            (shape, RowOrder::Interleaved { .. }) => (shape.iter().product(), 1),
        }
    }

    /// The dimensions in the GGUF file, in ggml's order.
    pub fn dimensions(&self) -> Vec<u64> {
        match self.shape.as_slice() {
            &[rows, 1, columns] => vec![columns as u64, rows as u64],
            shape => shape.iter().rev().map(|n| *n as u64).collect(),
        }
    }

    /// Whether the tensor takes the type that the user asks for: matrices do, vectors stay F32.
    pub fn quantisable(&self) -> bool {
        self.shape.len() > 1 && !self.always_f32
    }
}

/// What happens to a tensor's elements between the checkpoint and the GGUF file, after adapters are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// Gemma's norms multiply by one more than their weight; llama.cpp's multiply by the weight.
    PlusOne,
}

impl Change {
    /// From the checkpoint to the GGUF file.
    pub fn apply(self, values: &mut [f32]) {
        if self == Self::PlusOne {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
    }

    /// From the GGUF file to the checkpoint. What [`apply`](Self::apply) makes of that is the file's value again;
    /// the bits that it rounded away are gone.
    pub fn undo(self, values: &mut [f32]) {
        if self == Self::PlusOne {
            values.iter_mut().for_each(|value| *value -= 1.0);
        }
    }
}

/// A tensor that stands only in the GGUF file. It is F32 and has one dimension.
#[derive(Debug, Clone, PartialEq)]
pub struct ExtraTensor {
    /// The name in the GGUF file.
    pub gguf: String,
    /// The elements.
    pub values: Vec<f32>,
}

/// What most architectures have for [`Architecture::extra_tensors`].
fn no_extra_tensors(_: &Map<String, Json>) -> Result<Vec<ExtraTensor>, ArchError> {
    Ok(Vec::new())
}

/// The order of a tensor's rows in the GGUF file, given those of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// The same.
    Same,
    /// Hugging Face rotates the first half of a head against the second half, the original llama and llama.cpp
    /// rotate neighbours: within each head of `head_dim` rows, row `2j + p` of the GGUF file is row
    /// `p·head_dim/2 + j` of the checkpoint.
    Interleaved {
        /// The number of rows of a head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The row of the checkpoint that stands at `row` in the GGUF file.
    pub fn to_hf(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + (within % 2) * (head_dim / 2) + within / 2
            }
        }
    }

    /// The row of the GGUF file that stands at `row` in the checkpoint.
    pub fn to_gguf(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + 2 * (within % (head_dim / 2)) + within / (head_dim / 2)
            }
        }
    }
}

/// What can be wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchError {
    /// No architecture of this name is built.
    #[error("the architecture {name} is not supported\nhint: built so far: {}", built())]
    Unknown {
        /// The name that was found.
        name: String,
    },
    /// A key of `config.json` is missing or cannot be used.
    #[error("config.json: {key} {why}")]
    Config {
        /// The key.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// A key of the GGUF file is missing or cannot be used.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The model has something that is not built for this architecture.
    #[error("{0}")]
    Unsupported(String),
}

fn built() -> String {
    let names: Vec<_> = ALL
        .iter()
        .map(|arch| format!("{} ({})", arch.name, arch.hugging_face.join(", ")))
        .collect();
    names.join("; ")
}

/// The architecture with this name in a GGUF file.
pub fn of_gguf(name: &str) -> Result<&'static Architecture, ArchError> {
    ALL.iter()
        .find(|arch| arch.name == name)
        .copied()
        .ok_or_else(|| ArchError::Unknown {
            name: name.to_owned(),
        })
}

/// The architecture of a GGUF file, and its keys as `config.json`. Refuses keys that this does not carry over.
pub fn read(gguf: &Gguf) -> Result<(&'static Architecture, Map<String, Json>), ArchError> {
    let arch = of_gguf(gguf.string("general.architecture")?)?;
    let config = (arch.config)(gguf)?;
    keys::check(arch, gguf, &config)?;
    Ok((arch, config))
}

/// The architecture that a `config.json` names.
pub fn of_config(config: &Map<String, Json>) -> Result<&'static Architecture, ArchError> {
    let name = config
        .get("architectures")
        .and_then(|names| names.get(0))
        .and_then(Json::as_str)
        .ok_or_else(|| ArchError::Config {
            key: "architectures".into(),
            why: "names no architecture".into(),
        })?;
    if config.contains_key("text_config") {
        return Err(ArchError::Config {
            key: "text_config".into(),
            why: format!(
                "makes it a model of several modalities ({name}), of which only text is built\nhint: save its language \
                 model alone: transformers' Gemma3ForCausalLM reads such a checkpoint and saves the text model"
            ),
        });
    }
    ALL.iter()
        .find(|arch| arch.hugging_face.contains(&name))
        .copied()
        .ok_or_else(|| ArchError::Unknown {
            name: name.to_owned(),
        })
}

/// Reads numbers out of `config.json`.
pub(crate) struct Config<'a>(pub &'a Map<String, Json>);

impl Config<'_> {
    /// A key's value; `null` counts as missing.
    pub(crate) fn get(&self, key: &str) -> Option<&Json> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn error(&self, key: &str, why: impl Into<String>) -> ArchError {
        ArchError::Config {
            key: key.to_owned(),
            why: why.into(),
        }
    }

    /// A whole number from 1 to 2³¹.
    pub(crate) fn size(&self, key: &str) -> Result<usize, ArchError> {
        self.size_opt(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    pub(crate) fn size_opt(&self, key: &str) -> Result<Option<usize>, ArchError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(n) if (1..=1 << 31).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.error(key, format!("is {value}, not a size"))),
        }
    }

    pub(crate) fn number_opt(&self, key: &str) -> Result<Option<f64>, ArchError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(n) if n.is_finite() => Ok(Some(n)),
            _ => Err(self.error(key, format!("is {value}, not a number"))),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<bool, ArchError> {
        match self.get(key) {
            None => Ok(false),
            Some(Json::Bool(value)) => Ok(*value),
            Some(value) => Err(self.error(key, format!("is {value}, not true or false"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_row_orders_undo_each_other() {
        let order = RowOrder::Interleaved { head_dim: 6 };
        let mapped: Vec<_> = (0..12).map(|row| order.to_hf(row)).collect();
        assert_eq!(mapped, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        for row in 0..60 {
            assert_eq!(order.to_gguf(order.to_hf(row)), row);
        }
    }
}
