//! One step of training, whatever the loss: gradients of several forward passes add up, are shortened where they are
//! too long, and move the weights; or, where nothing is added and shortened, every weight moves as soon as it can.

use std::collections::HashMap;

use candle_core::{Result, Tensor, TensorId, Var};

use super::TrainError;
use super::backward::{Way, backward};
use super::loss_scale::LossScale;
use crate::batch::Batch;
use crate::device::Precision;
use crate::model::{Mode, Model};
use crate::optimizer::{
    AdamW, AdamWOptions, Optim, add_to, clip_factor, global_norm, square_sum, takes_eight_bits,
};

/// How the weights move, spelled as transformers' `TrainingArguments` spells it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearnerOptions {
    /// How AdamW keeps its moments.
    pub optim: Optim,
    /// The constants of AdamW.
    pub adamw: AdamWOptions,
    /// Longer gradients are shortened to this norm; 0 does not.
    pub max_grad_norm: f64,
    /// Whether activations are computed again in the backward pass instead of being kept.
    pub gradient_checkpointing: bool,
}

impl LearnerOptions {
    /// Whether in a step of so many forward passes every weight can move at once: no gradient has to wait for another
    /// pass, or for the length of all together.
    pub fn moves_at_once(&self, passes: usize) -> bool {
        passes == 1 && self.max_grad_norm <= 0.0
    }
}

/// A model with the optimizer of what is trained in it.
#[derive(Debug)]
pub struct Learner<'a> {
    model: &'a Model,
    options: LearnerOptions,
    trained: Vec<(&'a str, &'a Var)>,
    /// The block that alone has it, by trained tensor.
    blocks: Vec<Option<usize>>,
    optimizer: AdamW,
    /// In fp16 only.
    loss_scale: Option<LossScale>,
    /// Of the step that is under way, in the order of `trained`.
    gradients: Vec<Option<Tensor>>,
    /// The norm of the gradients of a step whose weights have moved at once.
    moved: Option<f64>,
}

