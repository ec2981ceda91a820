//! AdamW as torch has it, with state that can be read, gradient clipping, and learning rate schedules.
//!
//! Weights are f32, and so are moments unless they are kept in eight bits: one loop on the CPU, candle's own operations
//! on another device.

mod eight_bit;
mod schedule;

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, Var, WithDType};
use eight_bit::EightBitMoments;
pub use eight_bit::{bytes as eight_bit_bytes, takes_eight_bits};
use rayon::prelude::*;
pub use schedule::Schedule;
use serde::{Deserialize, Serialize};

use crate::model::ops::{is_composed, sum_of_rows, with_elements};

const CHUNK: usize = 16 * 1024;

/// The optimizer, spelled as transformers' `optim` spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Optim {
    /// AdamW with moments in f32.
    #[serde(rename = "adamw_torch")]
    AdamwTorch,
    /// AdamW with moments in eight bits, as bitsandbytes has it. On the CPU only.
    #[serde(rename = "adamw_8bit")]
    #[value(name = "adamw_8bit")]
    Adamw8bit,
}

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
    moments: Mutex<Moments>,
}

/// The mean of the gradients, and of their squares.
#[derive(Debug)]
enum Moments {
    Cpu(Vec<f32>, Vec<f32>),
    /// On the CPU.
    EightBit(EightBitMoments),
    /// Where the variable is, and of its shape.
    Device(Tensor, Tensor),
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
                    moments: Mutex::new(Moments::Cpu(vec![0.0; count], vec![0.0; count])),
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

    /// Keeps the moments of variable `i`, which is on the CPU, in eight bits from now on, beginning with zeros.
    ///
    /// # Panics
    /// When there are not so many variables.
    pub fn keep_in_eight_bits(&mut self, i: usize) {
        let slot = &mut self.slots[i];
        let zeros = EightBitMoments::zeros(slot.var.elem_count());
        slot.moments = Mutex::new(Moments::EightBit(zeros));
    }

    /// The steps that were done.
    pub fn steps(&self) -> usize {
        self.steps as usize
    }

    /// A copy of variable `i`'s moments: the mean of its gradients (torch's `exp_avg`) and of their squares
    /// (`exp_avg_sq`), as many numbers as the variable has.
    ///
    /// # Panics
    /// When there are not so many variables.
    pub fn moments(&self, i: usize) -> Result<[Vec<f32>; 2]> {
        let moments = self.slots[i].moments.lock();
        match &*moments.unwrap_or_else(PoisonError::into_inner) {
            Moments::Cpu(mean, square) => Ok([mean.clone(), square.clone()]),
            Moments::EightBit(moments) => Ok(moments.numbers()),
            Moments::Device(mean, square) => {
                let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_vec1();
                Ok([numbers(mean)?, numbers(square)?])
            }
        }
    }

    /// The scales of variable `i`'s moments, one for each 256 numbers; none where they are f32.
    ///
    /// # Panics
    /// When there are not so many variables.
    pub fn scales(&self, i: usize) -> Option<[Vec<f32>; 2]> {
        let moments = self.slots[i].moments.lock();
        match &*moments.unwrap_or_else(PoisonError::into_inner) {
            Moments::EightBit(moments) => Some(moments.scales()),
            Moments::Cpu(..) | Moments::Device(..) => None,
        }
    }

    /// Puts variable `i`'s moments back, and the scales that they had in eight bits.
    ///
    /// # Panics
    /// When there are not so many variables, or the moments are not as many numbers as the variable has.
    pub fn set_moments(
        &mut self,
        i: usize,
        [mean, square]: [Vec<f32>; 2],
        scales: Option<[Vec<f32>; 2]>,
    ) -> Result<()> {
        let slot = &self.slots[i];
        let count = slot.var.elem_count();
        assert!(
            mean.len() == count && square.len() == count,
            "{count} numbers each"
        );
        let mut held = slot.moments.lock().unwrap_or_else(PoisonError::into_inner);
        if let Moments::EightBit(moments) = &mut *held {
            moments.set(&[mean, square], scales);
            return Ok(());
        }
        *held = match is_composed(&slot.var) {
            false => Moments::Cpu(mean, square),
            true => {
                let tensor = |numbers| Tensor::from_vec(numbers, slot.var.dims(), slot.var.device());
                Moments::Device(tensor(mean)?, tensor(square)?)
            }
        };
        Ok(())
    }

