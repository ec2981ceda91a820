//! The embedding of tokens: a table that is frozen, trained, or frozen under an adapter.

use candle_core::{Result, Tensor};

use super::ops::{embedding, frozen_embedding};
use super::{EmbeddingLora, Mode, Weight};
use crate::batch::Batch;
use crate::device::Place;

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

    /// The rows of a batch's tokens, `[tokens, hidden_size]`, where the model computes.
    pub(super) fn forward(&self, batch: &Batch, mode: Mode, place: &Place) -> Result<Tensor> {
        let rows = match &self.weight {
            Weight::Dense(table) if mode.gradient && table.var().is_some() => {
                embedding(table.get(mode), batch.ids())?
            }
            table => frozen_embedding(&table.frozen(), batch.ids())?,
        };
        let rows = place.put(&rows)?;
        match &self.lora {
            Some(lora) if !mode.base => lora.forward(&rows, batch.ids(), &self.weight, mode),
            _ => Ok(rows),
        }
    }
}