impl<'a> Learner<'a> {
    /// Trains whatever the model has that is trained. Needs a stack that is deep enough for the backward pass, see
    /// [`with_deep_stack`](super::with_deep_stack).
    pub fn new(model: &'a Model, options: LearnerOptions) -> Self {
        let trained = model.trained();
        let of_blocks: HashMap<TensorId, usize> = (0..model.blocks())
            .flat_map(|i| {
                model
                    .block_parameters(i)
                    .filter_map(move |p| Some((p.var()?.id(), i)))
            })
            .collect();
        let mut optimizer = AdamW::new(trained.iter().map(|(_, var)| (*var).clone()), options.adamw);
        if options.optim == Optim::Adamw8bit {
            for (i, (name, var)) in trained.iter().enumerate() {
                if takes_eight_bits(name, var.elem_count()) {
                    optimizer.keep_in_eight_bits(i);
                }
            }
        }
        Self {
            blocks: trained
                .iter()
                .map(|(_, var)| of_blocks.get(&var.id()).copied())
                .collect(),
            model,
            options,
            optimizer,
            loss_scale: (model.place().precision == Precision::Fp16).then(LossScale::default),
            gradients: vec![None; trained.len()],
            moved: None,
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

    /// The factor of the loss, to be saved; none but in fp16.
    pub fn loss_scale(&self) -> Option<LossScale> {
        self.loss_scale
    }

    /// Goes on with a factor of the loss that was saved.
    pub fn set_loss_scale(&mut self, saved: LossScale) {
        self.loss_scale = self.loss_scale.map(|_| saved);
    }

    /// Lowers the factor of the loss after gradients that are not finite. True when the step is to be done again.
    pub fn lower_loss_scale(&mut self) -> bool {
        self.loss_scale.as_mut().is_some_and(LossScale::lower)
    }

    fn loss_factor(&self) -> f64 {
        self.loss_scale.map_or(1.0, LossScale::factor)
    }

    /// One forward and backward pass of a step: a whole [`step`](Self::step) with `at_once`, else it
    /// [accumulates](Self::accumulate). [`gradients`](Self::gradients) and [`update`](Self::update) follow in either case.
    pub fn pass(
        &mut self,
        batch: &Batch,
        mode: Mode,
        learning_rate: f64,
        at_once: bool,
        loss_of: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> std::result::Result<f64, TrainError> {
        if !at_once {
            return Ok(self.accumulate(batch, mode, loss_of)?);
        }
        let count = batch.trained_tokens().max(1);
        let stepped = self.step(batch, mode, count, learning_rate, loss_of)?;
        self.moved = Some(stepped.norm);
        Ok(stepped.loss)
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
        let way = match self.options.gradient_checkpointing {
            true => Way::Recompute,
            false => Way::Whole,
        };
        let factor = self.loss_factor();
        let loss_of = |hidden: &Tensor| match factor {
            1.0 => loss_of(hidden),
            factor => loss_of(hidden)? * factor,
        };
        let loss = backward(self.model, batch, mode, way, loss_of, |mut part| {
            for ((_, var), sum) in self.trained.iter().zip(&mut of_pass) {
                add(sum, part.gradients.remove(var))?;
            }
            Ok(())
        })?;
        for (sum, gradient) in self.gradients.iter_mut().zip(of_pass) {
            add(sum, gradient)?;
        }
        Ok(loss / factor)
    }

    /// Whether a step of so many forward passes can be a [`step`](Self::step).
    pub fn moves_at_once(&self, passes: usize) -> bool {
        // With a scaled loss all gradients must be seen to be finite first.
        self.options.moves_at_once(passes) && self.loss_scale.is_none()
    }

    /// A forward and backward pass that is a whole step: every weight moves as soon as its gradient is known, and the
    /// gradient goes, so that those of one block exist at a time (as in LOMO, <https://arxiv.org/abs/2306.09782>).
    /// With the bits of [`accumulate`](Self::accumulate), [`gradients`](Self::gradients) and [`update`](Self::update)
    /// without clipping. `count` (tokens) is what the sum is divided by. Where the loss or a gradient is not finite, no
    /// weight moves from there on.
    pub fn step(
        &mut self,
        batch: &Batch,
        mode: Mode,
        count: usize,
        learning_rate: f64,
        loss_of: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> std::result::Result<Stepped, TrainError> {
        let way = match self.options.gradient_checkpointing {
            true => Way::Recompute,
            false => Way::Blocks,
        };
        let scale = 1.0 / count as f64;
        let mut waiting: Vec<Option<Tensor>> = vec![None; self.trained.len()];
        let mut squares: Vec<Option<f64>> = vec![None; self.trained.len()];
        let (trained, blocks, optimizer) = (&self.trained, &self.blocks, &mut self.optimizer);
        optimizer.begin_step();
        let mut is_finite = true;
        let mut moved = |i: usize, gradient: &Tensor| -> Result<()> {
            let square = square_sum(gradient)?;
            squares[i] = Some(square);
            is_finite &= square.is_finite();
            match is_finite {
                true => optimizer.move_one(i, gradient, learning_rate, scale),
                false => Ok(()),
            }
        };
        let loss = backward(self.model, batch, mode, way, loss_of, |mut part| {
            for (i, (_, var)) in trained.iter().enumerate() {
                let Some(gradient) = part.gradients.remove(var) else {
                    continue;
                };
                match part.loss.is_finite() && part.block.is_some() && part.block == blocks[i] {
                    true => moved(i, &gradient)?,
                    false => add(&mut waiting[i], Some(gradient))?,
                }
            }
            Ok(())
        })?;
        for (i, gradient) in waiting.into_iter().enumerate() {
            if let Some(gradient) = gradient.filter(|_| loss.is_finite()) {
                moved(i, &gradient)?;
            }
        }
        let mut sum = 0.0;
        for (square, (name, _)) in squares.into_iter().zip(&self.trained) {
            sum += match square {
                Some(square) => square,
                None if !loss.is_finite() => f64::NAN,
                None => {
                    return Err(TrainError::NoGradient {
                        tensor: (*name).to_owned(),
                    });
                }
            };
        }
        Ok(Stepped {
            loss,
            norm: sum.sqrt() / count as f64,
        })
    }

    /// Ends the step's passes: their gradients, and the norm of all together, divided by `count` (tokens). Of weights that
    /// have moved at once the norm is left.
    pub fn gradients(&mut self, count: usize) -> std::result::Result<Gradients, TrainError> {
        if let Some(norm) = self.moved.take() {
            return Ok(Gradients {
                tensors: Vec::new(),
                divisor: count as f64,
                norm,
                moved: true,
            });
        }
        let mut tensors = Vec::with_capacity(self.trained.len());
        for ((name, _), gradient) in self.trained.iter().zip(&mut self.gradients) {
            tensors.push(gradient.take().ok_or_else(|| TrainError::NoGradient {
                tensor: (*name).to_owned(),
            })?);
        }
        let divisor = count as f64 * self.loss_factor();
        let norm = global_norm(&tensors)? / divisor;
        Ok(Gradients {
            tensors,
            divisor,
            norm,
            moved: false,
        })
    }

    /// Moves the weights, unless they have moved already.
    pub fn update(&mut self, gradients: &Gradients, learning_rate: f64) -> Result<()> {
        if gradients.moved {
            return Ok(());
        }
        let scale = clip_factor(gradients.norm, self.options.max_grad_norm) / gradients.divisor;
        self.optimizer.step(&gradients.tensors, learning_rate, scale)?;
        if let Some(loss_scale) = &mut self.loss_scale {
            loss_scale.advance();
        }
        Ok(())
    }

    /// The first trained tensor that holds NaN or infinity.
    pub fn not_finite(&self) -> Result<Option<&'a str>> {
        for (name, var) in &self.trained {
            // NaN and infinity survive a sum of magnitudes.
            let sum = var.as_detached_tensor().abs()?.sum_all()?;
            if !sum.to_scalar::<f32>()?.is_finite() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }
}

/// The first trained tensor that a backward pass gives no gradient. Gradients are dropped as they come.
pub fn unreached<'a>(
    model: &'a Model,
    batch: &Batch,
    mode: Mode,
    loss_of: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Option<&'a str>> {
    let trained = model.trained();
    let mut reached = vec![false; trained.len()];
    backward(model, batch, mode, Way::Blocks, loss_of, |mut part| {
        for ((_, var), reached) in trained.iter().zip(&mut reached) {
            *reached |= part.gradients.remove(var).is_some();
        }
        Ok(())
    })?;
    let missed = trained.iter().zip(&reached).find(|(_, reached)| !**reached);
    Ok(missed.map(|((name, _), _)| *name))
}

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stepped {
    /// The loss, a sum, as it was before the weights moved.
    pub loss: f64,
    /// The norm of all gradients together after the division.
    pub norm: f64,
}

fn add(sum: &mut Option<Tensor>, more: Option<Tensor>) -> Result<()> {
    *sum = match (sum.take(), more) {
        (Some(sum), Some(more)) => Some(add_to(sum, more)?),
        (sum, more) => sum.or(more),
    };
    Ok(())
}

/// The gradients of a step, not yet divided, with their norm.
#[derive(Debug)]
pub struct Gradients {
    tensors: Vec<Tensor>,
    /// Tokens, times the factor of the loss.
    divisor: f64,
    /// The norm of all gradients together after the division, before clipping.
    pub norm: f64,
    moved: bool,
}

impl Gradients {
    /// One for each trained tensor, in their order; sums, not yet divided. None where the weights have moved at once.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }
}
