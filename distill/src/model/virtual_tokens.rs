//! Trained rows that stand before every sequence: embeddings (prompt tuning, <https://arxiv.org/abs/2104.08691>) or the
//! keys and values of every block (prefix tuning, <https://arxiv.org/abs/2101.00190>).
//! Source: peft/peft_model.py, `get_prompt`; peft/tuners/prefix_tuning/model.py.

use candle_core::{Result, Tensor};

use super::ops::{linear, put_before};
use super::{Mode, Parameter};

/// What stands before every sequence. Its positions are 0 to n − 1; those of the tokens follow.
#[derive(Debug)]
pub enum VirtualTokens {
    /// Embeddings, `[n, hidden_size]`.
    Prompt(Parameter),
    /// Keys and values.
    Prefix(Prefix),
}

/// Keys and values before those of every block. The keys are as the attention takes them: no rotary embedding
/// turns them.
#[derive(Debug)]
pub struct Prefix {
    /// The number of virtual tokens.
    pub num_virtual_tokens: usize,
    /// What is trained for each block.
    pub blocks: Vec<PrefixBlock>,
    /// The first layer of the projection, where there is one.
    pub projection: Option<Projection>,
}

/// The trained part of one block's keys and values. The first half of its width are keys, the second values.
#[derive(Debug)]
pub enum PrefixBlock {
    /// Keys and values themselves, `[n, 2 · kv_width]`.
    Plain(Parameter),
    /// The rows of the projection's second layer that make them: `[2 · kv_width, encoder_hidden_size]` and
    /// `[2 · kv_width]`.
    Projected(Parameter, Parameter),
}

/// `prefix_projection`: tanh of a linear layer on embeddings of the virtual tokens.
#[derive(Debug)]
pub struct Projection {
    /// `[n, kv_width]`.
    pub embedding: Parameter,
    /// `[encoder_hidden_size, kv_width]`.
    pub weight: Parameter,
    /// `[encoder_hidden_size]`.
    pub bias: Parameter,
}

impl VirtualTokens {
    /// The number of virtual tokens.
    pub fn count(&self) -> usize {
        match self {
            Self::Prompt(embeddings) => embeddings.get(Mode::INFERENCE).dims()[0],
            Self::Prefix(prefix) => prefix.num_virtual_tokens,
        }
    }

    /// The rows that they add to the hidden states of a sequence.
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Prompt(_) => self.count(),
            Self::Prefix(_) => 0,
        }
    }

    /// The keys and values of a block, where there are.
    pub(super) fn prefix(&self) -> Option<&Prefix> {
        match self {
            Self::Prompt(_) => None,
            Self::Prefix(prefix) => Some(prefix),
        }
    }

    /// Everything that is trained.
    pub fn parameters(&self) -> Vec<&Parameter> {
        match self {
            Self::Prompt(embeddings) => vec![embeddings],
            Self::Prefix(prefix) => {
                let first = prefix.projection.iter();
                let first = first
                    .flat_map(|projection| [&projection.embedding, &projection.weight, &projection.bias]);
                let blocks = prefix.blocks.iter().flat_map(|block| match block {
                    PrefixBlock::Plain(both) => vec![both],
                    PrefixBlock::Projected(weight, bias) => vec![weight, bias],
                });
                first.chain(blocks).collect()
            }
        }
    }

    /// What PEFT stores, `prompt_embeddings`: `[n, hidden_size]`, or `[n, 2 · layers · kv_width]` with the keys of a
    /// layer before its values. A projection is computed, and its own tensors are lost: so PEFT has it.
    pub fn prompt_embeddings(&self) -> Result<Tensor> {
        match self {
            Self::Prompt(embeddings) => Ok(embeddings.get(Mode::INFERENCE).clone()),
            Self::Prefix(prefix) => {
                let blocks: Vec<Tensor> = (0..prefix.blocks.len())
                    .map(|i| prefix.both(i, Mode::INFERENCE))
                    .collect::<Result<_>>()?;
                Tensor::cat(&blocks, 1)?.contiguous()
            }
        }
    }
}

impl Prefix {
    /// Keys and values side by side, `[n, 2 · kv_width]`.
    fn both(&self, block: usize, mode: Mode) -> Result<Tensor> {
        match (&self.blocks[block], &self.projection) {
            (PrefixBlock::Plain(both), _) => Ok(both.get(mode).clone()),
            (PrefixBlock::Projected(weight, bias), Some(first)) => {
                let hidden = linear(first.embedding.get(mode), first.weight.get(mode))?;
                let hidden = hidden.broadcast_add(first.bias.get(mode))?.tanh()?;
                linear(&hidden, weight.get(mode))?.broadcast_add(bias.get(mode))
            }
            (PrefixBlock::Projected(..), None) => {
                candle_core::bail!("a projected prefix without its projection")
            }
        }
    }

    /// The keys and the values of a block, `[n, kv_width]` each.
    pub(super) fn keys_and_values(&self, block: usize, mode: Mode) -> Result<[Tensor; 2]> {
        let both = self.both(block, mode)?;
        let width = both.dim(1)? / 2;
        Ok([
            both.narrow(1, 0, width)?.contiguous()?,
            both.narrow(1, width, width)?.contiguous()?,
        ])
    }

    /// Keys and values of a batch with those of the prefix before every sequence.
    pub(super) fn put_before(
        &self,
        block: usize,
        [k, v]: [&Tensor; 2],
        starts: &[usize],
        mode: Mode,
    ) -> Result<[Tensor; 2]> {
        let [keys, values] = self.keys_and_values(block, mode)?;
        Ok([put_before(&keys, k, starts)?, put_before(&values, v, starts)?])
    }
}
