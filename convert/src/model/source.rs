//! Where a model comes from: a checkpoint folder, or a GGUF file (whose blocks become numbers again).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::ModelError;
use crate::arch::{self, Architecture, RowOrder, TensorRule};
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, TensorView};
use crate::gguf::{Gguf, TensorInfo, TensorType, Value};
use crate::import;
use crate::merge::Merge;
use crate::quantize;
use crate::vocab::{self, Vocab};

/// An opened model: its configuration, and weights that stay on disk until they are asked for.
#[derive(Debug)]
pub struct SourceModel {
    path: PathBuf,
    config: Map<String, Json>,
    pub(super) weights: Weights,
    /// Whether the tokenizer is compared with llama.cpp's.
    proof: bool,
}

#[derive(Debug)]
pub(super) enum Weights {
    Folder(Checkpoint),
    File(Gguf),
}

impl SourceModel {
    /// Opens a checkpoint folder, or a GGUF file.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if !path.is_file() {
            let checkpoint = Checkpoint::open(path)?;
            let config = checkpoint.config().clone();
            return Ok(Self {
                path: path.to_path_buf(),
                config,
                weights: Weights::Folder(checkpoint),
                proof: true,
            });
        }
        let gguf = Gguf::open(path).map_err(import::ImportError::from)?;
        let (_, config) = arch::read(&gguf).map_err(|source| ModelError::Arch {
            path: path.to_path_buf(),
            source,
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            config,
            weights: Weights::File(gguf),
            proof: true,
        })
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `config.json`, or what it would be.
    pub fn config(&self) -> &Map<String, Json> {
        &self.config
    }

    /// The architecture.
    pub fn architecture(&self) -> Result<&'static Architecture, arch::ArchError> {
        arch::of_config(&self.config)
    }

    /// The files that hold the weights.
    pub fn weight_files(&self) -> Vec<PathBuf> {
        match &self.weights {
            Weights::File(_) => vec![self.path.clone()],
            Weights::Folder(checkpoint) => checkpoint.shard_paths().map(Path::to_path_buf).collect(),
        }
    }

    /// Writes the tokenizer of a folder without comparing llama.cpp with it first.
    pub fn skip_tokenizer_proof(&mut self) {
        self.proof = false;
    }

    /// The `tokenizer.*` keys: those of a folder are proved, those of a GGUF file are copied. `name` is what stands in
    /// `general.name`, `merge` may bring a tokenizer of its own.
    pub(super) fn tokenizer(
        &self,
        name: &str,
        merge: &Merge<'_>,
    ) -> Result<Vec<(String, Value)>, ModelError> {
        let dir = match (merge.vocabulary(), &self.weights) {
            (Some(dir), _) => dir,
            (None, Weights::Folder(checkpoint)) => checkpoint.dir(),
            (None, Weights::File(gguf)) => {
                let rows = self.config.get("vocab_size").and_then(Json::as_u64);
                return Ok(vocab::copied(gguf, rows)?);
            }
        };
        let mut vocab = Vocab::from_folder(dir, merge.config())?;
        let proof = if self.proof {
            vocab.prove(dir, name)?.to_metadata()
        } else {
            Vec::new()
        };
        vocab.warn_of_limits();
        let mut keys = vocab.to_metadata();
        keys.extend(proof);
        Ok(keys)
    }

    /// The architecture, and its rules for the tensors, which are there as it wants them.
    pub(super) fn rules(&self) -> Result<(&'static Architecture, Vec<TensorRule>), ModelError> {
        let arch = self.architecture().map_err(|source| self.arch_error(source))?;
        let rules = (arch.tensors)(&self.config).map_err(|source| self.arch_error(source))?;
        self.check_tensors(arch, &rules)?;
        Ok((arch, rules))
    }

    /// What its architecture says against the configuration.
    pub(super) fn arch_error(&self, source: arch::ArchError) -> ModelError {
        ModelError::Arch {
            path: self.path.clone(),
            source,
        }
    }

    /// Every tensor that the rules name must be there in its shape, and no other may be.
    fn check_tensors(&self, arch: &'static Architecture, rules: &[TensorRule]) -> Result<(), ModelError> {
        match &self.weights {
            Weights::Folder(checkpoint) => check_folder(checkpoint, arch, rules),
            Weights::File(gguf) => {
                import::check_tensors(gguf, arch, &self.config, rules)?;
                let quantised = |kind| ![TensorType::F32, TensorType::F16, TensorType::BF16].contains(&kind);
                if let Some(tensor) = gguf.tensors().iter().find(|tensor| quantised(tensor.kind)) {
                    tracing::warn!(
                        "{} is quantised already ({} is {}): its weights are rounded a second time",
                        self.path.display(),
                        tensor.name,
                        tensor.kind
                    );
                }
                Ok(())
            }
        }
    }

    /// The type that a tensor is stored in; F32 where GGUF has no such type.
    pub(super) fn stored_type(&self, rule: &TensorRule) -> Result<TensorType, ModelError> {
        Ok(match &self.weights {
            Weights::Folder(checkpoint) => match view(checkpoint, rule)?.dtype {
                Dtype::F16 => TensorType::F16,
                Dtype::BF16 => TensorType::BF16,
                _ => TensorType::F32,
            },
            Weights::File(gguf) => info(gguf, rule).map_or(TensorType::F32, |tensor| tensor.kind),
        })
    }

    /// Rows of a tensor in the order of the GGUF file, `columns` elements each, from row `first` on. The elements
    /// are the checkpoint's: the rule's change is not applied yet.
    pub(super) fn read_rows(
        &self,
        rule: &TensorRule,
        first: usize,
        columns: usize,
        values: &mut [f32],
    ) -> Result<(), ModelError> {
        match &self.weights {
            Weights::Folder(checkpoint) => {
                let view = view(checkpoint, rule)?;
                if rule.rows == RowOrder::Same {
                    return Ok(view.read_f32(first * columns, values)?);
                }
                for (row, values) in values.chunks_exact_mut(columns).enumerate() {
                    view.read_f32(rule.rows.to_hf(first + row) * columns, values)?;
                }
                Ok(())
            }
            Weights::File(gguf) => {
                let failed = |source| ModelError::Quantize {
                    tensor: rule.gguf.clone(),
                    source,
                };
                let short = || {
                    failed(quantize::QuantizeError::Row {
                        row: columns,
                        kind: "the file",
                    })
                };
                let tensor = info(gguf, rule).ok_or_else(short)?;
                let row = tensor.kind.row_bytes(columns as u64).ok_or_else(short)? as usize;
                let n = values.len() / columns.max(1);
                let data = gguf
                    .data(tensor)
                    .get(first * row..(first + n) * row)
                    .ok_or_else(short)?;
                quantize::dequantize(tensor.kind, data, columns, values).map_err(failed)?;
                rule.change.undo(values);
                Ok(())
            }
        }
    }

    /// The blocks of some rows, if the model comes from a file that has the tensor in this very type, and that is
    /// a type of blocks.
    pub(super) fn blocks(
        &self,
        rule: &TensorRule,
        kind: TensorType,
        first: usize,
        rows: usize,
        columns: usize,
    ) -> Option<&[u8]> {
        let Weights::File(gguf) = &self.weights else {
            return None;
        };
        let same = |tensor: &&TensorInfo| tensor.kind == kind && kind.block_elements() > 1;
        let tensor = gguf.tensor(&rule.gguf).filter(same)?;
        let row = kind.row_bytes(columns as u64)? as usize;
        gguf.data(tensor).get(first * row..(first + rows) * row)
    }

    /// Gives the memory back that reading a tensor took; reading it again brings it back.
    pub(super) fn release(&self, rule: &TensorRule) {
        match &self.weights {
            Weights::Folder(checkpoint) => checkpoint.release(&rule.hf),
            Weights::File(gguf) => gguf.release(&rule.gguf),
        }
    }
}

