//! The model that a command trains, with its adapter and its tokenizer.

use std::path::Path;

use super::options::{Method, SftConfig};
use super::{UsageError, adapter};
use crate::adapter::Adapter;
use crate::data::{Encoder, Prompt, Rows};
use crate::evaluate::{Answer, answers};
use crate::export::save_checkpoint;
use crate::model::{Keep, Model};
use crate::rollout::Stop;
use crate::trainer::checkpoint::Cause;

/// Answers in samples.jsonl, and their length.
const SAMPLES: usize = 8;
const SAMPLE_TOKENS: usize = 128;

/// The model that is trained.
pub(super) struct Opened {
    pub(super) model: Model,
    pub(super) adapter: Option<Adapter>,
    pub(super) encoder: Encoder,
}

impl Opened {
    /// Opens the model, puts the adapter on it, and decides `max_length` where it is not given.
    pub(super) fn new(config: &mut SftConfig, method_is_given: bool) -> anyhow::Result<Self> {
        let keep = match config.method {
            Method::Full => Keep::Trained,
            Method::Lora | Method::Prompt | Method::Prefix => Keep::Frozen,
            Method::Qlora => Keep::Nf4 {
                double_quant: config.bnb_4bit_use_double_quant,
            },
        };
        let place = super::place(&config.device, config.bf16, config.fp16)?;
        let mut model = Model::open_on(&config.model, keep, &place)?;
        let encoder = Encoder::open(&config.model, model.config().vocab_size)?;
        let adapter = adapter::put_on(&mut model, &encoder, config, method_is_given)?;
        let longest = model.longest();
        if config.max_length == 0 {
            config.max_length = longest.min(1024);
        }
        if config.max_length > longest {
            let knows = model.config().max_position_embeddings;
            anyhow::bail!(UsageError::Usage(format!(
                "--max-length is {}, but the model was made for {knows} tokens (max_position_embeddings){}",
                config.max_length,
                if longest < knows {
                    ", virtual ones among them"
                } else {
                    ""
                }
            )));
        }
        if longest < 2 {
            anyhow::bail!(UsageError::Usage(
                "--num-virtual-tokens leaves no room for a sequence".into()
            ));
        }
        Ok(Self {
            model,
            adapter,
            encoder,
        })
    }

    /// The prompts of the first rows that have one which leaves room for an answer.
    pub(super) fn prompts(&self, path: &Path, rows: &Rows) -> anyhow::Result<Vec<Prompt>> {
        let longest = self.model.longest();
        let mut prompts = Vec::new();
        for row in rows.rows.iter().flatten() {
            let prompt = self.encoder.prompt(path, row)?;
            prompts.extend(prompt.filter(|prompt| (1..longest).contains(&prompt.ids.len())));
            if prompts.len() == SAMPLES {
                break;
            }
        }
        Ok(prompts)
    }

    /// Greedy answers to prompts.
    pub(super) fn answers(&self, prompts: &[Prompt]) -> anyhow::Result<Vec<Answer>> {
        let (model, encoder) = (&self.model, &self.encoder);
        let stop = Stop::within(encoder.eos(), SAMPLE_TOKENS, model.longest(), prompts);
        Ok(answers(model, prompts, &stop, |ids| encoder.decode(ids))?)
    }

    /// Writes what is trained into a folder: the adapter, or a checkpoint like `base`.
    pub(super) fn export(&self, base: &Path, dir: &Path) -> Result<(), Cause> {
        match &self.adapter {
            Some(adapter) => adapter.save(&self.model, dir).map_err(Into::into),
            None => save_checkpoint(&self.model, base, dir).map_err(Into::into),
        }
    }
}
