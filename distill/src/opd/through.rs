//! A student that computes with the weights that it will be deployed with: in the forward pass every matrix has the
//! numbers that its blocks in the GGUF file stand for, the very blocks that `pipit-convert` writes, and the gradient
//! goes straight through the rounding to the student's own numbers (the straight-through estimator,
//! <https://arxiv.org/abs/1308.3432>; quantisation-aware distillation, <https://arxiv.org/abs/2601.20088>).
//!
//! While it is put on, a trained matrix W holds Q(W), so that the backward pass computes the gradient at Q(W), and the
//! optimizer moves W when it is taken off again. A frozen matrix under an adapter holds Q(W + s·B·A) − s·B·A: with what
//! the adapter adds, the layer is the merged and quantised one, and the adapter gets the gradient that a merged matrix
//! would hand on. What llama.cpp rounds beside the weights, activations in products with blocks, is not computed here;
//! `--rollouts gguf` and the last measurement have it.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use pipit_convert::gguf::TensorType;
use pipit_convert::merge::{LowRank, add_low_rank};
use pipit_convert::model::{ModelError, SourceModel, tensor_types};
use pipit_convert::quantize::{QuantizeError, Recipe, dequantize, quantize};
use rayon::prelude::*;

use crate::model::{Lora, Mode, Model, Weight};

/// Elements that a thread rounds at a time.
const PART: usize = 1 << 16;

/// Why a student cannot compute with quantised weights.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ThroughError {
    /// The student's checkpoint cannot be planned as a GGUF file.
    #[error("--through: {0}")]
    Plan(#[from] ModelError),
    /// A matrix is kept in blocks already.
    #[error(
        "--through: {tensor} is in blocks already\nhint: --method full and --method lora on a checkpoint folder have numbers to round"
    )]
    Blocks {
        /// The matrix.
        tensor: String,
    },
    /// The adapter does what a merged matrix cannot.
    #[error(
        "--through cannot be used with {what}\nhint: leave it out; a plain adapter on the blocks' layers can"
    )]
    Adapter {
        /// What of the adapter.
        what: &'static str,
    },
    /// The GGUF file has no place for a matrix.
    #[error("--through: the GGUF file of the student has no tensor for {tensor}")]
    NoPlace {
        /// The matrix.
        tensor: String,
    },
    /// A matrix cannot be rounded.
    #[error("--through: {tensor}: {source}")]
    Quantize {
        /// The matrix.
        tensor: String,
        /// Why.
        source: QuantizeError,
    },
    /// The arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The matrices of a student that are rounded.
#[derive(Debug)]
pub struct Through {
    matrices: Vec<Matrix>,
    on: bool,
}

/// The type of a matrix in the GGUF file.
#[derive(Debug, Clone)]
struct Rounding {
    kind: TensorType,
    /// The weight of every column, for the kernel.
    importance: Option<Vec<f32>>,
}

#[derive(Debug)]
struct Matrix {
    name: String,
    rounding: Rounding,
    /// What the model computes with.
    values: Var,
    own: Own,
}

#[derive(Debug)]
enum Own {
    /// The numbers that the optimizer moves, while the model computes with others.
    Trained(Option<Tensor>),
    /// The checkpoint's numbers, under an adapter that is trained.
    Frozen(Tensor, Adapter),
}

/// s·B·A, of the tensors that are trained.
#[derive(Debug)]
struct Adapter {
    /// `[r, in]`.
    a: Tensor,
    /// `[out, r]`.
    b: Tensor,
    scale: f32,
}

impl Through {
    /// Prepares a student of this checkpoint to compute with the weights of a GGUF file of this recipe. Frozen matrices
    /// without an adapter are rounded at once.
    pub fn new(model: &mut Model, source: &SourceModel, recipe: &Recipe) -> Result<Self, ThroughError> {
        let mut roundings = BTreeMap::new();
        for chosen in tensor_types(source, recipe)? {
            let rounding = Rounding {
                kind: chosen.kind,
                importance: chosen.importance.map(<[f32]>::to_vec),
            };
            roundings.insert(chosen.name, rounding);
        }
        check_adapters(model)?;
        let mut matrices = Vec::new();
        for name in model.matrix_names() {
            let rounding = roundings.remove(&name);
            let rounding = rounding.ok_or_else(|| ThroughError::NoPlace { tensor: name.clone() })?;
            let module = name.trim_end_matches(".weight");
            let adapter = model.lora(module).map(Adapter::of);
            let Some(weight) = model.matrix(module).and_then(Weight::dense) else {
                return Err(ThroughError::Blocks { tensor: name });
            };
            let (values, own) = match weight.var() {
                Some(var) => (var.clone(), Own::Trained(None)),
                None => {
                    // The model's matrix becomes one that can be changed in place.
                    let own = weight.get(Mode::INFERENCE).clone();
                    let values = Var::from_tensor(&own)?;
                    // It exists, and keeps its shape.
                    let _ = model.replace(&name, &values.as_detached_tensor())?;
                    match adapter {
                        Some(adapter) => (values, Own::Frozen(own, adapter)),
                        None => {
                            values.set(&rounding.rounded(&name, &own, None)?)?;
                            continue;
                        }
                    }
                }
            };
            matrices.push(Matrix {
                name,
                rounding,
                values,
                own,
            });
        }
        Ok(Self { matrices, on: false })
    }

