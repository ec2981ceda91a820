//! The model that is trained goes on with sequences.

use candle_core::{DType, Result, Tensor};

use super::Decode;
use crate::batch::Batch;
use crate::model::{KvCache, Model};

/// A model with the keys and values of its open sequences.
#[derive(Debug)]
pub struct Student<'a> {
    model: &'a Model,
    cache: KvCache,
}

impl<'a> Student<'a> {
    /// Without any open sequence.
    pub fn new(model: &'a Model) -> Result<Self> {
        Ok(Self {
            model,
            cache: model.cache(0)?,
        })
    }

    /// The logits behind the last token of every sequence of a batch.
    fn last_logits(&self, batch: &Batch, hidden: &Tensor) -> Result<Vec<f32>> {
        let starts = batch.starts();
        let last: Vec<u32> = starts.windows(2).map(|w| (w[1] - 1) as u32).collect();
        let rows = Tensor::from_vec(last, starts.len() - 1, hidden.device())?;
        let logits = self.model.drawn_logits(&hidden.index_select(&rows, 0)?)?;
        logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
    }
}

impl Decode for Student<'_> {
    type Error = candle_core::Error;

    fn longest(&self) -> usize {
        self.model.longest()
    }

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    /// A pass of many rows copies every weight first, whatever their number.
    fn worth_opening(&self, width: usize) -> usize {
        width.div_ceil(2)
    }

    fn open(&mut self, prompts: &[&[u32]], copies: usize) -> Result<Vec<f32>> {
        let mut cache = self.model.cache(prompts.len())?;
        let batch = Batch::unlabelled(prompts.iter().copied());
        let hidden = self.model.hidden_cached(&batch, &mut cache)?;
        cache.repeat(copies)?;
        self.cache.append(cache)?;
        self.last_logits(&batch, &hidden)
    }

    fn retain(&mut self, keep: &[bool]) -> Result<()> {
        self.cache.retain(keep)
    }

    fn next(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let batch = Batch::unlabelled(tokens.chunks(1));
        // Among rayon's threads: for one that is not, each of some hundred short loops would wait to be taken up.
        rayon::scope(|_| {
            let hidden = self.model.hidden_cached(&batch, &mut self.cache)?;
            self.last_logits(&batch, &hidden)
        })
    }
}
