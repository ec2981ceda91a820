//! A GGUF file becomes a checkpoint folder that transformers loads and pipit-distill trains.
//!
//! Data in: a mapped GGUF file of any tensor types that ggml turns into numbers. Data out: `config.json`,
//! `generation_config.json`, the tokenizer's files and safetensors, one file or shards. Quantised blocks become
//! f32 without loss: every block's value is an f32 already. As f16 or bf16 they are rounded once more.

mod card;
mod gguf_checkpoint;
mod safetensors_file;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

pub use gguf_checkpoint::{GgufCheckpoint, GgufTensor};
use serde_json::{Map, Value as Json, json};

use crate::arch::{self, ArchError, RowOrder, TensorRule};
use crate::gguf::{Gguf, GgufError, TensorInfo, TensorType, Value};
use crate::output::OutputDir;
use crate::progress::Progress;
use crate::quantize::{self, QuantizeError};
use crate::vocab::{Vocab, VocabError};

/// A shard holds at most so many bytes of tensors, unless one tensor alone is larger.
const SHARD_BYTES: u64 = 4_500_000_000;
/// So many elements are in memory at a time, whatever the size of the tensor.
const SLAB_ELEMENTS: usize = 1 << 20;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The file cannot be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The architecture is not built, or its keys do not make sense.
    #[error(transparent)]
    Arch(#[from] ArchError),
    /// The vocabulary is not built, or broken.
    #[error(transparent)]
    Vocab(#[from] VocabError),
    /// The tensors are not those that the keys promise.
    #[error("{path}: tensor {tensor}: {why}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        why: String,
    },
    /// The file holds tensors that its architecture does not know.
    #[error("{path} holds tensors that a {arch} model does not have: {}", names.join(", "))]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The architecture.
        arch: &'static str,
        /// The tensors.
        names: Vec<String>,
    },
    /// A tensor's blocks cannot be turned into the type that was asked for.
    #[error("tensor {tensor}: {source}")]
    Quantize {
        /// The tensor.
        tensor: String,
        /// Why.
        source: QuantizeError,
    },
    /// The system could not write.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The user asked to stop.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Imported {
    /// The architecture.
    pub architecture: &'static str,
    /// The number of tensors.
    pub tensors: usize,
    /// The number of parameters.
    pub parameters: u64,
    /// The number of safetensors files.
    pub shards: usize,
    /// Their bytes, headers not counted.
    pub bytes: u64,
    /// The number of tokens in the vocabulary.
    pub tokens: usize,
}

/// One tensor on its way.
pub(crate) struct Job<'a> {
    rule: &'a TensorRule,
    from: &'a TensorInfo,
}

/// What a file says besides its weights.
struct Described {
    arch: &'static arch::Architecture,
    config: Map<String, Json>,
    /// Name and content of every file of the folder but the weights.
    files: Vec<(String, String)>,
    rules: Vec<TensorRule>,
    tokens: usize,
}

/// Reads the keys of a file, for weights of type `kind`.
fn describe(gguf: &Gguf, kind: TensorType) -> Result<Described, ImportError> {
    let (arch, mut config) = arch::read(gguf)?;
    let vocab = vocab(gguf, &config)?;
    let rules = (arch.tensors)(&config)?;
    let dtype = match kind {
        TensorType::F16 => "float16",
        TensorType::BF16 => "bfloat16",
        _ => "float32",
    };
    // transformers 5 reads `dtype`, older ones read `torch_dtype`.
    config.insert("dtype".into(), json!(dtype));
    config.insert("torch_dtype".into(), json!(dtype));
    if let Some(name) = gguf.get("general.name").and_then(Value::as_str) {
        config.insert("_name_or_path".into(), json!(name));
    }
    let mut generation = generation_config(&vocab);
    config.extend(generation.clone());
    generation.extend(card::sampling(gguf));
    let context = config
        .get("max_position_embeddings")
        .and_then(Json::as_u64)
        .unwrap_or(0);
    let mut files = vocab.to_folder(context);
    files.push((
        "config.json".to_owned(),
        crate::vocab::pretty(&Json::Object(config.clone())),
    ));
    files.push((
        "generation_config.json".to_owned(),
        crate::vocab::pretty(&Json::Object(generation)),
    ));
    files.extend(card::model_card(gguf).map(|text| ("README.md".to_owned(), text)));
    Ok(Described {
        arch,
        config,
        files,
        rules,
        tokens: vocab.tokens.len(),
    })
}

