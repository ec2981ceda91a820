//! The weights of an adapter, sorted by what they do: PEFT's names to modules, trained tokens and whole tensors.
//!
//! Source: peft/utils/save_and_load.py (`get_peft_model_state_dict`), peft/tuners/lora/layer.py.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::{AdapterConfig, AdapterError};
use crate::checkpoint::{TensorFiles, TensorView};

/// The adapter of one module: the weight becomes `W + scale · lora_b · lora_a`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraModule {
    /// The inner dimension.
    pub rank: usize,
    /// The length of a row of the weight: the inputs of a linear layer, the width of embeddings.
    pub n_in: usize,
    /// The number of rows of the weight: the outputs of a linear layer, the tokens of embeddings.
    pub n_out: usize,
    /// `[rank, n_in]`, row-major.
    pub lora_a: Vec<f32>,
    /// `[n_out, rank]`, row-major.
    pub lora_b: Vec<f32>,
    /// `alpha / rank`, or `alpha / √rank` with rank-stabilised LoRA, both after the patterns.
    pub scale: f32,
    /// DoRA's lengths: of every row of the weight, or of every column where the module is an embedding.
    pub magnitude: Option<Vec<f32>>,
    /// What `scale` times is added to the module's bias, `[n_out]` (`lora_bias`).
    pub bias: Option<Vec<f32>>,
    /// Whether the module is an embedding. PEFT has its matrices the other way round; here they are as above.
    pub embedding: bool,
}

/// Rows of embeddings that were trained (`trainable_token_indices`).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenRows {
    /// The length of a row.
    pub columns: usize,
    /// By token, its row as it is after training.
    pub rows: BTreeMap<usize, Vec<f32>>,
}

/// All that an adapter holds.
#[derive(Debug, Default)]
pub(super) struct AdapterWeights {
    pub(super) modules: BTreeMap<String, LoraModule>,
    pub(super) tokens: BTreeMap<String, TokenRows>,
    /// The name in the checkpoint of every tensor that is replaced, and its name in the adapter.
    pub(super) replaced: BTreeMap<String, String>,
}

/// The tensors of one module, as they are found.
#[derive(Default)]
struct Parts<'a> {
    a: Option<TensorView<'a>>,
    b: Option<TensorView<'a>>,
    embedding_a: Option<TensorView<'a>>,
    embedding_b: Option<TensorView<'a>>,
    magnitude: Option<TensorView<'a>>,
    bias: Option<TensorView<'a>>,
}

impl AdapterWeights {
    /// Sorts the tensors. `rank_and_scale` gives what the configuration says of a module.
    pub(super) fn read(
        path: &Path,
        files: &TensorFiles,
        config: &AdapterConfig,
        rank_and_scale: impl Fn(&str) -> (usize, f32),
    ) -> Result<Self, AdapterError> {
        let mut parts: BTreeMap<&str, Parts<'_>> = BTreeMap::new();
        let mut weights = Self::default();
        for key in files.names() {
            let Some(view) = files.tensor(key) else { continue };
            let name = key.strip_prefix("base_model.model.").unwrap_or(key);
            let bad = |module: &str, why: String| AdapterError::Module {
                path: path.to_path_buf(),
                module: module.to_owned(),
                why,
            };
            if let Some((module, slot)) = Parts::slot(name, &mut parts) {
                if slot.replace(view).is_some() {
                    return Err(bad(module, format!("{name} stands there in two spellings")));
                }
            } else if let Some(module) = name.strip_suffix(".token_adapter.trainable_tokens_delta") {
                let rows = TokenRows::read(config, module, &view).map_err(|why| bad(module, why))?;
                weights.tokens.insert(module.to_owned(), rows);
            } else if name.contains(".original_module.") {
                // The weight before training, which PEFT saves beside a resized embedding; nothing uses it.
            } else {
                let whole = whole_tensor(name).ok_or_else(|| AdapterError::Unsupported {
                    path: path.to_path_buf(),
                    key: key.to_owned(),
                    value: "a tensor of unknown meaning".into(),
                })?;
                let twice = weights.replaced.insert(whole.clone(), key.to_owned());
                let other = twice.and_then(|other| files.tensor(&other));
                if other.is_some_and(|other| other.bytes != view.bytes || other.dtype != view.dtype) {
                    return Err(bad(&whole, "it stands there twice, with two values".into()));
                }
            }
        }
        for (module, parts) in parts {
            let (rank, scale) = rank_and_scale(module);
            let read = parts.read(rank, scale).map_err(|why| AdapterError::Module {
                path: path.to_path_buf(),
                module: module.to_owned(),
                why,
            })?;
            if read.magnitude.is_some() != config.use_dora {
                return Err(AdapterError::Module {
                    path: path.to_path_buf(),
                    module: module.to_owned(),
                    why: format!("use_dora is {}, and its weights say otherwise", config.use_dora),
                });
            }
            weights.modules.insert(module.to_owned(), read);
        }
        Ok(weights)
    }
}

/// The name in the checkpoint of a tensor that the adapter brings whole.
fn whole_tensor(name: &str) -> Option<String> {
    let (module, parameter) = name
        .rsplit_once('.')
        .filter(|(_, parameter)| matches!(*parameter, "weight" | "bias"))?;
    let module = module.strip_suffix(".base_layer").unwrap_or(module);
    let module = module.strip_suffix(".modules_to_save").unwrap_or(module);
    let last = module.rsplit('.').next().unwrap_or(module);
    let part_of_an_adapter = last.starts_with("lora_") || matches!(last, "token_adapter" | "default");
    (!part_of_an_adapter && !module.contains(".lora_")).then(|| format!("{module}.{parameter}"))
}

