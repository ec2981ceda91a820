//! AdamW as torch has it, with state that can be read, gradient clipping, and learning rate schedules.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, Var, WithDType};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

const CHUNK: usize = 16 * 1024;

/// The constants of AdamW, <https://arxiv.org/abs/1711.05101>.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// β₁, the decay of the mean of the gradients.
    pub beta1: f64,
    /// β₂, the decay of the mean of their squares.
    pub beta2: f64,
    /// ε, added to the root of the latter.
    pub epsilon: f64,
    /// Weight decay, of tensors with two dimensions or more (as transformers' Trainer: not of norms).
    pub weight_decay: f64,
}

/// AdamW over a list of variables.
#[derive(Debug)]
pub struct AdamW {
    options: AdamWOptions,
    steps: i32,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    var: Var,
    decay: f64,
    /// The mean of the gradients, and of their squares.
    moments: Mutex<(Vec<f32>, Vec<f32>)>,
}

impl AdamW {
    /// For these variables; their gradients must come in the same order.
    pub fn new(vars: impl IntoIterator<Item = Var>, options: AdamWOptions) -> Self {
        let slots = vars
            .into_iter()
            .map(|var| {
                let count = var.elem_count();
                let decay = if var.rank() >= 2 {
                    options.weight_decay
                } else {
                    0.0
                };
                Slot {
                    decay,
                    moments: Mutex::new((vec![0.0; count], vec![0.0; count])),
                    var,
                }
            })
            .collect();
        Self {
            options,
            steps: 0,
            slots,
        }
    }

    /// One step. The gradients are multiplied by `scale` first (clipping, averaging).
    pub fn step(&mut self, gradients: &[Tensor], learning_rate: f64, scale: f64) -> Result<()> {
        if gradients.len() != self.slots.len() {
            candle_core::bail!("{} gradients for {} variables", gradients.len(), self.slots.len());
        }
        self.steps += 1;
        for (slot, gradient) in self.slots.iter().zip(gradients) {
            let update = Update {
                slot,
                options: self.options,
                steps: self.steps,
                learning_rate,
                scale,
            };
            slot.var.inplace_op2(&gradient.contiguous()?, &update)?;
        }
        Ok(())
    }
}

/// One step of one variable, in place.
struct Update<'a> {
    slot: &'a Slot,
    options: AdamWOptions,
    steps: i32,
    learning_rate: f64,
    scale: f64,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        weights: &mut CpuStorage,
        weights_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<()> {
        let CpuStorage::F32(weights) = weights else {
            candle_core::bail!("adamw: weights are f32")
        };
        let (Some(at), Some(from)) = (
            weights_layout.contiguous_offsets(),
            gradient_layout.contiguous_offsets(),
        ) else {
            candle_core::bail!("adamw: not contiguous")
        };
        let weights = &mut weights[at.0..at.1];
        let gradient = &f32::cpu_storage_as_slice(gradient)?[from.0..from.1];
        let mut moments = self.slot.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let (mean, square) = &mut *moments;
        let AdamWOptions {
            beta1,
            beta2,
            epsilon,
            ..
        } = self.options;
        let bias1 = 1.0 - beta1.powi(self.steps);
        let bias2 = 1.0 - beta2.powi(self.steps);
        // torch/optim/adamw.py: decay first, then w −= lr/bias1 · m / (√v/√bias2 + ε).
        let keep = (1.0 - self.learning_rate * self.slot.decay) as f32;
        let (step, root, epsilon) = (
            (self.learning_rate / bias1) as f32,
            bias2.sqrt() as f32,
            epsilon as f32,
        );
        let (b1, b2, scale) = (beta1 as f32, beta2 as f32, self.scale as f32);
        weights
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(mean.par_chunks_mut(CHUNK).zip(square.par_chunks_mut(CHUNK)))
            .for_each(|((weights, gradient), (mean, square))| {
                for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(mean.iter_mut().zip(square)) {
                    let g = *g * scale;
                    *m += (g - *m) * (1.0 - b1);
                    *v = *v * b2 + g * g * (1.0 - b2);
                    *w = *w * keep - step * *m / (v.sqrt() / root + epsilon);
                }
            });
        Ok(())
    }
}

/// The norm of all gradients together, √Σg².
pub fn global_norm(gradients: &[Tensor]) -> Result<f64> {
    let mut sum = 0.0;
    for gradient in gradients {
        let gradient = gradient.contiguous()?;
        sum += crate::model::ops::with_elements::<f32, _>(&gradient, "norm", |values| {
            // In order, whatever the threads: the same seed gives the same bits.
            let parts: Vec<f64> = values
                .par_chunks(CHUNK)
                .map(|part| part.iter().map(|g| f64::from(*g) * f64::from(*g)).sum())
                .collect();
            Ok(parts.iter().sum::<f64>())
        })?;
    }
    Ok(sum.sqrt())
}

/// What clipping to `max_norm` multiplies gradients of this norm by; torch's `clip_grad_norm_`.
/// A `max_norm` of 0 does not clip.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 {
        (max_norm / (norm + 1e-6)).min(1.0)
    } else {
        1.0
    }
}

/// How the learning rate goes on after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Down to 0 in a straight line.
    Linear,
    /// Down to 0 along half a cosine.
    Cosine,
    /// Not at all.
    Constant,
}

impl Schedule {
    /// The factor on the learning rate at a step, counted from 0; transformers' `get_*_schedule_with_warmup`.
    pub fn factor(self, step: usize, warmup: usize, total: usize) -> f64 {
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_transformers() {
        // transformers.get_linear_schedule_with_warmup(_, 2, 6) and the cosine one, steps 0 to 6.
        let at = |schedule: Schedule| (0..7).map(|step| schedule.factor(step, 2, 6)).collect::<Vec<_>>();
        assert_eq!(at(Schedule::Linear), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]);
        assert_eq!(at(Schedule::Constant), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]);
        for (ours, theirs) in
            at(Schedule::Cosine)
                .iter()
                .zip([0.0, 0.5, 1.0, 0.853_553_4, 0.5, 0.146_446_6, 0.0])
        {
            assert!((ours - theirs).abs() < 1e-7);
        }
    }

    #[test]
    fn clipping_only_shortens() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
        assert_eq!(clip_factor(4.0, 0.0), 1.0);
    }
}
