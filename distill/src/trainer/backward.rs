//! The gradients of one forward pass: over one graph of the whole model, or block by block, last block first, with the
//! activations kept or computed again (activation checkpointing, <https://arxiv.org/abs/1604.06174>).
//!
//! All give the same bits. Recomputing keeps, of every block, its input only (`rows · hidden_size` numbers) and holds
//! the graph of one block at a time, for one more forward pass through the blocks.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};

use crate::batch::Batch;
use crate::model::{Mode, Model};

/// How a backward pass goes through the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// All gradients come together.
    Whole,
    /// Those of a block come when it has been gone through, and its activations go.
    Blocks,
    /// The same, and the activations are computed when they are needed.
    Recompute,
}

/// Gradients that have come.
pub(super) struct Part {
    /// The block that is done: nothing more will come for what only it has.
    pub(super) block: Option<usize>,
    pub(super) gradients: GradStore,
    /// The loss of the whole pass.
    pub(super) loss: f64,
}

/// Runs a batch forward and backward; returns the loss. `loss_of` makes a scalar of the hidden states after the last
/// norm. `collect` gets gradients as they come, and those of a tensor that several blocks use several times, to be added
/// up.
pub(super) fn backward(
    model: &Model,
    batch: &Batch,
    mode: Mode,
    way: Way,
    loss_of: impl FnOnce(&Tensor) -> Result<Tensor>,
    mut collect: impl FnMut(Part) -> Result<()>,
) -> Result<f64> {
    if way != Way::Whole {
        return block_by_block(model, batch, mode, way, loss_of, collect);
    }
    let loss = loss_of(&model.hidden(batch, mode)?)?;
    let gradients = loss.backward()?;
    let loss = value(&loss)?;
    collect(Part {
        block: None,
        gradients,
        loss,
    })?;
    Ok(loss)
}

fn value(loss: &Tensor) -> Result<f64> {
    Ok(f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?))
}

/// A block that leads to something trained.
struct Step {
    block: usize,
    input: Tensor,
    /// Its result with the graph, where activations are kept.
    output: Option<Tensor>,
}

fn block_by_block(
    model: &Model,
    batch: &Batch,
    mode: Mode,
    way: Way,
    loss_of: impl FnOnce(&Tensor) -> Result<Tensor>,
    mut collect: impl FnMut(Part) -> Result<()>,
) -> Result<f64> {
    let pass = model.pass(batch, &[], mode);
    // The embedding's graph holds no activations: it stays, and the first block's backward pass runs through it.
    let mut x = model.embed(batch, &pass)?;
    let mut steps: Vec<Step> = Vec::new();
    for block in 0..model.blocks() {
        let input = match steps.is_empty() || way == Way::Recompute {
            true => x,
            false => Var::from_tensor(&x)?.into_inner(),
        };
        let y = model.block(block, &input, &pass)?;
        x = y.detach();
        // Below the first block that leads to something trained no gradient is asked for.
        if y.track_op() || !steps.is_empty() {
            steps.push(Step {
                block,
                input,
                output: (way == Way::Blocks).then_some(y),
            });
        }
    }
    let last = Var::from_tensor(&x)?;
    drop(x);
    let loss_tensor = loss_of(&model.last_norm(&last, &pass)?)?;
    let loss = value(&loss_tensor)?;
    let mut gradients = loss_tensor.backward()?;
    let mut gradient = gradients.remove(&last);
    drop((loss_tensor, last));
    collect(Part {
        block: None,
        gradients,
        loss,
    })?;

    while let Some(Step { block, input, output }) = steps.pop() {
        let Some(dy) = gradient.take() else {
            candle_core::bail!("block {block} gets no gradient");
        };
        let (x, y) = match output {
            Some(y) => (input, y),
            None => {
                let x = match steps.is_empty() {
                    true => input,
                    false => Var::from_tensor(&input)?.into_inner(),
                };
                let y = model.block(block, &x, &pass)?;
                (x, y)
            }
        };
        // The gradient of Σ y·dy is what the whole graph would have handed this block.
        let mut gradients = (y * dy)?.backward()?;
        gradient = gradients.remove(&x);
        collect(Part {
            block: Some(block),
            gradients,
            loss,
        })?;
    }
    Ok(loss)
}
