//! Low-rank adapters on linear layers and on embeddings, with DoRA's magnitudes where there are.
//! Source: peft/tuners/lora/{layer,dora,variants}.py.

use std::sync::{Mutex, PoisonError};

use candle_core::{Result, Tensor};

use super::ops::{
    Adapted, Dropout, Frozen, drawn_linear, embedding, frozen_linear, is_composed, linear, lora_linear,
};
use super::{Mode, Parameter, Weight};
use crate::random::mix;

/// An adapter on a linear layer: it adds `scale · (lora_b · lora_a · x + bias)`.
#[derive(Debug)]
pub struct Lora {
    /// `[r, in]`.
    pub a: Parameter,
    /// `[out, r]`.
    pub b: Parameter,
    /// `lora_B.bias`, `[out]` (`lora_bias`).
    pub bias: Option<Parameter>,
    /// DoRA's lengths of the rows, `[out]`.
    pub magnitude: Option<Magnitude>,
    /// `alpha / r`, or `alpha / √r`.
    pub scale: f64,
    /// The chance with which an input of A is dropped while training.
    pub dropout: f64,
}

/// An adapter on an embedding: it adds `scale · lora_embedding_a[token] · lora_embedding_bᵀ` to a token's row.
#[derive(Debug)]
pub struct EmbeddingLora {
    /// `[vocabulary, r]`: PEFT has it transposed, here a token's numbers stand together.
    pub a: Parameter,
    /// `[hidden_size, r]`.
    pub b: Parameter,
    /// DoRA's lengths of the columns, `[hidden_size]`.
    pub magnitude: Option<Magnitude>,
    /// `alpha / r`, or `alpha / √r`.
    pub scale: f64,
}

/// DoRA's trained lengths, and the lengths that the matrix has, for as long as the adapter stays as it is.
#[derive(Debug)]
pub struct Magnitude {
    /// The trained lengths.
    pub parameter: Parameter,
    known: Mutex<Option<Known>>,
}

/// The lengths that belong to these values of A and B.
#[derive(Debug)]
struct Known {
    values: [Vec<f32>; 2],
    norms: Tensor,
}

impl Magnitude {
    /// Around trained lengths.
    pub fn new(parameter: Parameter) -> Self {
        Self {
            parameter,
            known: Mutex::new(None),
        }
    }

    /// What every output is multiplied by: the trained lengths through the ones that the matrix has, which are
    /// constants to the gradient. They are computed anew when A or B changed: a generation does it once.
    fn factors(
        &self,
        pair: [&Parameter; 2],
        mode: Mode,
        norms: impl Fn() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let magnitude = self.parameter.get(mode);
        // On a device it is quicker to compute them than to look at A and B.
        if is_composed(magnitude) {
            return magnitude / norms()?;
        }
        let values = |parameter: &Parameter| parameter.get(Mode::INFERENCE).flatten_all()?.to_vec1::<f32>();
        let values = [values(pair[0])?, values(pair[1])?];
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let norms = match &*known {
            Some(known) if known.values == values => known.norms.clone(),
            _ => {
                let norms = norms()?;
                *known = Some(Known {
                    values,
                    norms: norms.clone(),
                });
                norms
            }
        };
        magnitude / norms
    }
}

