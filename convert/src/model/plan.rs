//! The plan: every tensor's name, type, shape and place, before a weight is touched.

use std::path::Path;

use super::{ModelError, Provenance, SourceModel, general};
use crate::arch::{Architecture, TensorRule};
use crate::gguf::{Array, GgufError, Header, TensorPlan, TensorType, Value};
use crate::merge::{Merge, ScaledAdapter};
use crate::quantize::{Candidate, Choice, FileType, Importance, ModelFacts, QuantizeError, Recipe, Repack};

/// What the program and the libraries take before they read anything. Measured with `/usr/bin/time`.
const PROGRAM_MEMORY: u64 = 20 << 20;

/// What a token takes in the vocabulary, in the header, and in both tokenizers of the proof. Measured on Gemma 3's
/// 262144 (591 MiB); byte-level tokens take less.
const TOKEN_MEMORY: u64 = 2200;

/// All that is known before a tensor is touched.
#[derive(Debug)]
pub struct Plan<'a> {
    pub(super) model: &'a SourceModel,
    pub(super) merge: Merge<'a>,
    pub(super) jobs: Vec<Job<'a>>,
    /// The header of the file.
    pub header: Header,
    /// The architecture.
    pub architecture: &'static Architecture,
}

/// One tensor on its way.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) source: Source,
    pub(super) choice: Choice,
    /// The weight of each column, for the kernel.
    pub(super) importance: Option<&'a [f32]>,
    /// The length of a row, and the number of rows, as they are streamed.
    pub(super) columns: usize,
    pub(super) rows: usize,
}

#[derive(Debug)]
pub(super) enum Source {
    Checkpoint(TensorRule),
    Extra { gguf: String, values: Vec<f32> },
}

impl Source {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Checkpoint(rule) => &rule.gguf,
            Self::Extra { gguf, .. } => gguf,
        }
    }

    /// The dimensions in ggml's order.
    fn dimensions(&self) -> Vec<u64> {
        match self {
            Self::Checkpoint(rule) => rule.dimensions(),
            Self::Extra { values, .. } => vec![values.len() as u64],
        }
    }

    /// Rows and columns, as they are streamed.
    fn rows_and_columns(&self) -> (usize, usize) {
        match self {
            Self::Extra { values, .. } => (1, values.len()),
            Self::Checkpoint(rule) => rule.rows_and_columns(),
        }
    }
}

/// One row of the plan's table.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct PlannedTensor {
    /// The name in the GGUF file.
    pub name: String,
    /// The name in the checkpoint, if it comes from there.
    pub from: Option<String>,
    /// The dimensions in ggml's order.
    pub dimensions: Vec<u64>,
    /// The type.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The type that the recipe asks for, before the shape is looked at.
    pub asked: &'static str,
    /// The rule of the recipe that asks for it; nothing where it is the recipe's own type.
    pub rule: Option<String>,
    /// Why the type is not the one that was asked for, if it is not.
    pub fallback: Option<String>,
    /// The number of bytes.
    pub bytes: u64,
    /// Bits per weight.
    pub bits: f64,
    /// Whether ARM cores with dotprod rearrange it; nothing where no matrix is multiplied with it.
    pub repacked: Option<Repack>,
    /// Whether an adapter is merged into it.
    pub merged: bool,
}

impl<'a> Plan<'a> {
    /// Plans the file: reads configuration and vocabulary, pairs every tensor of the checkpoint with its place, and
    /// chooses its type by the recipe.
    pub fn new(
        model: &'a SourceModel,
        adapters: &'a [ScaledAdapter],
        recipe: &'a Recipe,
    ) -> Result<Self, ModelError> {
        let arch_error = |source| model.arch_error(source);
        let (arch, _) = model.rules()?;
        let merge = Merge::new(adapters, arch, model.config())?;
        let (config, rules) = (merge.config(), merge.rules().to_vec());
        let extra = (arch.extra_tensors)(config).map_err(arch_error)?;
        let extra = extra.into_iter().map(|tensor| Source::Extra {
            gguf: tensor.gguf,
            values: tensor.values,
        });
        let sources: Vec<_> = extra.chain(rules.into_iter().map(Source::Checkpoint)).collect();
        let own_keys = (arch.metadata)(config).map_err(arch_error)?;
        let jobs = jobs(model, sources, recipe, &facts(arch.name, &own_keys))?;
        let parameters = jobs.iter().map(|job| (job.rows * job.columns) as u64).sum();
        let mut keys = general::general(model, arch, recipe.file, parameters)?;
        keys.extend(own_keys);
        keys.extend(
            recipe
                .importance()
                .map(Importance::to_metadata)
                .unwrap_or_default(),
        );
        let name = keys.iter().find(|(key, _)| key == "general.name");
        let name = name.and_then(|(_, name)| name.as_str()).unwrap_or_default();
        let tokenizer = model.tokenizer(name, &merge)?;
        keys.extend(tokenizer);
        let tensors = jobs.iter().map(Job::plan).collect();
        Ok(Self {
            model,
            merge,
            jobs,
            header: Header {
                metadata: keys,
                tensors,
            },
            architecture: arch,
        })
    }

