//! New soft prompts, <https://arxiv.org/abs/2104.08691>. Source: peft/tuners/prompt_tuning/model.py.

use super::start::Start;
use super::virtual_tokens::TENSOR;
use super::{AdapterError, PromptTuningInit, VirtualTokensConfig, VirtualTokensType};
use crate::model::{Model, Parameter, VirtualTokens};
use crate::random::Random;

/// What a new soft prompt looks like, spelled as PEFT's `PromptTuningConfig` spells it.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptOptions {
    /// How many embeddings stand before every sequence, at least 1.
    pub num_virtual_tokens: usize,
    /// What they start from.
    pub init: PromptStart,
}

/// What the embeddings start from.
#[derive(Debug, Clone, PartialEq)]
pub enum PromptStart {
    /// Numbers from N(0, 1).
    Random,
    /// The embeddings of these tokens, which a text was made into; repeated or cut to the number that is needed.
    Text {
        /// The text.
        text: String,
        /// Its tokens, with the special ones that the tokenizer adds.
        ids: Vec<u32>,
    },
    /// The embeddings of random tokens.
    SampleVocab,
}

/// Puts a new soft prompt on a model. Returns the configuration as it is to be saved.
pub fn add(
    model: &mut Model,
    options: &PromptOptions,
    base: &str,
    random: &mut Random,
) -> Result<VirtualTokensConfig, AdapterError> {
    let (n, d) = (options.num_virtual_tokens, model.config().hidden_size);
    let vocabulary = model.config().vocab_size;
    let mut config = VirtualTokensConfig::new(VirtualTokensType::Prompt, n, model.config(), base);
    let (init, ids) = match &options.init {
        PromptStart::Random => (PromptTuningInit::Random, None),
        PromptStart::SampleVocab => {
            let ids: Vec<u32> = (0..n).map(|_| random.below(vocabulary) as u32).collect();
            (PromptTuningInit::SampleVocab, Some(ids))
        }
        PromptStart::Text { text, ids } => {
            if ids.is_empty() {
                return Err(AdapterError::Conflict {
                    why: format!("prompt_tuning_init_text {text:?} has no token"),
                });
            }
            config.prompt_tuning_init_text = Some(text.clone());
            config.tokenizer_name_or_path = Some(base.to_owned());
            (
                PromptTuningInit::Text,
                Some(ids.iter().copied().cycle().take(n).collect()),
            )
        }
    };
    config.prompt_tuning_init = Some(init);
    let embeddings = match ids {
        Some(ids) => Parameter::trained(TENSOR.into(), &model.embeddings_of(&ids)?)?,
        None => Start::Normal(1.0).parameter(TENSOR.into(), &[n, d], random)?,
    };
    model.set_virtual_tokens(VirtualTokens::Prompt(embeddings));
    Ok(config)
}
