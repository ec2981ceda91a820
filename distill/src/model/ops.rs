//! Differentiable operations for the CPU, each with a real backward pass.
//!
//! candle's own fused operations cut the gradient without a word, and its matmul computes and keeps the
//! gradient of frozen weights; these do neither. Each file has its forward, its backward and a gradient check
//! in f64. Every operation works on a batch without padding: rows are the tokens of all sequences.

mod attention;
mod composed;
mod cross_entropy;
mod embedding;
mod frozen;
mod gemm;
mod glu;
#[cfg(test)]
pub(crate) mod gradcheck;
mod linear;
mod lora_cross_entropy;
mod lora_linear;
mod norms;
mod real;
mod rms_norm;
mod rope;
mod virtual_rows;

pub use attention::{Heads, attention};
pub(crate) use attention::{Sequence, attend};
pub use cross_entropy::{Targets, cross_entropy, frozen_cross_entropy};
pub use embedding::{embedding, frozen_embedding};
pub use frozen::Frozen;
pub use glu::{geglu, swiglu};
pub use linear::{frozen_linear, linear};
pub use lora_cross_entropy::lora_cross_entropy;
pub use lora_linear::{Dropout, lora_linear};
pub(crate) use norms::Adapted;
pub(crate) use real::with_elements;
pub use rms_norm::{per_head, rms_norm, rms_norm_plus_one};
pub use rope::{RopeTable, Rotation, rope};
pub(crate) use virtual_rows::widened;
pub use virtual_rows::{put_before, take_before};