    /// The same, with the `pipit.*` keys. The files are read for their checksums while the tokenizer is proved, which
    /// is also what brings the weights into the system's cache.
    pub fn with_provenance(
        model: &'a SourceModel,
        adapters: &'a [ScaledAdapter],
        recipe: &'a Recipe,
        provenance: &Provenance<'_>,
    ) -> Result<Self, ModelError> {
        let (plan, keys) = rayon::join(|| Self::new(model, adapters, recipe), || provenance.keys(model));
        let mut plan = plan?;
        plan.header.metadata.extend(keys?);
        Ok(plan)
    }

    /// Adds the `pipit.*` keys: what this was made of and how. Reads all the files once.
    pub fn add_provenance(&mut self, provenance: &Provenance<'_>) -> Result<(), ModelError> {
        self.header.metadata.extend(provenance.keys(self.model)?);
        Ok(())
    }

    /// What will be written, tensor by tensor.
    pub fn table(&self) -> Vec<PlannedTensor> {
        let tied = !self.jobs.iter().any(|job| job.name() == "output.weight");
        let rows = self.jobs.iter().zip(&self.header.tensors);
        rows.map(|(job, tensor)| {
            let from = match &job.source {
                Source::Checkpoint(rule) => Some(rule.hf.clone()),
                Source::Extra { .. } => None,
            };
            let bytes = tensor.size().unwrap_or(0);
            let Choice {
                kind, asked, rule, ..
            } = &job.choice;
            PlannedTensor {
                name: tensor.name.clone(),
                merged: from.as_deref().is_some_and(|name| self.merge.changes(name)),
                from,
                dimensions: tensor.dimensions.clone(),
                kind: kind.name(),
                asked: asked.name(),
                rule: rule.clone(),
                fallback: job.choice.fallback(job.columns as u64),
                bytes,
                bits: bytes as f64 * 8.0 / (job.rows * job.columns).max(1) as f64,
                repacked: Repack::of(&tensor.name, &tensor.dimensions, *kind, tied),
            }
        })
        .collect()
    }

    /// About the most memory that writing will take, in bytes: slabs of rows, which do not grow with the model, and
    /// the vocabulary, which is proved. Merged adapters come on top.
    pub fn peak_memory(&self) -> u64 {
        let mut keys = self.header.metadata.iter();
        let tokens = keys.find(|(key, _)| key == "tokenizer.ggml.tokens");
        let tokens = match tokens {
            Some((_, Value::Array(tokens))) => tokens.len() as u64,
            _ => 0,
        };
        PROGRAM_MEMORY + tokens * TOKEN_MEMORY + self.slab_memory()
    }

    /// The folder or file that the model comes from.
    pub fn source(&self) -> &Path {
        self.model.path()
    }

    /// The type that keeps what the model's own matrices are: theirs, or F32 where they differ, are quantised or have
    /// an adapter merged.
    pub fn own_type(&self) -> Result<FileType, ModelError> {
        let mut found = None;
        for job in &self.jobs {
            let Source::Checkpoint(rule) = &job.source else {
                continue;
            };
            if job.rows == 1 {
                continue;
            }
            let kind = match self.model.stored_type(rule)? {
                TensorType::F16 if !self.merge.changes(&rule.hf) => FileType::F16,
                TensorType::BF16 if !self.merge.changes(&rule.hf) => FileType::BF16,
                _ => return Ok(FileType::F32),
            };
            if found.is_some_and(|found| found != kind) {
                return Ok(FileType::F32);
            }
            found = Some(kind);
        }
        Ok(found.unwrap_or(FileType::F32))
    }

    /// The size that the file will have.
    pub fn file_size(&self) -> Result<u64, GgufError> {
        self.header.file_size()
    }
}

impl Job<'_> {
    pub(super) fn name(&self) -> &str {
        self.source.name()
    }

    fn plan(&self) -> TensorPlan {
        TensorPlan {
            name: self.name().to_owned(),
            dimensions: self.source.dimensions(),
            kind: self.choice.kind,
        }
    }
}

