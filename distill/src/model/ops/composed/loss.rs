//! The output layer and a loss over its logits, of candle's own operations, a chunk of rows at a time. As in the kernels the
//! gradients are computed in the forward pass, while a chunk's logits are at hand.

use std::sync::{Mutex, PoisonError};

use candle_core::{Result, Tensor};

use super::given::{Gradients, given};
use super::{rows_at, wide};
use crate::model::ops::head_loss::Criterion;
use crate::model::ops::{Frozen, HeadAdapter};

/// What makes logits of hidden states: (hidden·Wᵀ + down·Bᵀ) ∘ factors, in the type of the hidden states but for the
/// factors.
struct Layer {
    weight: Tensor,
    /// The adapter's B.
    lora_b: Option<Tensor>,
    /// DoRA's factors.
    factors: Option<Tensor>,
}

/// The loss, and the gradients by the hidden states and what else is asked for.
struct Sums {
    loss: Tensor,
    d_hidden: Tensor,
    d_down: Option<Tensor>,
    d_weight: Option<Tensor>,
    d_b: Option<Tensor>,
    d_factors: Option<Tensor>,
}

/// What `sum` becomes with one more part.
fn add(sum: &mut Option<Tensor>, part: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => (sum + part)?,
        None => part,
    });
    Ok(())
}

/// The parts of some rows as a whole of `like`'s size; the other rows are zero.
fn spread(parts: &[Tensor], rows: &[(usize, u32)], like: &Tensor) -> Result<Tensor> {
    if parts.is_empty() {
        return like.zeros_like();
    }
    let mut from = vec![None; like.dim(0)?];
    for (i, (row, _)) in rows.iter().enumerate() {
        from[*row] = Some(i);
    }
    rows_at(&Tensor::cat(parts, 0)?, &from)
}

impl Layer {
    fn of(weight: &Frozen, hidden: &Tensor) -> Result<Self> {
        Ok(Self {
            weight: weight.on(hidden.device(), hidden.dtype())?,
            lora_b: None,
            factors: None,
        })
    }

    /// hidden `[rows, d]`, down `[rows, r]` where there is an adapter.
    fn sums<C: Criterion>(
        &self,
        hidden: &Tensor,
        down: Option<&Tensor>,
        criterion: &C,
        with_dw: bool,
        with_gradient: bool,
    ) -> Result<Sums> {
        let (device, targets) = (hidden.device(), criterion.targets());
        targets.check(C::NAME, hidden.dim(0)?, self.weight.dim(0)?)?;
        let mut loss = Tensor::zeros((), wide(hidden)?.dtype(), device)?;
        let (mut d_hidden, mut d_down) = (Vec::new(), Vec::new());
        let (mut d_weight, mut d_b, mut d_factors) = (None, None, None);
        for (first, chunk) in targets.chunks() {
            let rows: Vec<u32> = chunk.iter().map(|(row, _)| *row as u32).collect();
            let rows = Tensor::new(rows, device)?;
            let x = hidden.index_select(&rows, 0)?;
            let mut logits = wide(&x.matmul(&self.weight.t()?)?)?;
            let adapter = match (&self.lora_b, down) {
                (Some(b), Some(down)) => Some((b, down.index_select(&rows, 0)?)),
                _ => None,
            };
            if let Some((b, down)) = &adapter {
                logits = (logits + wide(&down.matmul(&b.t()?)?)?)?;
            }
            let before = logits.clone();
            if let Some(factors) = &self.factors {
                logits = logits.broadcast_mul(factors)?;
            }
            let (of_chunk, d_logits) = criterion.compute_there(first, &logits, with_gradient)?;
            loss = (loss + of_chunk)?;
            let Some(mut d_logits) = d_logits.filter(|_| with_gradient) else {
                continue;
            };
            if let Some(factors) = &self.factors {
                add(&mut d_factors, (&d_logits * before)?.sum(0)?)?;
                d_logits = d_logits.broadcast_mul(factors)?;
            }
            let d_logits = d_logits.to_dtype(x.dtype())?;
            d_hidden.push(d_logits.matmul(&self.weight)?);
            if with_dw {
                add(&mut d_weight, wide(&d_logits.t()?.matmul(&x)?)?)?;
            }
            if let Some((b, down)) = &adapter {
                add(&mut d_b, wide(&d_logits.t()?.matmul(down)?)?)?;
                d_down.push(d_logits.matmul(b)?);
            }
        }
        Ok(Sums {
            loss,
            d_hidden: spread(&d_hidden, &targets.rows, hidden)?,
            d_down: down
                .map(|down| spread(&d_down, &targets.rows, down))
                .transpose()?,
            d_weight,
            d_b,
            d_factors,
        })
    }
}