fn write_files(files: &[(String, String)], dir: &Path) -> std::io::Result<()> {
    for (name, text) in files {
        let path = dir.join(name);
        if let Some(above) = path.parent() {
            std::fs::create_dir_all(above)?;
        }
        std::fs::write(path, text)?;
    }
    Ok(())
}

/// Imports `gguf` as the folder `out`, with weights of type `kind` (F32, F16 or BF16).
pub fn import(
    gguf: &Gguf,
    out: &Path,
    kind: TensorType,
    progress: &dyn Progress,
) -> Result<Imported, ImportError> {
    let described = describe(gguf, kind)?;
    let jobs = check_tensors(gguf, described.arch, &described.config, &described.rules)?;
    let write = |source| ImportError::Write {
        path: out.to_path_buf(),
        source,
    };
    let dir = OutputDir::create(out).map_err(write)?;
    write_files(&described.files, dir.path()).map_err(write)?;
    let total = jobs.iter().map(|job| bytes(job.rule, kind)).sum();
    progress.start("importing", total);
    let shards = write_shards(gguf, &jobs, &dir, kind, progress, &write)?;
    let parameters = jobs.iter().map(|job| job.from.elements()).sum();
    if progress.cancelled() {
        return Err(ImportError::Interrupted);
    }
    dir.commit().map_err(write)?;
    Ok(Imported {
        architecture: described.arch.name,
        tensors: jobs.len(),
        parameters,
        shards,
        bytes: total,
        tokens: described.tokens,
    })
}

/// The vocabulary, which must have a token for every row of the embeddings.
pub(crate) fn vocab(gguf: &Gguf, config: &Map<String, Json>) -> Result<Vocab, ImportError> {
    let vocab = Vocab::from_gguf(gguf)?;
    if config.get("vocab_size").and_then(Json::as_u64) == Some(vocab.tokens.len() as u64) {
        return Ok(vocab);
    }
    Err(ImportError::Tensor {
        path: gguf.path().to_path_buf(),
        tensor: "token_embd.weight".into(),
        why: format!(
            "it has {} rows, and there are {} tokens",
            config.get("vocab_size").unwrap_or(&Json::Null),
            vocab.tokens.len()
        ),
    })
}

/// Pairs the tensors that the configuration promises with those of the file; the rest must be accounted for.
pub(crate) fn check_tensors<'a>(
    gguf: &'a Gguf,
    arch: &'static arch::Architecture,
    config: &Map<String, Json>,
    rules: &'a [TensorRule],
) -> Result<Vec<Job<'a>>, ImportError> {
    let mut jobs = Vec::new();
    for rule in rules {
        let from = gguf.tensor(&rule.gguf).ok_or_else(|| GgufError::MissingTensor {
            path: gguf.path().to_path_buf(),
            tensor: rule.gguf.clone(),
        })?;
        let dimensions = rule.dimensions();
        // Trailing dimensions of 1 are the same shape.
        let found = from
            .dimensions
            .iter()
            .rposition(|n| *n != 1)
            .map_or(&[][..], |at| &from.dimensions[..=at]);
        let wanted = dimensions
            .iter()
            .rposition(|n| *n != 1)
            .map_or(&[][..], |at| &dimensions[..=at]);
        if found != wanted {
            return Err(ImportError::Tensor {
                path: gguf.path().to_path_buf(),
                tensor: rule.gguf.clone(),
                why: format!(
                    "its shape is {:?}, where the keys promise {dimensions:?}",
                    from.dimensions
                ),
            });
        }
        jobs.push(Job { rule, from });
    }
    let extra: Vec<_> = (arch.extra_tensors)(config)?
        .into_iter()
        .map(|tensor| tensor.gguf)
        .collect();
    let known: BTreeSet<&str> = rules
        .iter()
        .map(|rule| &rule.gguf)
        .chain(&extra)
        .map(String::as_str)
        .collect();
    let names: Vec<_> = gguf
        .tensors()
        .iter()
        .map(|tensor| tensor.name.clone())
        .filter(|name| !known.contains(name.as_str()))
        .collect();
    if !names.is_empty() {
        return Err(ImportError::Unknown {
            path: gguf.path().to_path_buf(),
            arch: arch.name,
            names,
        });
    }
    Ok(jobs)
}

/// The special tokens that generation needs, by number.
fn generation_config(vocab: &Vocab) -> Map<String, Json> {
    let mut config = Map::new();
    let special = &vocab.special;
    if let Some(bos) = special.bos {
        config.insert("bos_token_id".into(), json!(bos));
    }
    match special.ends().as_slice() {
        [] => None,
        [end] => config.insert("eos_token_id".into(), json!(end)),
        ends => config.insert("eos_token_id".into(), json!(ends)),
    };
    if let Some(pad) = special.pad {
        config.insert("pad_token_id".into(), json!(pad));
    }
    config
}

