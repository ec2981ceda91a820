//! LoRA merged into the weights, row by row: `W' = W + Σ scale · user_scale · (B · A)`, in f32.
//!
//! The rows are those of the checkpoint, before any reordering for the GGUF file. PEFT's `merge_and_unload` does
//! the same with whole matrices (peft/tuners/lora/layer.py, `get_delta_weight`); here the sum stays f32 until
//! it is quantised, also for checkpoints in half precision.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::adapter::{LoraModule, PeftAdapter};
use crate::arch::TensorRule;

/// An adapter with the factor that the user gives it.
#[derive(Debug)]
pub struct ScaledAdapter {
    /// The adapter.
    pub adapter: PeftAdapter,
    /// Times its own scale.
    pub scale: f32,
}

/// What can be wrong between adapters and a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// The checkpoint has no such module.
    #[error(
        "{adapter} adapts the module {module}, which this checkpoint does not have\nhint: was the adapter trained on another base? Its configuration names {base}"
    )]
    NoModule {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The module.
        module: String,
        /// `base_model_name_or_path`.
        base: String,
    },
    /// The module has other sizes.
    #[error(
        "{adapter}: the module {module} is {n_out}×{n_in} in the adapter and {shape:?} in this checkpoint\nhint: was the adapter trained on another base? Its configuration names {base}"
    )]
    Shape {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The module.
        module: String,
        /// The outputs that the adapter has.
        n_out: usize,
        /// The inputs that the adapter has.
        n_in: usize,
        /// The weight's shape.
        shape: Vec<usize>,
        /// `base_model_name_or_path`.
        base: String,
    },
}

/// All adapters, by the name of the weight that they change.
#[derive(Debug, Default)]
pub struct Merge<'a> {
    by_weight: BTreeMap<String, Vec<(&'a LoraModule, f32)>>,
}

impl<'a> Merge<'a> {
    /// Checks that every module of every adapter fits a tensor of the checkpoint.
    pub fn new(adapters: &'a [ScaledAdapter], rules: &[TensorRule]) -> Result<Self, MergeError> {
        let mut by_weight: BTreeMap<String, Vec<_>> = BTreeMap::new();
        for ScaledAdapter { adapter, scale } in adapters {
            let base = || {
                adapter
                    .config()
                    .base_model_name_or_path
                    .clone()
                    .unwrap_or_else(|| "none".into())
            };
            for (name, module) in adapter.modules() {
                let weight = format!("{name}.weight");
                let rule =
                    rules
                        .iter()
                        .find(|rule| rule.hf == weight)
                        .ok_or_else(|| MergeError::NoModule {
                            adapter: adapter.dir().to_path_buf(),
                            module: name.clone(),
                            base: base(),
                        })?;
                if rule.shape != [module.n_out, module.n_in] {
                    return Err(MergeError::Shape {
                        adapter: adapter.dir().to_path_buf(),
                        module: name.clone(),
                        n_out: module.n_out,
                        n_in: module.n_in,
                        shape: rule.shape.clone(),
                        base: base(),
                    });
                }
                by_weight
                    .entry(weight)
                    .or_default()
                    .push((module, scale * module.scale));
            }
        }
        Ok(Self { by_weight })
    }

    /// Whether any adapter changes the tensor.
    pub fn changes(&self, weight: &str) -> bool {
        self.by_weight.contains_key(weight)
    }

    /// Adds what the adapters have for row `row` of a weight to `values`, that row's elements.
    pub fn add_to_row(&self, weight: &str, row: usize, values: &mut [f32]) {
        let mut delta = vec![0.0f32; values.len()];
        for (module, scale) in self.by_weight.get(weight).into_iter().flatten() {
            delta.fill(0.0);
            let b = &module.lora_b[row * module.rank..(row + 1) * module.rank];
            for (b, a) in b.iter().zip(module.lora_a.chunks_exact(module.n_in)) {
                for (delta, a) in delta.iter_mut().zip(a) {
                    *delta += b * a;
                }
            }
            for (value, delta) in values.iter_mut().zip(&delta) {
                *value += scale * delta;
            }
        }
    }
}