/// Scales gradients that were kept from the forward pass; they are given away, so that they do not stay in memory.
fn kept(name: &'static str, gradients: Vec<Tensor>) -> impl Fn(&[&Tensor], &Tensor) -> Result<Gradients> {
    let kept = Mutex::new(Some(gradients));
    move |args, grad| {
        let Some(gradients) = kept.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            candle_core::bail!("{name}: backward twice")
        };
        // In f32: a large factor (fp16's) does not fit into a short type.
        let scaled = |(gradient, arg): (Tensor, &&Tensor)| {
            let scaled = wide(&gradient)?.broadcast_mul(&wide(grad)?)?;
            scaled.to_dtype(arg.dtype()).map(Some)
        };
        gradients.into_iter().zip(args).map(scaled).collect()
    }
}

/// A sum that had no part: zeros.
fn or_zeros(sum: Option<Tensor>, like: &Tensor) -> Result<Tensor> {
    sum.map_or_else(|| like.zeros_like(), Ok)
}

/// [`frozen_head_loss`](crate::model::ops::head_loss::frozen_head_loss).
pub(in crate::model::ops) fn frozen_head_loss<C: Criterion>(
    hidden: &Tensor,
    weight: &Frozen,
    criterion: &C,
) -> Result<Tensor> {
    let layer = Layer::of(weight, hidden)?;
    let sums = layer.sums(&hidden.detach(), None, criterion, false, hidden.track_op())?;
    given(C::NAME, &[hidden], sums.loss, kept(C::NAME, vec![sums.d_hidden]))
}

/// [`head_loss`](crate::model::ops::head_loss::head_loss).
pub(in crate::model::ops) fn head_loss<C: Criterion>(
    hidden: &Tensor,
    weight: &Tensor,
    criterion: &C,
) -> Result<Tensor> {
    let layer = Layer::of(&Frozen::Dense(weight.detach()), hidden)?;
    let sums = layer.sums(&hidden.detach(), None, criterion, true, true)?;
    let d_weight = or_zeros(sums.d_weight, weight)?;
    let gradients = kept(C::NAME, vec![sums.d_hidden, d_weight]);
    given(C::NAME, &[hidden, weight], sums.loss, gradients)
}

/// [`lora_head_loss`](crate::model::ops::lora_head_loss::lora_head_loss).
pub(in crate::model::ops) fn lora_head_loss<C: Criterion>(
    hidden: &Tensor,
    weight: &Frozen,
    adapter: HeadAdapter<'_>,
    criterion: &C,
) -> Result<Tensor> {
    let HeadAdapter { down, b, factors } = adapter;
    let (d, r, dtype) = (hidden.dim(1)?, down.dim(1)?, hidden.dtype());
    let layer = Layer {
        lora_b: Some(b.detach().to_dtype(dtype)?),
        factors: factors.map(|factors| wide(&factors.detach())).transpose()?,
        ..Layer::of(weight, hidden)?
    };
    // An operation of candle has three arguments at most: hidden and down go side by side.
    let x = Tensor::cat(&[hidden, &down.to_dtype(dtype)?], 1)?;
    let part = |from: usize, width: usize| x.detach().narrow(1, from, width)?.contiguous();
    let with_gradient = x.track_op() || b.track_op() || factors.is_some_and(Tensor::track_op);
    let sums = layer.sums(&part(0, d)?, Some(&part(d, r)?), criterion, false, with_gradient)?;
    let mut dx = vec![sums.d_hidden];
    dx.extend(sums.d_down);
    let mut gradients = vec![Tensor::cat(&dx, 1)?, or_zeros(sums.d_b, b)?];
    let mut args = vec![&x, b];
    if let Some(factors) = factors {
        gradients.push(or_zeros(sums.d_factors, factors)?);
        args.push(factors);
    }
    given(C::NAME, &args, sums.loss, kept(C::NAME, gradients))
}
