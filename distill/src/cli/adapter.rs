//! The adapter that `sft` trains: a new one as the options say, or a stored one.

use super::UsageError;
use super::options::{Method, SftConfig};
use crate::adapter::{
    Adapter, LoraOptions, PrefixOptions, PromptOptions, PromptStart, PromptTuningInit, Targets,
    VirtualTokensType, lora, prefix, prompt,
};
use crate::data::Encoder;
use crate::model::Model;
use crate::random::Random;

/// Puts the adapter on the model; none where all weights are trained. A stored adapter decides the method.
pub(super) fn put_on(
    model: &mut Model,
    encoder: &Encoder,
    config: &mut SftConfig,
    method_is_given: bool,
) -> anyhow::Result<Option<Adapter>> {
    let base = config.model.to_string_lossy().into_owned();
    if !config.adapter.as_os_str().is_empty() {
        let adapter = Adapter::load(model, &config.adapter)?.of_base(&base);
        // A stored LoRA goes on over whichever base is asked for.
        let method = match (method_of(&adapter), config.method) {
            (Method::Lora, Method::Qlora) => Method::Qlora,
            (method, _) => method,
        };
        if method_is_given && method != config.method {
            anyhow::bail!(UsageError::Usage(format!(
                "--method is {}, but {} is for {}",
                config.method.name(),
                config.adapter.display(),
                method.name()
            )));
        }
        config.method = method;
        return Ok(Some(adapter));
    }
    let mut random = Random::new(config.seed, "adapter");
    Ok(match config.method {
        Method::Full => None,
        Method::Lora | Method::Qlora => Some(Adapter::Lora(lora::add(
            model,
            &lora_options(config),
            &base,
            &mut random,
        )?)),
        Method::Prompt => {
            let options = PromptOptions {
                num_virtual_tokens: config.num_virtual_tokens,
                init: match config.prompt_tuning_init {
                    PromptTuningInit::Random => PromptStart::Random,
                    PromptTuningInit::SampleVocab => PromptStart::SampleVocab,
                    PromptTuningInit::Text => PromptStart::Text {
                        ids: encoder.tokens(&config.prompt_tuning_init_text)?,
                        text: config.prompt_tuning_init_text.clone(),
                    },
                },
            };
            Some(Adapter::VirtualTokens(prompt::add(
                model,
                &options,
                &base,
                &mut random,
            )?))
        }
        Method::Prefix => {
            let options = PrefixOptions {
                num_virtual_tokens: config.num_virtual_tokens,
                prefix_projection: config.prefix_projection,
                encoder_hidden_size: Some(config.encoder_hidden_size).filter(|width| *width > 0),
            };
            Some(Adapter::VirtualTokens(prefix::add(
                model,
                &options,
                &base,
                &mut random,
            )?))
        }
    })
}

fn method_of(adapter: &Adapter) -> Method {
    match adapter {
        Adapter::Lora(_) => Method::Lora,
        Adapter::VirtualTokens(config) => match config.peft_type {
            VirtualTokensType::Prompt => Method::Prompt,
            VirtualTokensType::Prefix => Method::Prefix,
        },
    }
}

fn lora_options(config: &SftConfig) -> LoraOptions {
    LoraOptions {
        r: config.r,
        lora_alpha: config.lora_alpha,
        lora_dropout: config.lora_dropout,
        use_rslora: config.use_rslora,
        use_dora: config.use_dora,
        lora_bias: config.lora_bias,
        bias: config.bias,
        init_lora_weights: config.init_lora_weights,
        rank_pattern: config.rank_pattern.clone(),
        alpha_pattern: config.alpha_pattern.clone(),
        targets: Targets {
            target_modules: config.target_modules.clone(),
            exclude_modules: config.exclude_modules.clone(),
            layers_to_transform: config.layers_to_transform.0.clone(),
            layers_pattern: config.layers_pattern.0.clone(),
            modules_to_save: config.modules_to_save.0.clone(),
        },
    }
}
