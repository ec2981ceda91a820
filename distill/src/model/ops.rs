//! Differentiable operations, each with a real backward pass: kernels for f32 on the CPU, and the same composed of
//! candle's primitives for other devices and types.
//!
//! candle's own fused operations cut the gradient without a word, and its matmul computes and keeps the
//! gradient of frozen weights; these do neither. Each file has its forward, its backward and a gradient check
//! in f64. Every operation works on a batch without padding: rows are the tokens of all sequences.

mod attention;
#[cfg(any(feature = "mkl", feature = "accelerate"))]
mod blas;
mod composed;
mod cross_entropy;
mod distillation;
mod embedding;
mod few_rows;
mod frozen;
mod gemm;
mod glu;
#[cfg(test)]
pub(crate) mod gradcheck;
mod head_loss;
mod linear;
mod lora_head_loss;
mod lora_linear;
mod norms;
mod real;
mod rms_norm;
mod rope;
mod virtual_rows;

pub use attention::{Heads, attention};
pub(crate) use attention::{Sequence, attend};
#[cfg(test)]
pub(crate) use composed::forced;
pub(crate) use composed::{is_for as is_composed, sum_of_rows};
pub use cross_entropy::{cross_entropy, frozen_cross_entropy, lora_cross_entropy};
pub use distillation::{Distillation, distillation_loss, frozen_distillation_loss, lora_distillation_loss};
pub use embedding::{embedding, frozen_embedding};
pub use frozen::Frozen;
pub use glu::{geglu, swiglu};
pub use head_loss::Targets;
pub use linear::{drawn_linear, frozen_linear, linear};
pub use lora_head_loss::HeadAdapter;
pub use lora_linear::{Dropout, lora_linear};
pub(crate) use norms::Adapted;
pub(crate) use real::{Real, with_elements};
pub use rms_norm::{per_head, rms_norm, rms_norm_plus_one};
pub use rope::{RopeTable, Rotation, rope};
pub(crate) use virtual_rows::widened;
pub use virtual_rows::{put_before, take_before};