impl<'a> Parts<'a> {
    /// The place of a tensor of this name, and the module that it belongs to.
    fn slot<'n, 'p>(
        name: &'n str,
        parts: &'p mut BTreeMap<&'n str, Self>,
    ) -> Option<(&'n str, &'p mut Option<TensorView<'a>>)> {
        const SUFFIXES: [&str; 7] = [
            ".lora_A.weight",
            ".lora_B.weight",
            ".lora_embedding_A",
            ".lora_embedding_B",
            ".lora_magnitude_vector",
            ".lora_magnitude_vector.weight",
            ".lora_B.bias",
        ];
        let (at, module) = SUFFIXES
            .iter()
            .enumerate()
            .find_map(|(at, suffix)| Some((at, name.strip_suffix(suffix)?)))?;
        let parts = parts.entry(module).or_default();
        let slot = match at {
            0 => &mut parts.a,
            1 => &mut parts.b,
            2 => &mut parts.embedding_a,
            3 => &mut parts.embedding_b,
            4 | 5 => &mut parts.magnitude,
            _ => &mut parts.bias,
        };
        Some((module, slot))
    }

    fn read(self, rank: usize, scale: f32) -> Result<LoraModule, String> {
        let (a, b, embedding) = match (self.a, self.b, self.embedding_a, self.embedding_b) {
            (Some(a), Some(b), None, None) => (a, b, false),
            // [rank, tokens] and [width, rank]: transposed, they are what a linear layer has.
            (None, None, Some(a), Some(b)) => (b, a, true),
            (None, None, None, None) => return Err("it has no lora_A and no lora_B".into()),
            _ => return Err("it has only one of lora_A and lora_B".into()),
        };
        let (&[a_first, a_second], &[b_first, b_second]) = (a.shape, b.shape) else {
            return Err(format!(
                "lora_A {:?} and lora_B {:?} are not matrices",
                a.shape, b.shape
            ));
        };
        let (a_rank, n_in, n_out, b_rank) = if embedding {
            (a_second, a_first, b_second, b_first)
        } else {
            (a_first, a_second, b_first, b_second)
        };
        if a_rank != rank || b_rank != rank {
            return Err(format!(
                "lora_A has rank {a_rank} and lora_B {b_rank}, where adapter_config.json says {rank}"
            ));
        }
        let (mut lora_a, mut lora_b) = (numbers(&a)?, numbers(&b)?);
        if embedding {
            lora_a = transposed(&lora_a, rank);
            lora_b = transposed(&lora_b, n_out);
        }
        let vector = |view: Option<TensorView<'_>>, what: &str, length: usize| match view {
            None => Ok(None),
            // Some versions of PEFT keep a dimension of 1.
            Some(view) if view.elements() == length => numbers(&view).map(Some),
            Some(view) => Err(format!("{what} has the shape {:?}, not [{length}]", view.shape)),
        };
        let lengths = if embedding { n_in } else { n_out };
        Ok(LoraModule {
            rank,
            n_in,
            n_out,
            lora_a,
            lora_b,
            scale,
            magnitude: vector(self.magnitude, "lora_magnitude_vector", lengths)?,
            bias: vector(self.bias, "lora_B.bias", n_out)?,
            embedding,
        })
    }
}

impl TokenRows {
    fn read(config: &AdapterConfig, module: &str, view: &TensorView<'_>) -> Result<Self, String> {
        // A list is of the embeddings; an object has a list for each module, by the end of its name.
        let listed = match config.other.get("trainable_token_indices") {
            Some(Value::Object(lists)) => lists
                .iter()
                .find(|(name, _)| module == *name || module.ends_with(&format!(".{name}")))
                .map(|(_, list)| list),
            list => list,
        };
        let number = |index: &Value| Some(usize::try_from(index.as_u64()?).unwrap_or(usize::MAX));
        let indices: Option<Vec<usize>> = listed
            .and_then(Value::as_array)
            .and_then(|list| list.iter().map(number).collect());
        let indices =
            indices.ok_or("trainable_token_indices in adapter_config.json does not list its tokens")?;
        let &[rows, columns] = view.shape else {
            return Err(format!("its trained tokens have the shape {:?}", view.shape));
        };
        if rows != indices.len() {
            return Err(format!(
                "it has {rows} trained tokens, and {} are listed",
                indices.len()
            ));
        }
        let values = numbers(view)?;
        let mut rows = BTreeMap::new();
        for (token, row) in indices.into_iter().zip(values.chunks_exact(columns.max(1))) {
            rows.entry(token).or_insert_with(|| row.to_vec());
        }
        Ok(Self { columns, rows })
    }
}

/// All elements, which must be finite.
fn numbers(view: &TensorView<'_>) -> Result<Vec<f32>, String> {
    let values = view.to_f32().map_err(|error| error.to_string())?;
    if values.iter().all(|value| value.is_finite()) {
        return Ok(values);
    }
    Err(format!("{} holds NaN or infinity", view.name))
}

/// A row-major matrix with rows of `columns` elements, transposed.
fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    (0..columns)
        .flat_map(|column| matrix.iter().skip(column).step_by(columns.max(1)).copied())
        .collect()
}