/// The tensor of a rule. An output that the model does not have, because an adapter unties it, is its embeddings.
fn view<'c>(checkpoint: &'c Checkpoint, rule: &TensorRule) -> Result<TensorView<'c>, CheckpointError> {
    let tied = rule.hf == "lm_head.weight" && !checkpoint.contains(&rule.hf);
    checkpoint.tensor(if tied {
        "model.embed_tokens.weight"
    } else {
        &rule.hf
    })
}

/// The same of a GGUF file.
fn info<'g>(gguf: &'g Gguf, rule: &TensorRule) -> Option<&'g TensorInfo> {
    let tied = rule.gguf == "output.weight" && gguf.tensor(&rule.gguf).is_none();
    gguf.tensor(if tied { "token_embd.weight" } else { &rule.gguf })
}

/// Every tensor that the rules name must be there in its shape, and no other may be.
fn check_folder(
    checkpoint: &Checkpoint,
    arch: &'static Architecture,
    rules: &[TensorRule],
) -> Result<(), ModelError> {
    let path = || checkpoint.dir().to_path_buf();
    let missing: Vec<_> = rules
        .iter()
        .filter(|rule| !checkpoint.contains(&rule.hf))
        .map(|rule| rule.hf.clone())
        .collect();
    if !missing.is_empty() {
        let hint = if missing == ["lm_head.weight"] {
            "\nhint: if output and input embeddings are the same, config.json should say \"tie_word_embeddings\": true"
        } else {
            ""
        };
        return Err(ModelError::Missing {
            path: path(),
            arch: arch.name,
            names: missing,
            hint,
        });
    }
    for rule in rules {
        let found = checkpoint.tensor(&rule.hf)?.shape;
        if found != rule.shape {
            return Err(ModelError::Shape {
                path: path(),
                tensor: rule.hf.clone(),
                found: found.to_vec(),
                wanted: rule.shape.clone(),
            });
        }
    }
    let known: BTreeSet<&str> = rules.iter().map(|rule| rule.hf.as_str()).collect();
    let mut unknown = Vec::new();
    for name in checkpoint.names().filter(|name| !known.contains(name)) {
        if !can_be_left_out(checkpoint, name)? {
            unknown.push(name.to_owned());
        }
    }
    if unknown.is_empty() {
        return Ok(());
    }
    Err(ModelError::Unknown {
        path: path(),
        arch: arch.name,
        names: unknown,
    })
}

/// Tensors that say nothing new: frequencies that follow from the configuration, and a copy of tied embeddings.
fn can_be_left_out(checkpoint: &Checkpoint, name: &str) -> Result<bool, ModelError> {
    if name.ends_with(".rotary_emb.inv_freq") {
        return Ok(true);
    }
    if name != "lm_head.weight" {
        return Ok(false);
    }
    let (head, embeddings) = (
        checkpoint.tensor(name)?,
        checkpoint.tensor("model.embed_tokens.weight")?,
    );
    if head.dtype != embeddings.dtype || head.bytes.len() != embeddings.bytes.len() {
        return Ok(false);
    }
    // Piece by piece, so that two tables of embeddings are never in memory as a whole.
    let pieces = head.bytes.chunks(1 << 22).zip(embeddings.bytes.chunks(1 << 22));
    for (head, embeddings) in pieces {
        if head != embeddings {
            return Ok(false);
        }
        checkpoint.release(name);
        checkpoint.release("model.embed_tokens.weight");
    }
    Ok(true)
}
