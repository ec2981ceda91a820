//! A PEFT adapter becomes a GGUF adapter, which llama.cpp puts on a running model.
//!
//! llama.cpp knows one alpha for the whole file and divides it by each tensor's own rank. Rank-stabilised scales and
//! patterns are folded into B, so that it computes what PEFT computes. Source: llama.cpp src/llama-adapter.cpp
//! (`llama_adapter_lora_init_impl`), src/llama-graph.cpp (`build_lora_mm`, `build_inp_embd`).

use std::path::{Path, PathBuf};

use super::{AdapterError, LoraModule, PeftAdapter};
use crate::arch::{ArchError, Architecture, TensorRule};
use crate::checksum;
use crate::gguf::{FilesWriter, GgufError, Header, TensorPlan, TensorType, Value};
use crate::merge::{Merge, MergeError, ScaledAdapter};
use crate::model::SourceModel;
use crate::quantize::{self, QuantizeError};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufAdapterError {
    /// The adapter has a part that a GGUF adapter cannot have.
    #[error(
        "{source}\nhint: a GGUF adapter holds plain LoRA only; `pipit-convert model CHECKPOINT --adapter DIR` merges all of it"
    )]
    Beyond {
        /// The part.
        source: AdapterError,
    },
    /// Embeddings that are the output too: llama.cpp would take the adapter of the one for the other.
    #[error(
        "{adapter} adapts {module}, and embeddings and output of the base are one tensor\nhint: `pipit-convert model CHECKPOINT --adapter DIR` makes two of it and merges"
    )]
    Tied {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The module.
        module: String,
    },
    /// The adapter does not fit the base.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The base's configuration does not make sense.
    #[error("{path}: {source}")]
    Arch {
        /// The base.
        path: PathBuf,
        /// Why.
        source: ArchError,
    },
    /// A matrix does not fit the type that was asked for.
    #[error("tensor {tensor}: {source}")]
    Quantize {
        /// The tensor.
        tensor: String,
        /// Why.
        source: QuantizeError,
    },
    /// A file cannot be read for its checksum.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A GGUF adapter, whole in memory: adapters are small.
#[derive(Debug)]
pub struct GgufAdapter {
    /// The header of the file.
    pub header: Header,
    tensors: Vec<Vec<u8>>,
}

/// One matrix on its way.
struct Matrix {
    name: String,
    columns: usize,
    values: Vec<f32>,
}

impl GgufAdapter {
    /// Makes the file of `scaled.adapter` for `base`, with matrices of type `kind`. The scale is folded in.
    pub fn new(
        scaled: &ScaledAdapter,
        base: &SourceModel,
        kind: TensorType,
    ) -> Result<Self, GgufAdapterError> {
        let adapter = &scaled.adapter;
        if let Some(source) = beyond(adapter) {
            return Err(GgufAdapterError::Beyond { source });
        }
        let arch = base.architecture().map_err(|source| GgufAdapterError::Arch {
            path: base.path().to_path_buf(),
            source,
        })?;
        // What fits the merge fits the file; an adapter that unties the base does not.
        Merge::new(std::slice::from_ref(scaled), arch, base.config())?;
        let rules = (arch.tensors)(base.config()).map_err(MergeError::from)?;
        check_tied(adapter, &rules)?;
        // llama.cpp takes an alpha of 0 for a scale of 1.
        let alpha = match adapter.config().lora_alpha as f32 {
            0.0 => 1.0,
            alpha => alpha,
        };
        let mut header = Header {
            metadata: keys(adapter, arch, alpha),
            tensors: Vec::new(),
        };
        header.metadata.extend(provenance(adapter, base)?);
        let mut tensors = Vec::new();
        for rule in &rules {
            let module = rule
                .hf
                .strip_suffix(".weight")
                .and_then(|name| adapter.module(name));
            let Some(module) = module else { continue };
            for matrix in matrices(rule, module, scaled.scale, alpha) {
                let mut bytes = Vec::new();
                let Matrix {
                    name,
                    columns,
                    values,
                } = matrix;
                quantize::quantize(kind, &values, columns, None, &mut bytes).map_err(|source| {
                    GgufAdapterError::Quantize {
                        tensor: name.clone(),
                        source,
                    }
                })?;
                header.tensors.push(TensorPlan {
                    name,
                    dimensions: vec![columns as u64, (values.len() / columns.max(1)) as u64],
                    kind,
                });
                tensors.push(bytes);
            }
        }
        Ok(Self { header, tensors })
    }

    /// Writes the file, whole or not at all. Returns its size in bytes.
    pub fn write(&self, path: &Path) -> Result<u64, GgufAdapterError> {
        let format = |error: GgufError| GgufAdapterError::Write {
            path: path.to_path_buf(),
            source: error.into(),
        };
        let mut writer = FilesWriter::create(path, &self.header, None).map_err(format)?;
        for (plan, bytes) in self.header.tensors.iter().zip(&self.tensors) {
            writer.append(&plan.name, bytes).map_err(format)?;
        }
        let files = writer.commit().map_err(format)?;
        Ok(files.iter().map(|file| file.bytes).sum())
    }
}

