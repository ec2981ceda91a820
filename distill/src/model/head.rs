//! The output layer: a matrix of its own or the embedding, frozen, trained, or frozen under an adapter.

use candle_core::{Result, Tensor};

use super::ops::{Targets, cross_entropy, frozen_cross_entropy, frozen_linear, lora_cross_entropy};
use super::{Lora, Mode, Weight};

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
    pub(super) fn logits(&self, hidden: &Tensor, embed_tokens: &Weight) -> Result<Tensor> {
        let (hidden, weight) = (hidden.detach(), self.weight(embed_tokens));
        match &self.lora {
            Some(lora) => lora.forward(&hidden, weight, Mode::INFERENCE),
            None => frozen_linear(&hidden, &weight.frozen()),
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
        if let Some(lora) = &self.lora {
            return lora_loss(lora, hidden, weight, targets, mode);
        }
        match weight {
            Weight::Dense(weight) if mode.gradient && weight.var().is_some() => {
                cross_entropy(hidden, weight.get(mode), targets)
            }
            weight => frozen_cross_entropy(hidden, &weight.frozen(), targets),
        }
    }
}

fn lora_loss(lora: &Lora, hidden: &Tensor, weight: &Weight, targets: Targets, mode: Mode) -> Result<Tensor> {
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
    lora_cross_entropy(hidden, &frozen, &down, &b, factors.as_ref(), targets)
}
