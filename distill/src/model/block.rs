//! One block of a decoder, which every architecture writes in a file of its own, and what a forward pass hands it.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::norm::Norm;
use super::ops::{Heads, Rotation};
use super::{Linear, Mode, Parameter};

/// Attention as a block asks for it: q `[rows, heads · head_dim]`, k and v `[rows, kv_heads · head_dim]`, already turned
/// by their positions → `[rows, heads · head_dim]`. Whoever runs the block decides what the rows may see: the batch
/// alone, or a cache before it.
pub(crate) type Attend<'a> = dyn FnMut(&Tensor, &Tensor, &Tensor, Heads) -> Result<Tensor> + 'a;

/// What every block of one forward pass shares.
#[derive(Debug, Clone)]
pub struct Pass {
    /// How the pass is meant.
    pub mode: Mode,
    /// The batch's positions, turned by each of the model's rotary embeddings, in the order of
    /// [`Config::rope_tables`](super::Config::rope_tables).
    pub(crate) rotations: Vec<Rotation>,
    /// The rows at which the sequences begin, and last the number of rows.
    pub(crate) starts: Arc<[usize]>,
    /// The rows of virtual tokens at the beginning of every sequence.
    pub(crate) virtual_rows: usize,
    /// The rows at which the sequences would begin without virtual tokens: those of the batch.
    pub(crate) token_starts: Arc<[usize]>,
}

/// A block: attention and a feed-forward layer with their norms.
pub(crate) trait Block: Debug + Send + Sync {
    /// x `[rows, hidden_size]` → the same shape.
    fn forward(&self, x: &Tensor, pass: &Pass, attend: &mut Attend<'_>) -> Result<Tensor>;
    /// The linear layers, which an adapter can stand on, in the order of the forward pass.
    fn linears(&self) -> Vec<&Linear>;
    /// The same, to change.
    fn linears_mut(&mut self) -> Vec<&mut Linear>;
    /// All weights that are numbers in memory, without adapters.
    fn parameters(&self) -> Vec<&Parameter>;
    /// The norms, to change: all that is not in the linear layers.
    fn norms_mut(&mut self) -> Vec<&mut Norm>;
}
