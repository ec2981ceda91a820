//! The output layer: a matrix of its own or the embedding, frozen, trained, or frozen under an adapter.

use candle_core::{Result, Tensor};

use super::ops::{
    Distillation, Frozen, HeadAdapter, Targets, cross_entropy, distillation_loss, frozen_cross_entropy,
    frozen_distillation_loss, lora_cross_entropy, lora_distillation_loss,
};
use super::{Lora, Mode, Weight};
use crate::loss::Measures;

/// The output layer of a model.
#[derive(Debug)]
pub struct Head {
    /// `[vocabulary, hidden_size]`; none where the matrix is the embedding's.
    pub weight: Option<Weight>,
    /// The adapter. Its matrix may be the embedding's too: then the embedding does not get the adapter.
    pub lora: Option<Lora>,
}

/// The output layer's name, whether or not it has a matrix of its own.
pub const HEAD: &str = "lm_head";

impl Head {
    /// The matrix.
    pub(super) fn weight<'a>(&'a self, embed_tokens: &'a Weight) -> &'a Weight {
        self.weight.as_ref().unwrap_or(embed_tokens)
    }

    /// The logits of hidden states, `[rows, hidden_size]` → `[rows, vocabulary]`, without a gradient.
    pub(super) fn logits(&self, hidden: &Tensor, embed_tokens: &Weight, mode: Mode) -> Result<Tensor> {
        let (hidden, weight) = (hidden.detach(), self.weight(embed_tokens));
        match &self.lora {
            Some(lora) => lora.forward(&hidden, weight, mode),
            None => weight.product(&hidden, mode),
        }
    }

    /// The sum of −log p over the targets, a scalar, with a gradient of all that is trained.
    pub(super) fn loss(
        &self,
        hidden: &Tensor,
        embed_tokens: &Weight,
        targets: Targets,
        mode: Mode,
    ) -> Result<Tensor> {
        let weight = self.weight(embed_tokens);
        match self.kind(weight, mode) {
            Kind::Trained(weight) => cross_entropy(hidden, weight, targets),
            Kind::Frozen => frozen_cross_entropy(hidden, &weight.frozen(), targets),
            Kind::Adapted(lora) => adapted(lora, hidden, weight, mode, |weight, adapter| {
                lora_cross_entropy(hidden, weight, adapter, targets)
            }),
        }
    }

    /// The sum of a loss against a teacher, likewise, and its parts.
    pub(super) fn distillation_loss(
        &self,
        hidden: &Tensor,
        embed_tokens: &Weight,
        distillation: Distillation,
        mode: Mode,
    ) -> Result<(Tensor, Measures)> {
        let weight = self.weight(embed_tokens);
        match self.kind(weight, mode) {
            Kind::Trained(weight) => distillation_loss(hidden, weight, distillation),
            Kind::Frozen => frozen_distillation_loss(hidden, &weight.frozen(), distillation),
            Kind::Adapted(lora) => adapted(lora, hidden, weight, mode, |weight, adapter| {
                lora_distillation_loss(hidden, weight, adapter, distillation)
            }),
        }
    }

    fn kind<'a>(&'a self, weight: &'a Weight, mode: Mode) -> Kind<'a> {
        match (&self.lora, weight) {
            (Some(lora), _) if !mode.base => Kind::Adapted(lora),
            (_, Weight::Dense(weight)) if mode.gradient && weight.var().is_some() => {
                Kind::Trained(weight.get(mode))
            }
            _ => Kind::Frozen,
        }
    }
}

/// What of the layer gets gradients.
enum Kind<'a> {
    Trained(&'a Tensor),
    Frozen,
    Adapted(&'a Lora),
}

/// Calls `loss` with what an adapter does to the layer.
fn adapted<R>(
    lora: &Lora,
    hidden: &Tensor,
    weight: &Weight,
    mode: Mode,
    loss: impl FnOnce(&Frozen, HeadAdapter<'_>) -> Result<R>,
) -> Result<R> {
    let frozen = weight.frozen();
    let (mut down, mut b) = (lora.down(hidden, weight, mode)?, lora.b.get(mode).clone());
    // A bias is one more column of B, whose input is always the scale.
    if let Some(bias) = &lora.bias {
        let ones = Tensor::ones((down.dim(0)?, 1), down.dtype(), down.device())?;
        down = Tensor::cat(&[&down, &(ones * lora.scale)?], 1)?;
        b = Tensor::cat(&[&b, &bias.get(mode).unsqueeze(1)?], 1)?.contiguous()?;
    }
    let magnitude = lora.magnitude.as_ref();
    let factors = magnitude
        .map(|magnitude| lora.factors(magnitude, &frozen, mode))
        .transpose()?;
    let adapter = HeadAdapter {
        down: &down,
        b: &b,
        factors: factors.as_ref(),
    };
    loss(&frozen, adapter)
}
