//! New prefixes, <https://arxiv.org/abs/2101.00190>. Source: peft/tuners/prefix_tuning/model.py.

use super::start::Start;
use super::virtual_tokens::block_name;
use super::{AdapterError, VirtualTokensConfig, VirtualTokensType};
use crate::model::{Model, Prefix, PrefixBlock, Projection, VirtualTokens};
use crate::random::Random;

/// What a new prefix looks like, spelled as PEFT's `PrefixTuningConfig` spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixOptions {
    /// How many keys and values stand before those of every block, at least 1.
    pub num_virtual_tokens: usize,
    /// Whether two layers make them from embeddings while they are trained.
    pub prefix_projection: bool,
    /// The width between those layers; none for the width of a row of keys.
    pub encoder_hidden_size: Option<usize>,
}

/// Puts a new prefix on a model: from N(0, 1), or through a projection whose embeddings are from N(0, 1) and whose
/// layers from U(±1/√inputs). Returns the configuration as it is to be saved.
pub fn add(
    model: &mut Model,
    options: &PrefixOptions,
    base: &str,
    random: &mut Random,
) -> Result<VirtualTokensConfig, AdapterError> {
    let (n, kv) = (options.num_virtual_tokens, model.config().heads(0).kv_width());
    let encoder = options.encoder_hidden_size.unwrap_or(kv);
    let mut trained = |name: String, shape: &[usize], start: Start| start.parameter(name, shape, random);
    let projection = match options.prefix_projection {
        false => None,
        true => {
            let name = |part: &str| format!("prompt_encoder.{part}");
            Some(Projection {
                embedding: trained(name("embedding.weight"), &[n, kv], Start::Normal(1.0))?,
                weight: trained(name("transform.0.weight"), &[encoder, kv], Start::Linear(kv))?,
                bias: trained(name("transform.0.bias"), &[encoder], Start::Linear(kv))?,
            })
        }
    };
    let mut blocks = Vec::new();
    for i in 0..model.config().num_hidden_layers {
        blocks.push(match options.prefix_projection {
            false => PrefixBlock::Plain(trained(block_name(i), &[n, 2 * kv], Start::Normal(1.0))?),
            true => {
                let name = |part: &str| format!("prompt_encoder.transform.2.{part}.layers.{i}");
                PrefixBlock::Projected(
                    trained(name("weight"), &[2 * kv, encoder], Start::Linear(encoder))?,
                    trained(name("bias"), &[2 * kv], Start::Linear(encoder))?,
                )
            }
        });
    }
    let mut config = VirtualTokensConfig::new(VirtualTokensType::Prefix, n, model.config(), base);
    config.prefix_projection = Some(options.prefix_projection);
    config.encoder_hidden_size = Some(encoder);
    model.set_virtual_tokens(VirtualTokens::Prefix(Prefix {
        num_virtual_tokens: n,
        blocks,
        projection,
    }));
    Ok(config)
}