    /// The student computes with the numbers of its blocks from now on.
    pub fn put_on(&mut self) -> Result<(), ThroughError> {
        if std::mem::replace(&mut self.on, true) {
            return Ok(());
        }
        for matrix in &mut self.matrices {
            let Matrix {
                name,
                rounding,
                values,
                own,
            } = matrix;
            match own {
                Own::Trained(own) => {
                    let rounded = rounding.rounded(name, values, None)?;
                    *own = Some(values.as_detached_tensor().copy()?);
                    values.set(&rounded)?;
                }
                Own::Frozen(own, adapter) => values.set(&rounding.rounded(name, own, Some(adapter))?)?,
            }
        }
        Ok(())
    }

    /// The student has its own numbers again, which the optimizer moves and which are saved.
    pub fn take_off(&mut self) -> Result<(), ThroughError> {
        if !std::mem::replace(&mut self.on, false) {
            return Ok(());
        }
        for matrix in &mut self.matrices {
            if let Own::Trained(own) = &mut matrix.own
                && let Some(own) = own.take()
            {
                matrix.values.set(&own)?;
            }
        }
        Ok(())
    }

    /// How many bytes it takes beside the model.
    pub fn bytes(&self) -> u64 {
        let numbers = self
            .matrices
            .iter()
            .map(|matrix| matrix.values.elem_count() as u64);
        4 * numbers.sum::<u64>()
    }
}

/// Refuses adapters whose layer is not that of one merged matrix.
fn check_adapters(model: &Model) -> Result<(), ThroughError> {
    let refuse = |what| Err(ThroughError::Adapter { what });
    for module in model.adapted() {
        if model.is_embedding(module) || model.is_head(module) {
            return refuse("an adapter on the embedding or the output layer");
        }
        let Some(lora) = model.lora(module) else { continue };
        if lora.magnitude.is_some() {
            return refuse("--use-dora");
        }
        if lora.dropout > 0.0 {
            return refuse("--lora-dropout");
        }
    }
    Ok(())
}

impl Adapter {
    fn of(lora: &Lora) -> Self {
        Self {
            a: lora.a.get(Mode::INFERENCE).clone(),
            b: lora.b.get(Mode::INFERENCE).clone(),
            scale: lora.scale as f32,
        }
    }
}

impl Rounding {
    /// The numbers that a matrix's blocks stand for; under an adapter those of the merged matrix, less what the adapter
    /// adds.
    fn rounded(
        &self,
        name: &str,
        matrix: &Tensor,
        adapter: Option<&Adapter>,
    ) -> Result<Tensor, ThroughError> {
        let (rows, columns) = matrix.dims2()?;
        let mut numbers = matrix
            .detach()
            .flatten_all()?
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?;
        let low_rank = match adapter {
            Some(adapter) => Some((
                adapter.a.flatten_all()?.to_vec1::<f32>()?,
                adapter.b.flatten_all()?.to_vec1::<f32>()?,
                adapter.scale,
            )),
            None => None,
        };
        let height = (PART / columns.max(1)).max(1);
        let failed = |source| ThroughError::Quantize {
            tensor: name.to_owned(),
            source,
        };
        let parts = numbers.par_chunks_mut(height * columns.max(1)).enumerate();
        parts.try_for_each(|(part, numbers)| {
            let mut added = Vec::new();
            if let Some((a, b, scale)) = &low_rank {
                // As pipit-convert merges, to the bit: the blocks are those that it will write.
                let rank = b.len() / rows.max(1);
                let pair = LowRank {
                    rank,
                    lora_a: a,
                    lora_b: b,
                };
                let row = |row| part * height + row;
                added.resize(numbers.len(), 0.0);
                add_low_rank(pair, *scale, row, columns, &mut added);
                add_low_rank(pair, *scale, row, columns, numbers);
            }
            let mut blocks = Vec::new();
            let importance = self.importance.as_deref();
            quantize(self.kind, numbers, columns, importance, &mut blocks)
                .map_err(|error| failed(error.after(part * height * columns)))?;
            dequantize(self.kind, &blocks, columns, numbers).map_err(failed)?;
            for (number, added) in numbers.iter_mut().zip(&added) {
                *number -= added;
            }
            Ok::<(), ThroughError>(())
        })?;
        let numbers = Tensor::from_vec(numbers, matrix.dims(), matrix.device())?;
        Ok(numbers.to_dtype(matrix.dtype())?)
    }
}
