//! Frozen matrices that are kept in few bits, or on disk, and become f32 a few rows at a time.

mod gguf;
mod mapped;
mod nf4;
mod scales;

pub use gguf::GgufRows;
pub use mapped::MappedRows;
pub use nf4::Nf4;
pub use scales::{Scales, dynamic_map};
