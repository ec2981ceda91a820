//! Frozen matrices that are kept in few bits and become f32 a few rows at a time.

pub mod nf4;
mod scales;

pub use nf4::Nf4;
pub use scales::{Scales, dynamic_map};
