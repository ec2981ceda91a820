//! The output layer and cross-entropy of candle's own operations, a chunk of rows at a time. As in the kernels the
//! gradients are computed in the forward pass, while a chunk's logits are at hand.

use std::sync::{Mutex, PoisonError};

use candle_core::{Result, Tensor};

use super::given::{Gradients, given};
use super::wide;
use crate::model::ops::{Frozen, Targets};

const OP: &str = "cross_entropy";

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
fn spread(parts: &[Tensor], rows: &[u32], like: &Tensor) -> Result<Tensor> {
    let zeros = like.zeros_like()?;
    if parts.is_empty() {
        return Ok(zeros);
    }
    let rows = Tensor::new(rows, like.device())?;
    zeros.index_add(&rows, &Tensor::cat(parts, 0)?, 0)
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
    fn sums(
        &self,
        hidden: &Tensor,
        down: Option<&Tensor>,
        targets: &Targets,
        with_dw: bool,
        with_gradient: bool,
    ) -> Result<Sums> {
        let device = hidden.device();
        let (rows, vocabulary) = (hidden.dim(0)?, self.weight.dim(0)?);
        let outside = |(row, token): &&(usize, u32)| *row >= rows || *token as usize >= vocabulary;
        if let Some((row, token)) = targets.rows.iter().find(outside) {
            candle_core::bail!("{OP}: row {row} of {rows}, token {token} of {vocabulary}");
        }
        let mut loss = Tensor::zeros((), wide(hidden)?.dtype(), device)?;
        let (mut d_hidden, mut d_down) = (Vec::new(), Vec::new());
        let (mut d_weight, mut d_b, mut d_factors) = (None, None, None);
        for chunk in targets.rows.chunks(targets.chunk.max(1)) {
            let rows: Vec<u32> = chunk.iter().map(|(row, _)| *row as u32).collect();
            let rows = Tensor::new(rows, device)?;
            let tokens: Vec<u32> = chunk.iter().map(|(_, token)| *token).collect();
            let tokens = Tensor::new(tokens, device)?.unsqueeze(1)?;
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
            let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
            let exp = shifted.exp()?;
            let sum = exp.sum_keepdim(1)?;
            let losses = (sum.log()? - shifted.gather(&tokens, 1)?)?;
            loss = (loss + losses.sum_all()?)?;
            if !with_gradient {
                continue;
            }
            let minus_one = Tensor::full(-1f32, tokens.shape(), device)?.to_dtype(exp.dtype())?;
            let mut d_logits = exp.broadcast_div(&sum)?.scatter_add(&tokens, &minus_one, 1)?;
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
        let rows: Vec<u32> = targets.rows.iter().map(|(row, _)| *row as u32).collect();
        Ok(Sums {
            loss,
            d_hidden: spread(&d_hidden, &rows, hidden)?,
            d_down: down.map(|down| spread(&d_down, &rows, down)).transpose()?,
            d_weight,
            d_b,
            d_factors,
        })
    }
}

/// Scales gradients that were kept from the forward pass; they are given away, so that they do not stay in memory.
fn kept(gradients: Vec<Tensor>) -> impl Fn(&[&Tensor], &Tensor) -> Result<Gradients> {
    let kept = Mutex::new(Some(gradients));
    move |args, grad| {
        let Some(gradients) = kept.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            candle_core::bail!("{OP}: backward twice")
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

/// [`frozen_cross_entropy`](crate::model::ops::frozen_cross_entropy).
pub(in crate::model::ops) fn frozen_cross_entropy(
    hidden: &Tensor,
    weight: &Frozen,
    targets: &Targets,
) -> Result<Tensor> {
    let layer = Layer::of(weight, hidden)?;
    let sums = layer.sums(&hidden.detach(), None, targets, false, hidden.track_op())?;
    given(OP, &[hidden], sums.loss, kept(vec![sums.d_hidden]))
}

/// [`cross_entropy`](crate::model::ops::cross_entropy()).
pub(in crate::model::ops) fn cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Targets,
) -> Result<Tensor> {
    let layer = Layer::of(&Frozen::Dense(weight.detach()), hidden)?;
    let sums = layer.sums(&hidden.detach(), None, targets, true, true)?;
    let d_weight = or_zeros(sums.d_weight, weight)?;
    given(
        OP,
        &[hidden, weight],
        sums.loss,
        kept(vec![sums.d_hidden, d_weight]),
    )
}

/// [`lora_cross_entropy`](crate::model::ops::lora_cross_entropy()).
pub(in crate::model::ops) fn lora_cross_entropy(
    hidden: &Tensor,
    weight: &Frozen,
    down: &Tensor,
    lora_b: &Tensor,
    factors: Option<&Tensor>,
    targets: &Targets,
) -> Result<Tensor> {
    let (d, r, dtype) = (hidden.dim(1)?, down.dim(1)?, hidden.dtype());
    let layer = Layer {
        lora_b: Some(lora_b.detach().to_dtype(dtype)?),
        factors: factors.map(|factors| wide(&factors.detach())).transpose()?,
        ..Layer::of(weight, hidden)?
    };
    // An operation of candle has three arguments at most: hidden and down go side by side.
    let x = Tensor::cat(&[hidden, &down.to_dtype(dtype)?], 1)?;
    let part = |from: usize, width: usize| x.detach().narrow(1, from, width)?.contiguous();
    let with_gradient = x.track_op() || lora_b.track_op() || factors.is_some_and(Tensor::track_op);
    let sums = layer.sums(&part(0, d)?, Some(&part(d, r)?), targets, false, with_gradient)?;
    let mut dx = vec![sums.d_hidden];
    dx.extend(sums.d_down);
    let mut gradients = vec![Tensor::cat(&dx, 1)?, or_zeros(sums.d_b, lora_b)?];
    let mut args = vec![&x, lora_b];
    if let Some(factors) = factors {
        gradients.push(or_zeros(sums.d_factors, factors)?);
        args.push(factors);
    }
    given(OP, &args, sums.loss, kept(gradients))
}
