//! One step of training, whatever the loss: gradients of several forward passes add up, are shortened where they are
//! too long, and move the weights.

use candle_core::{DType, Result, Tensor, Var};

use super::TrainError;
use super::backward::backward;
use crate::batch::Batch;
use crate::model::{Mode, Model};
use crate::optimizer::{AdamW, AdamWOptions, clip_factor, global_norm};

/// How the weights move, spelled as transformers' `TrainingArguments` spells it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearnerOptions {
    /// The constants of AdamW.
    pub adamw: AdamWOptions,
    /// Longer gradients are shortened to this norm; 0 does not.
    pub max_grad_norm: f64,
    /// Whether activations are computed again in the backward pass instead of being kept.
    pub gradient_checkpointing: bool,
}

/// A model with the optimizer of what is trained in it.
#[derive(Debug)]
pub struct Learner<'a> {
    model: &'a Model,
    options: LearnerOptions,
    trained: Vec<(&'a str, &'a Var)>,
    optimizer: AdamW,
    /// Of the step that is under way, in the order of `trained`.
    gradients: Vec<Option<Tensor>>,
}

impl<'a> Learner<'a> {
    /// Trains whatever the model has that is trained. Needs a stack that is deep enough for the backward pass, see
    /// [`with_deep_stack`](super::with_deep_stack).
    pub fn new(model: &'a Model, options: LearnerOptions) -> Self {
        let trained = model.trained();
        Self {
            model,
            options,
            optimizer: AdamW::new(trained.iter().map(|(_, var)| (*var).clone()), options.adamw),
            gradients: vec![None; trained.len()],
            trained,
        }
    }

    /// The model.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// Every trained tensor with its name, in the order of the optimizer's moments.
    pub fn trained(&self) -> &[(&'a str, &'a Var)] {
        &self.trained
    }

    /// The optimizer, to be saved.
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// The optimizer, to be restored.
    pub fn optimizer_mut(&mut self) -> &mut AdamW {
        &mut self.optimizer
    }

    /// One forward and backward pass, whose gradients are added to those of the step. `loss_of` makes of the hidden
    /// states after the last norm a scalar, a **sum** over tokens, for the step to be divided once. Returns its value.
    pub fn accumulate(
        &mut self,
        batch: &Batch,
        mode: Mode,
        loss_of: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<f64> {
        // Within the pass first: what comes in parts is added up in the order of one graph, and the bits are the same.
        let mut of_pass: Vec<Option<Tensor>> = vec![None; self.trained.len()];
        let recompute = self.options.gradient_checkpointing;
        let loss = backward(self.model, batch, mode, recompute, loss_of, |mut store| {
            for ((_, var), sum) in self.trained.iter().zip(&mut of_pass) {
                add(sum, store.remove(var))?;
            }
            Ok(())
        })?;
        for (sum, gradient) in self.gradients.iter_mut().zip(of_pass) {
            add(sum, gradient)?;
        }
        Ok(loss)
    }

    /// Ends the step's passes: their gradients, and the norm of all together, divided by `count` (tokens).
    pub fn gradients(&mut self, count: usize) -> std::result::Result<Gradients, TrainError> {
        let mut tensors = Vec::with_capacity(self.trained.len());
        for ((name, _), gradient) in self.trained.iter().zip(&mut self.gradients) {
            tensors.push(gradient.take().ok_or_else(|| TrainError::NoGradient {
                tensor: (*name).to_owned(),
            })?);
        }
        let norm = global_norm(&tensors)? / count as f64;
        Ok(Gradients { tensors, count, norm })
    }

    /// Moves the weights.
    pub fn update(&mut self, gradients: &Gradients, learning_rate: f64) -> Result<()> {
        let scale = clip_factor(gradients.norm, self.options.max_grad_norm) / gradients.count as f64;
        self.optimizer.step(&gradients.tensors, learning_rate, scale)
    }

    /// The first trained tensor that holds NaN or infinity.
    pub fn not_finite(&self) -> Result<Option<&'a str>> {
        for (name, var) in &self.trained {
            // NaN and infinity survive a sum of magnitudes.
            let sum = var.as_detached_tensor().abs()?.sum_all()?.to_dtype(DType::F64)?;
            if !sum.to_scalar::<f64>()?.is_finite() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }
}

fn add(sum: &mut Option<Tensor>, more: Option<Tensor>) -> Result<()> {
    *sum = match (sum.take(), more) {
        (Some(sum), Some(more)) => Some((sum + more)?),
        (sum, more) => sum.or(more),
    };
    Ok(())
}

/// The gradients of a step, not yet divided, with their norm.
#[derive(Debug)]
pub struct Gradients {
    tensors: Vec<Tensor>,
    count: usize,
    /// The norm of all gradients together after the division, before clipping.
    pub norm: f64,
}

impl Gradients {
    /// One for each trained tensor, in their order; sums, not yet divided.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }
}
