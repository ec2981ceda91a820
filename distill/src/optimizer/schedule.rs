//! Learning rate schedules, spelled as transformers' `lr_scheduler_type` spells them.

use serde::{Deserialize, Serialize};

/// How the learning rate goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Schedule {
    /// Up from 0 over the warm-up, then down to 0 in a straight line.
    Linear,
    /// Up from 0 over the warm-up, then down to 0 along half a cosine.
    Cosine,
    /// The same all the time, without a warm-up.
    Constant,
    /// Up from 0 over the warm-up, then the same.
    ConstantWithWarmup,
}

impl Schedule {
    /// The factor on the learning rate at a step, counted from 0. Source: transformers/optimization.py,
    /// `get_linear_schedule_with_warmup` and its neighbours.
    pub fn factor(self, step: usize, warmup: usize, total: usize) -> f64 {
        if step < warmup && self != Self::Constant {
            return step as f64 / warmup.max(1) as f64;
        }
        let progress = (step.saturating_sub(warmup)) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Constant | Self::ConstantWithWarmup => 1.0,
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
        }
    }
}