fn bytes(rule: &TensorRule, kind: TensorType) -> u64 {
    rule.shape.iter().product::<usize>() as u64 * kind.block_bytes()
}

fn write_shards(
    gguf: &Gguf,
    jobs: &[Job<'_>],
    dir: &OutputDir,
    kind: TensorType,
    progress: &dyn Progress,
    write: &dyn Fn(std::io::Error) -> ImportError,
) -> Result<usize, ImportError> {
    let mut shards: Vec<Vec<&Job<'_>>> = vec![Vec::new()];
    let mut room = SHARD_BYTES;
    for job in jobs {
        let size = bytes(job.rule, kind);
        if size > room && shards.last().is_some_and(|shard| !shard.is_empty()) {
            shards.push(Vec::new());
            room = SHARD_BYTES;
        }
        room = room.saturating_sub(size);
        if let Some(shard) = shards.last_mut() {
            shard.push(job);
        }
    }
    let mut index = Map::new();
    for (at, shard) in shards.iter().enumerate() {
        let name = if shards.len() == 1 {
            "model.safetensors".to_owned()
        } else {
            format!("model-{:05}-of-{:05}.safetensors", at + 1, shards.len())
        };
        let mut file = safetensors_file::create(
            &dir.path().join(&name),
            kind,
            shard
                .iter()
                .map(|job| (job.rule.hf.as_str(), job.rule.shape.as_slice())),
        )
        .map_err(write)?;
        for job in shard {
            write_tensor(gguf, job, kind, &mut file, progress, write)?;
            index.insert(job.rule.hf.clone(), json!(name));
        }
        std::io::Write::flush(&mut file).map_err(write)?;
    }
    if shards.len() > 1 {
        let total: u64 = jobs.iter().map(|job| bytes(job.rule, kind)).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": index});
        std::fs::write(
            dir.path().join("model.safetensors.index.json"),
            crate::vocab::pretty(&index),
        )
        .map_err(write)?;
    }
    Ok(shards.len())
}

fn write_tensor(
    gguf: &Gguf,
    job: &Job<'_>,
    kind: TensorType,
    file: &mut dyn std::io::Write,
    progress: &dyn Progress,
    write: &dyn Fn(std::io::Error) -> ImportError,
) -> Result<(), ImportError> {
    let failed = |source| ImportError::Quantize {
        tensor: job.rule.gguf.clone(),
        source,
    };
    let (rows, columns) = job.rule.rows_and_columns();
    let data = gguf.data(job.from);
    let slab = (SLAB_ELEMENTS / columns.max(1)).clamp(1, rows.max(1));
    let mut values = vec![0.0; slab * columns];
    let mut encoded = Vec::new();
    for first in (0..rows).step_by(slab) {
        if progress.cancelled() {
            return Err(ImportError::Interrupted);
        }
        let n = slab.min(rows - first);
        let values = &mut values[..n * columns];
        read_rows(job.from.kind, data, job.rule, first, values).map_err(failed)?;
        encoded.clear();
        quantize::quantize(kind, values, columns, None, &mut encoded)
            .map_err(|source| failed(source.after(first * columns)))?;
        file.write_all(&encoded).map_err(write)?;
        progress.advance(encoded.len() as u64);
    }
    Ok(())
}

/// Whole rows of the checkpoint's tensor, from row `first` on, out of the file's blocks `data` of all its rows.
fn read_rows(
    kind: TensorType,
    data: &[u8],
    rule: &TensorRule,
    first: usize,
    values: &mut [f32],
) -> Result<(), QuantizeError> {
    let (rows, columns) = rule.rows_and_columns();
    let row_bytes = kind.row_bytes(columns as u64).unwrap_or(0) as usize;
    if row_bytes * rows != data.len() {
        return Err(QuantizeError::Row {
            row: columns,
            kind: kind.name(),
        });
    }
    if rule.rows == RowOrder::Same {
        let n = values.len() / columns.max(1);
        let data = &data[first * row_bytes..(first + n) * row_bytes];
        quantize::dequantize(kind, data, columns, values)?;
    } else {
        for (row, values) in (first..).zip(values.chunks_exact_mut(columns)) {
            let at = rule.rows.to_gguf(row) * row_bytes;
            quantize::dequantize(kind, &data[at..at + row_bytes], columns, values)?;
        }
    }
    rule.change.undo(values);
    Ok(())
}