/// What stands in the way: all that is not a pair of matrices. Embeddings are allowed.
fn beyond(adapter: &PeftAdapter) -> Option<AdapterError> {
    match adapter.beyond_plain() {
        Some(AdapterError::Unsupported { key, .. }) if key.ends_with(".lora_embedding_A") => None,
        other => other,
    }
}

/// Where embeddings and output are one tensor, llama.cpp finds the adapter of the embeddings when it computes the
/// output, and has no tensor for that of the output.
fn check_tied(adapter: &PeftAdapter, rules: &[TensorRule]) -> Result<(), GgufAdapterError> {
    if rules.iter().any(|rule| rule.gguf == "output.weight") {
        return Ok(());
    }
    let shared = |name: &&String| name.as_str() == "lm_head" || name.ends_with("embed_tokens");
    match adapter.modules().keys().find(shared) {
        None => Ok(()),
        Some(module) => Err(GgufAdapterError::Tied {
            adapter: adapter.dir().to_path_buf(),
            module: module.clone(),
        }),
    }
}

/// A and B as llama.cpp wants them: `[rank, n_in]` and `[n_out, rank]`, B's rows in the order of the GGUF file; for
/// embeddings `[n_out, rank]` and `[n_in, rank]`, because it looks rows up in A there.
fn matrices(rule: &TensorRule, module: &LoraModule, scale: f32, alpha: f32) -> [Matrix; 2] {
    let rank = module.rank;
    let fold = scale * module.scale * rank as f32 / alpha;
    let b = (0..module.n_out).flat_map(|row| &module.lora_b[rule.rows.to_hf(row) * rank..][..rank]);
    let b: Vec<f32> = b.map(|value| value * fold).collect();
    let name = |which: &str| format!("{}.{which}", rule.gguf);
    let matrix = |which, columns, values| Matrix {
        name: name(which),
        columns,
        values,
    };
    if module.embedding {
        let columns = 0..module.n_in;
        let a = columns.flat_map(|at| module.lora_a.iter().skip(at).step_by(module.n_in).copied());
        return [matrix("lora_a", rank, b), matrix("lora_b", rank, a.collect())];
    }
    [
        matrix("lora_a", module.n_in, module.lora_a.clone()),
        matrix("lora_b", rank, b),
    ]
}

fn keys(adapter: &PeftAdapter, arch: &Architecture, alpha: f32) -> Vec<(String, Value)> {
    let mut keys: Vec<(String, Value)> = vec![
        ("general.architecture".into(), arch.name.into()),
        ("general.type".into(), "adapter".into()),
    ];
    let name = |path: &Path| {
        let name = path.file_name()?.to_string_lossy().into_owned();
        Some(name)
    };
    if let Some(name) = adapter.dir().canonicalize().ok().as_deref().and_then(name) {
        keys.push(("general.name".into(), name.into()));
    }
    // A path says more of its owner's machine than of the model: its last part is the name.
    let base = adapter.config().base_model_name_or_path.as_deref();
    if let Some(base) = base.map(Path::new).and_then(name) {
        keys.push(("general.base_model.count".into(), 1u32.into()));
        keys.push(("general.base_model.0.name".into(), base.into()));
    }
    keys.push(("adapter.type".into(), "lora".into()));
    keys.push(("adapter.lora.alpha".into(), alpha.into()));
    keys
}

/// `pipit.*`: which adapter this is, and which base it belongs to. A base that pipit-convert made has the same sums in
/// its `pipit.source.sha256`.
fn provenance(adapter: &PeftAdapter, base: &SourceModel) -> Result<Vec<(String, Value)>, GgufAdapterError> {
    let sum = |path: &Path| {
        checksum::sha256(path).map_err(|source| GgufAdapterError::Read {
            path: path.to_path_buf(),
            source,
        })
    };
    let mut names = Vec::new();
    let mut sums = Vec::new();
    for path in base.weight_files() {
        let name = path.file_name().unwrap_or_default();
        names.push(name.to_string_lossy().into_owned());
        sums.push(sum(&path)?);
    }
    let weights = sum(&PeftAdapter::weights_path(adapter.dir()))?;
    Ok(vec![
        ("pipit.version".into(), env!("CARGO_PKG_VERSION").into()),
        (
            "pipit.adapter.files".into(),
            vec!["adapter_model.safetensors".to_owned()].into(),
        ),
        ("pipit.adapter.sha256".into(), vec![weights].into()),
        ("pipit.base.files".into(), names.into()),
        ("pipit.base.sha256".into(), sums.into()),
    ])
}
