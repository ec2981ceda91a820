//! The embedding of tokens: a table that is frozen, trained, or frozen under an adapter.

use candle_core::{Result, Tensor};

use super::ops::{embedding, frozen_embedding};
use super::{EmbeddingLora, Mode, Weight};
use crate::batch::Batch;

/// A table of tokens.
#[derive(Debug)]
pub struct Embedding {
    /// `[vocabulary, hidden_size]`.
    pub weight: Weight,
    /// The adapter.
    pub lora: Option<EmbeddingLora>,
}

impl Embedding {
    /// The module's name: the weight's without `.weight`.
    pub fn module(&self) -> &str {
        self.weight.name().trim_end_matches(".weight")
    }

    /// The rows of a batch's tokens, `[tokens, hidden_size]`.
    pub(super) fn forward(&self, batch: &Batch, mode: Mode) -> Result<Tensor> {
        let rows = match &self.weight {
            Weight::Dense(table) if mode.gradient && table.var().is_some() => {
                embedding(table.get(mode), batch.ids())?
            }
            table => frozen_embedding(&table.frozen(), batch.ids())?,
        };
        match &self.lora {
            Some(lora) => lora.forward(&rows, batch.ids(), &self.weight, mode),
            None => Ok(rows),
        }
    }
}