impl Lora {
    /// Everything of it that is trained.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let magnitude = self.magnitude.as_ref().map(|magnitude| &magnitude.parameter);
        [&self.a, &self.b].into_iter().chain(&self.bias).chain(magnitude)
    }

    /// This pass's dropout at the module of this name.
    fn dropout(&self, module: &str, mode: Mode) -> Option<Dropout> {
        let seed = mode.dropout_seed.filter(|_| self.dropout > 0.0)?;
        Some(Dropout {
            chance: self.dropout,
            seed: module
                .bytes()
                .fold(seed, |hash, byte| mix(hash ^ u64::from(byte))),
        })
    }

    /// x `[rows, in]` through the frozen weight and the adapter → `[rows, out]`, without the layer's own bias.
    pub(super) fn forward(&self, x: &Tensor, weight: &Weight, mode: Mode) -> Result<Tensor> {
        let (frozen, dropout) = (weight.frozen(), self.dropout(weight.name(), mode));
        let y = match &self.magnitude {
            None => self.product(x, &frozen, mode, dropout)?,
            Some(magnitude) => {
                let factors = self.factors(magnitude, &frozen, mode)?.to_dtype(x.dtype())?;
                match dropout {
                    None => self.product(x, &frozen, mode, None)?.broadcast_mul(&factors)?,
                    // PEFT drops the inputs of the whole product that the magnitudes multiply, and keeps the base's.
                    Some(dropout) => {
                        let dropped = (x * dropout.mask(x)?)?;
                        let kept = frozen_linear(&(x - &dropped)?, &frozen)?;
                        let product = self.product(&dropped, &frozen, mode, None)?;
                        (kept + product.broadcast_mul(&factors)?)?
                    }
                }
            }
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(&(bias.get(mode) * self.scale)?.to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }

    /// x·(W + scale·B·A)ᵀ.
    fn product(&self, x: &Tensor, weight: &Frozen, mode: Mode, dropout: Option<Dropout>) -> Result<Tensor> {
        let (a, b) = (self.a.get(mode), self.b.get(mode));
        if !mode.drawn || is_composed(x) {
            return lora_linear(x, weight, a, b, self.scale, dropout);
        }
        let down = drawn_linear(x, &Frozen::Dense(a.clone()))?;
        let low_rank = drawn_linear(&down, &Frozen::Dense(b.clone()))?;
        drawn_linear(x, weight)? + (low_rank * self.scale)?
    }

    /// What every output of the layer is multiplied by, `[out]`, where the adapter is DoRA's.
    pub(super) fn factors(&self, magnitude: &Magnitude, weight: &Frozen, mode: Mode) -> Result<Tensor> {
        magnitude.factors([&self.a, &self.b], mode, || self.row_norms(weight))
    }

    /// The lengths of the rows of W + scale·B·A, `[out]`.
    pub(super) fn row_norms(&self, weight: &Frozen) -> Result<Tensor> {
        let (left, right) = (self.b.get(Mode::INFERENCE), self.a.get(Mode::INFERENCE));
        let scale = self.scale;
        Adapted {
            weight,
            left,
            right,
            scale,
        }
        .row_norms()
    }

    /// `scale · lora_a · drop(x)`, `[rows, r]`: what the output layer's loss takes up.
    pub(super) fn down(&self, x: &Tensor, weight: &Weight, mode: Mode) -> Result<Tensor> {
        let dropped = match self.dropout(weight.name(), mode) {
            Some(dropout) => (x * dropout.mask(x)?)?,
            None => x.clone(),
        };
        linear(&dropped, self.a.get(mode))? * self.scale
    }
}

impl EmbeddingLora {
    /// Everything of it that is trained.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let magnitude = self.magnitude.as_ref().map(|magnitude| &magnitude.parameter);
        [&self.a, &self.b].into_iter().chain(magnitude)
    }

    /// The rows of tokens with the adapter, from the rows without it, `[rows, hidden_size]`.
    pub(super) fn forward(
        &self,
        rows: &Tensor,
        ids: &std::sync::Arc<[u32]>,
        weight: &Weight,
        mode: Mode,
    ) -> Result<Tensor> {
        let added = linear(&embedding(self.a.get(mode), ids)?, self.b.get(mode))?;
        let sum = (rows + (added * self.scale)?.to_dtype(rows.dtype())?)?;
        let Some(magnitude) = &self.magnitude else {
            return Ok(sum);
        };
        let factors = magnitude.factors([&self.a, &self.b], mode, || self.column_norms(&weight.frozen()))?;
        sum.broadcast_mul(&factors.to_dtype(sum.dtype())?)
    }

    /// The lengths of the columns of W + scale·A·Bᵀ, `[hidden_size]`.
    pub(super) fn column_norms(&self, weight: &Frozen) -> Result<Tensor> {
        let right = self.b.get(Mode::INFERENCE).t()?.contiguous()?;
        let (left, scale) = (self.a.get(Mode::INFERENCE), self.scale);
        let right = &right;
        Adapted {
            weight,
            left,
            right,
            scale,
        }
        .column_norms()
    }
}