/// The type that a tensor gets.
#[derive(Debug, Clone, PartialEq)]
pub struct ChosenType<'a> {
    /// The name in the checkpoint.
    pub name: String,
    /// The type.
    pub kind: TensorType,
    /// The weight of every column, for the kernel.
    pub importance: Option<&'a [f32]>,
}

/// The types that the tensors of a checkpoint get, as [`Plan`] has them; a vocabulary is not needed for it.
pub fn tensor_types<'a>(model: &SourceModel, recipe: &'a Recipe) -> Result<Vec<ChosenType<'a>>, ModelError> {
    let (arch, rules) = model.rules()?;
    let keys = (arch.metadata)(model.config()).map_err(|source| model.arch_error(source))?;
    let sources = rules.into_iter().map(Source::Checkpoint).collect();
    let jobs = jobs(model, sources, recipe, &facts(arch.name, &keys))?;
    let types = jobs.into_iter().filter_map(|job| match job.source {
        Source::Checkpoint(rule) => Some(ChosenType {
            name: rule.hf,
            kind: job.choice.kind,
            importance: job.importance,
        }),
        Source::Extra { .. } => None,
    });
    Ok(types.collect())
}

/// Every tensor with its type.
fn jobs<'a>(
    model: &SourceModel,
    sources: Vec<Source>,
    recipe: &'a Recipe,
    facts: &ModelFacts,
) -> Result<Vec<Job<'a>>, ModelError> {
    let dimensions: Vec<_> = sources.iter().map(Source::dimensions).collect();
    let mut candidates = Vec::with_capacity(sources.len());
    for (source, dimensions) in sources.iter().zip(&dimensions) {
        let (stored, always_f32) = match source {
            Source::Checkpoint(rule) => (model.stored_type(rule)?, rule.always_f32),
            Source::Extra { .. } => (TensorType::F32, true),
        };
        candidates.push(Candidate {
            name: source.name(),
            dimensions,
            stored,
            always_f32,
        });
    }
    let choices = recipe.choose(facts, &candidates).map_err(ModelError::Recipe)?;
    let jobs = sources.into_iter().zip(choices).map(|(source, choice)| {
        let (rows, columns) = source.rows_and_columns();
        let importance = importance(recipe, &choice, source.name(), columns);
        Ok(Job {
            importance: importance.map_err(|error| ModelError::Quantize {
                tensor: source.name().to_owned(),
                source: error,
            })?,
            source,
            choice,
            columns,
            rows,
        })
    });
    jobs.collect()
}

/// The weights of a tensor's columns, which its type may need.
fn importance<'a>(
    recipe: &'a Recipe,
    choice: &Choice,
    name: &str,
    columns: usize,
) -> Result<Option<&'a [f32]>, QuantizeError> {
    let kind = choice.kind.name();
    match recipe.importance() {
        None if choice.needs_imatrix => Err(QuantizeError::NeedsImatrix { kind }),
        Some(all) if choice.kind.block_elements() > 1 => match all.of(name, columns)? {
            None if choice.needs_imatrix => Err(QuantizeError::NotInImatrix { kind }),
            weights => Ok(weights),
        },
        _ => Ok(None),
    }
}

/// What the mixes want to know, out of the keys that the file will have.
fn facts(arch: &str, keys: &[(String, Value)]) -> ModelFacts {
    let get = |key: &str| {
        let key = format!("{arch}.{key}");
        keys.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
    };
    // One number for all layers, or one for each.
    let per_layer = |key: &str| -> Vec<u64> {
        match get(key) {
            Some(Value::Array(Array::U32(values))) => values.iter().map(|n| u64::from(*n)).collect(),
            Some(Value::Array(Array::I32(values))) => values.iter().map(|n| (*n).max(0) as u64).collect(),
            Some(value) => value.as_u64().into_iter().collect(),
            None => Vec::new(),
        }
    };
    let heads = per_layer("attention.head_count");
    let shared = match per_layer("attention.head_count_kv") {
        none if none.is_empty() => heads.clone(),
        some => some,
    };
    let first = |values: &[u64]| values.first().copied().unwrap_or(0);
    ModelFacts {
        arch: arch.to_owned(),
        layers: get("block_count").and_then(Value::as_u64).unwrap_or(0) as usize,
        gqa: first(&heads).checked_div(first(&shared)).unwrap_or(0) as usize,
        grouped: first(&heads) != first(&shared),
    }
}
