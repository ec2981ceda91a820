//! The gradients of one forward pass: over one graph of the whole model, or block by block with the activations
//! computed again (activation checkpointing, <https://arxiv.org/abs/1604.06174>).
//!
//! Both give the same bits. Recomputing keeps, of every block, its input only (`rows · hidden_size` numbers) and holds
//! the graph of one block at a time, for one more forward pass through the blocks.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};

use crate::batch::Batch;
use crate::model::{Mode, Model};

/// Runs a batch forward and backward; returns the loss. `loss_of` makes a scalar of the hidden states after the last
/// norm. `collect` gets gradients as they come: with `recompute` once for every block, and a tensor that several blocks
/// use several times, to be added up.
pub(super) fn backward(
    model: &Model,
    batch: &Batch,
    mode: Mode,
    recompute: bool,
    loss_of: impl FnOnce(&Tensor) -> Result<Tensor>,
    mut collect: impl FnMut(GradStore) -> Result<()>,
) -> Result<f64> {
    if recompute {
        return block_by_block(model, batch, mode, loss_of, collect);
    }
    let loss = loss_of(&model.hidden(batch, mode)?)?;
    collect(loss.backward()?)?;
    value(&loss)
}

fn value(loss: &Tensor) -> Result<f64> {
    loss.to_dtype(DType::F64)?.to_scalar()
}

fn block_by_block(
    model: &Model,
    batch: &Batch,
    mode: Mode,
    loss_of: impl FnOnce(&Tensor) -> Result<Tensor>,
    mut collect: impl FnMut(GradStore) -> Result<()>,
) -> Result<f64> {
    let pass = model.pass(batch, &[], mode);
    // The embedding's graph holds no activations: it stays, and the first block's backward pass runs through it.
    let mut x = model.embed(batch, &pass)?;
    let mut inputs: Vec<(usize, Tensor)> = Vec::new();
    for i in 0..model.blocks() {
        let y = model.block(i, &x, &pass)?;
        // Below the first block that leads to something trained no gradient is asked for.
        if y.track_op() || !inputs.is_empty() {
            inputs.push((i, x));
        }
        x = y.detach();
    }
    let last = Var::from_tensor(&x)?;
    drop(x);
    let loss = loss_of(&model.last_norm(&last, &pass)?)?;
    let loss_value = value(&loss)?;
    let mut store = loss.backward()?;
    let mut gradient = store.remove(&last);
    drop((loss, last));
    collect(store)?;

    while let Some((i, input)) = inputs.pop() {
        let Some(dy) = gradient.take() else {
            candle_core::bail!("block {i} gets no gradient");
        };
        // The gradient of Σ y·dy is what the whole graph would have handed this block.
        let x = match inputs.is_empty() {
            true => input,
            false => Var::from_tensor(&input)?.into_inner(),
        };
        let y = model.block(i, &x, &pass)?;
        let mut store = (y * dy)?.sum_all()?.backward()?;
        gradient = store.remove(&x);
        collect(store)?;
    }
    Ok(loss_value)
}