    /// Goes on as after so many steps.
    pub fn set_steps(&mut self, steps: usize) {
        self.steps = i32::try_from(steps).unwrap_or(i32::MAX);
    }

    /// One step. The gradients are multiplied by `scale` first (clipping, averaging).
    pub fn step(&mut self, gradients: &[Tensor], learning_rate: f64, scale: f64) -> Result<()> {
        if gradients.len() != self.slots.len() {
            candle_core::bail!("{} gradients for {} variables", gradients.len(), self.slots.len());
        }
        self.begin_step();
        for (i, gradient) in gradients.iter().enumerate() {
            self.move_one(i, gradient, learning_rate, scale)?;
        }
        Ok(())
    }

    /// Begins a step in which every variable moves once, by [`move_one`](Self::move_one).
    pub fn begin_step(&mut self) {
        self.steps += 1;
    }

    /// Moves variable `i` in the step that has begun.
    ///
    /// # Panics
    /// When there are not so many variables.
    pub fn move_one(&mut self, i: usize, gradient: &Tensor, learning_rate: f64, scale: f64) -> Result<()> {
        let slot = &self.slots[i];
        let update = Update {
            slot,
            options: self.options,
            steps: self.steps,
            learning_rate,
            scale,
        };
        match is_composed(&slot.var) {
            false => slot.var.inplace_op2(&gradient.contiguous()?, &update),
            true => update.composed(gradient),
        }
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

/// The factors of a step: torch/optim/adamw.py, decay first, then w −= lr/bias1 · m / (√v/√bias2 + ε).
struct Factors {
    /// 1 − lr · decay.
    keep: f64,
    /// lr / bias1.
    step: f64,
    /// √bias2.
    root: f64,
}

impl Update<'_> {
    fn factors(&self) -> Factors {
        let bias = |beta: f64| 1.0 - beta.powi(self.steps);
        Factors {
            keep: 1.0 - self.learning_rate * self.slot.decay,
            step: self.learning_rate / bias(self.options.beta1),
            root: bias(self.options.beta2).sqrt(),
        }
    }

    /// The same of candle's own operations.
    fn composed(&self, gradient: &Tensor) -> Result<()> {
        let AdamWOptions {
            beta1,
            beta2,
            epsilon,
            ..
        } = self.options;
        let Factors { keep, step, root } = self.factors();
        let var = &self.slot.var;
        let mut moments = self.slot.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let (mean, square) = match &*moments {
            Moments::Cpu(..) | Moments::EightBit(_) => (var.zeros_like()?, var.zeros_like()?),
            Moments::Device(mean, square) => (mean.clone(), square.clone()),
        };
        let gradient = (gradient.to_dtype(DType::F32)? * self.scale)?;
        let mean = (&mean + ((&gradient - &mean)? * (1.0 - beta1))?)?;
        let square = ((square * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let divisor = ((square.sqrt()? / root)? + epsilon)?;
        let moved = ((var.as_detached_tensor() * keep)? - ((&mean * step)? / divisor)?)?;
        *moments = Moments::Device(mean, square);
        var.set(&moved)
    }
}

/// What an operation in place changes, and what it reads, both f32 without gaps.
fn slices<'a>(
    op: &str,
    (changed, at): (&'a mut CpuStorage, &Layout),
    (read, from): (&'a CpuStorage, &Layout),
) -> Result<(&'a mut [f32], &'a [f32])> {
    let CpuStorage::F32(changed) = changed else {
        candle_core::bail!("{op}: what is changed is f32")
    };
    let (Some(at), Some(from)) = (at.contiguous_offsets(), from.contiguous_offsets()) else {
        candle_core::bail!("{op}: not contiguous")
    };
    let read = f32::cpu_storage_as_slice(read)?;
    Ok((&mut changed[at.0..at.1], &read[from.0..from.1]))
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
        let (weights, gradient) = slices("adamw", (weights, weights_layout), (gradient, gradient_layout))?;
        let mut moments = self.slot.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let AdamWOptions {
            beta1,
            beta2,
            epsilon,
            ..
        } = self.options;
        let Factors { keep, step, root } = self.factors();
        let (keep, step, root, epsilon) = (keep as f32, step as f32, root as f32, epsilon as f32);
        let (b1, b2, scale) = (beta1 as f32, beta2 as f32, self.scale as f32);
        let one = |weights: &mut [f32], gradient: &[f32], mean: &mut [f32], square: &mut [f32]| {
            for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(mean.iter_mut().zip(square)) {
                let g = *g * scale;
                *m += (g - *m) * (1.0 - b1);
                *v = *v * b2 + g * g * (1.0 - b2);
                *w = *w * keep - step * *m / (v.sqrt() / root + epsilon);
            }
        };
        match &mut *moments {
            Moments::Cpu(mean, square) => weights
                .par_chunks_mut(CHUNK)
                .zip(gradient.par_chunks(CHUNK))
                .zip(mean.par_chunks_mut(CHUNK).zip(square.par_chunks_mut(CHUNK)))
                .for_each(|((weights, gradient), (mean, square))| one(weights, gradient, mean, square)),
            Moments::EightBit(moments) => moments.step(weights, gradient, one),
            Moments::Device(..) => candle_core::bail!("adamw: the moments are on a device"),
        }
        Ok(())
    }
}

/// The norm of all gradients together, √Σg².
pub fn global_norm(gradients: &[Tensor]) -> Result<f64> {
    let mut sum = 0.0;
    // On a device the sums stay there until all are known.
    let mut there: Option<Tensor> = None;
    for gradient in gradients {
        if is_composed(gradient) {
            let squares = squares_there(gradient)?;
            there = Some(match there {
                Some(sum) => (sum + squares)?,
                None => squares,
            });
            continue;
        }
        sum += square_sum(gradient)?;
    }
    if let Some(there) = there {
        sum += f64::from(there.to_scalar::<f32>()?);
    }
    Ok(sum.sqrt())
}

/// Σg² of one gradient, a scalar where the gradient is.
fn squares_there(gradient: &Tensor) -> Result<Tensor> {
    sum_of_rows(&gradient.to_dtype(DType::F32)?.sqr()?)
}

/// Σg² of one gradient.
pub(crate) fn square_sum(gradient: &Tensor) -> Result<f64> {
    if is_composed(gradient) {
        return Ok(f64::from(squares_there(gradient)?.to_scalar::<f32>()?));
    }
    with_elements::<f32, _>(&gradient.contiguous()?, "norm", |values| {
        // In order, whatever the threads: the same seed gives the same bits.
        let parts: Vec<f64> = values
            .par_chunks(CHUNK)
            .map(|part| part.iter().map(|g| f64::from(*g) * f64::from(*g)).sum())
            .collect();
        Ok(parts.iter().sum::<f64>())
    })
}

/// The sum of two gradients, in the memory of the first where that is possible: an embedding's is a hundred megabytes.
pub(crate) fn add_to(sum: Tensor, more: Tensor) -> Result<Tensor> {
    let plain =
        |tensor: &Tensor| tensor.device().is_cpu() && tensor.dtype() == DType::F32 && tensor.is_contiguous();
    if !(plain(&sum) && plain(&more) && sum.dims() == more.dims()) {
        return sum + more;
    }
    sum.inplace_op2(&more, &AddTo)?;
    Ok(sum)
}

/// a += b.
struct AddTo;

impl InplaceOp2 for AddTo {
    fn name(&self) -> &'static str {
        "add_to"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, at: &Layout, more: &CpuStorage, from: &Layout) -> Result<()> {
        let (sum, more) = slices("add_to", (sum, at), (more, from))?;
        sum.par_chunks_mut(CHUNK)
            .zip(more.par_chunks(CHUNK))
            .for_each(|(sum, more)| sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more));
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_only_shortens() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
        assert_eq!(clip_factor(4.0, 0.0), 1.0);
    }
}
