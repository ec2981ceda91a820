//! A decoder: embedding, blocks, last norm, output layer. What a block does is its architecture's file's to say.

use std::path::Path;

use candle_core::{Result, Tensor, Var};
use pipit_convert::checkpoint::Checkpoint;

use super::block::{Block, Pass};
use super::gemma3::Gemma3Block;
use super::llama::LlamaBlock;
use super::load::Loader;
use super::norm::Norm;
use super::ops::{
    RopeTable, Rotation, Targets, attention, cross_entropy, embedding, frozen_cross_entropy,
    frozen_embedding, frozen_linear,
};
use super::parts::QkvBias;
use super::qwen3::Qwen3Block;
use super::{Architecture, Config, KvCache, Linear, Mode, ModelError, Parameter, Weight};
use crate::batch::Batch;

/// A model whose weights are frozen or trained, with or without an adapter. f32, on the CPU.
#[derive(Debug)]
pub struct Model {
    config: Config,
    embed_tokens: Weight,
    layers: Vec<Box<dyn Block>>,
    norm: Norm,
    /// The output layer, unless it is the embedding.
    lm_head: Option<Weight>,
    ropes: Vec<RopeTable>,
}

impl Model {
    /// Loads a checkpoint folder; `train` makes every weight a trained one.
    pub fn open(dir: &Path, train: bool) -> std::result::Result<Self, ModelError> {
        Self::load(&Checkpoint::open(dir)?, train)
    }

    /// Loads an opened checkpoint; `train` makes every weight a trained one.
    pub fn load(checkpoint: &Checkpoint, train: bool) -> std::result::Result<Self, ModelError> {
        let config = Config::read(checkpoint)?;
        let table = [config.vocab_size, config.hidden_size];
        let mut loader = Loader::new(checkpoint, train);
        let embed_tokens = loader.weight("model.embed_tokens.weight".into(), table)?;
        let mut layers: Vec<Box<dyn Block>> = Vec::new();
        for i in 0..config.num_hidden_layers {
            layers.push(match config.architecture {
                Architecture::Llama => Box::new(LlamaBlock::load(&mut loader, &config, i, QkvBias::Without)?),
                Architecture::Qwen2 => Box::new(LlamaBlock::load(&mut loader, &config, i, QkvBias::With)?),
                Architecture::Qwen3 => Box::new(Qwen3Block::load(&mut loader, &config, i)?),
                Architecture::Gemma3 => Box::new(Gemma3Block::load(&mut loader, &config, i)?),
            });
        }
        let norm = Norm::load(&mut loader, &config, "model.norm", config.hidden_size)?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.weight("lm_head.weight".into(), table)?),
        };
        loader.finish(config.architecture.model_type(), |name| {
            name.ends_with("rotary_emb.inv_freq") || (lm_head.is_none() && name == "lm_head.weight")
        })?;
        Ok(Self {
            ropes: config.rope_tables(),
            config,
            embed_tokens,
            layers,
            norm,
            lm_head,
        })
    }

    /// Sizes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The number of blocks.
    pub fn blocks(&self) -> usize {
        self.layers.len()
    }

    /// The linear layers of the blocks, which an adapter can stand on.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|layer| layer.linears())
    }

    /// The linear layers of the blocks, to change.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(|layer| layer.linears_mut())
    }

    /// The weights of the checkpoint that are numbers in memory, without adapters: embedding, block after block, last
    /// norm, output layer.
    pub fn weights(&self) -> impl Iterator<Item = &Parameter> {
        let layers = self.layers.iter().flat_map(|layer| layer.parameters());
        let head = self.lm_head.as_ref().and_then(Weight::dense);
        self.embed_tokens
            .dense()
            .into_iter()
            .chain(layers)
            .chain(Some(&self.norm.weight))
            .chain(head)
    }

    /// The number of the checkpoint's weights, quantised ones too.
    pub fn parameters(&self) -> usize {
        let dense: usize = self
            .weights()
            .map(|weight| weight.get(Mode::INFERENCE).elem_count())
            .sum();
        let matrices = self
            .linears()
            .map(|linear| &linear.weight)
            .chain([&self.embed_tokens])
            .chain(&self.lm_head);
        let quantized = matrices.filter(|weight| weight.dense().is_none());
        dense
            + quantized
                .map(|weight| weight.dims().iter().product::<usize>())
                .sum::<usize>()
    }

    /// Every trained tensor with its name: weights by their name in the checkpoint, adapters by PEFT's
    /// (`model.layers.0.self_attn.q_proj.lora_A.weight`).
    pub fn trained(&self) -> Vec<(&str, &Var)> {
        let adapters = self
            .linears()
            .filter_map(|linear| linear.lora.as_ref())
            .flat_map(|lora| [&lora.a, &lora.b]);
        self.weights()
            .chain(adapters)
            .filter_map(|p| Some((p.name.as_str(), p.var()?)))
            .collect()
    }

    /// What all blocks share in a pass over a batch; `before` tokens of each sequence stand in a cache already.
    pub fn pass(&self, batch: &Batch, before: &[usize], mode: Mode) -> Pass {
        let positions = batch.positions(before);
        Pass {
            mode,
            rotations: self
                .ropes
                .iter()
                .map(|table| Rotation::new(table, &positions))
                .collect(),
            starts: batch.starts(),
        }
    }

    /// The tokens' embeddings, `[rows, hidden_size]`: what the first block gets.
    pub fn embed(&self, batch: &Batch, mode: Mode) -> Result<Tensor> {
        let x = match &self.embed_tokens {
            Weight::Dense(table) if mode.gradient && table.var().is_some() => {
                embedding(table.get(mode), batch.ids())
            }
            table => frozen_embedding(&table.frozen(), batch.ids()),
        }?;
        match self.config.embedding_scale() {
            Some(scale) => x * scale,
            None => Ok(x),
        }
    }

    /// Block `i` on its input, `[rows, hidden_size]` → the same shape.
    pub fn block(&self, i: usize, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.layers[i].forward(x, pass, &mut |q, k, v, heads| {
            attention(q, k, v, heads, pass.starts.clone())
        })
    }

    /// The last norm, `[rows, hidden_size]` → the same shape.
    pub fn last_norm(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        self.norm.forward(x, mode)
    }

    /// The hidden states after the last norm, `[rows, hidden_size]`.
    pub fn hidden(&self, batch: &Batch, mode: Mode) -> Result<Tensor> {
        let pass = self.pass(batch, &[], mode);
        let mut x = self.embed(batch, mode)?;
        for i in 0..self.blocks() {
            x = self.block(i, &x, &pass)?;
        }
        self.last_norm(&x, mode)
    }

    /// The same for tokens that follow those in the cache, which takes them up. Without gradients.
    pub fn hidden_cached(&self, batch: &Batch, cache: &mut KvCache) -> Result<Tensor> {
        let pass = self.pass(batch, cache.lengths(), Mode::INFERENCE);
        let mut x = self.embed(batch, pass.mode)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &pass, &mut |q, k, v, heads| {
                cache.attend(i, q, k, v, heads, &pass.starts)
            })?;
        }
        cache.advance(&pass.starts);
        self.last_norm(&x, pass.mode)
    }

    /// An empty cache for so many sequences.
    pub fn cache(&self, sequences: usize) -> KvCache {
        KvCache::new(self.blocks(), sequences)
    }

    fn head(&self) -> &Weight {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// The logits of hidden states, `[rows, hidden_size]` → `[rows, vocab_size]`, without a gradient.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        frozen_linear(&hidden.detach(), &self.head().frozen())
    }

    /// The sum of −log p over the batch's labels (a scalar), from the hidden states after the last norm.
    /// The output layer is computed `chunk` rows at a time.
    pub fn loss_of_hidden(&self, hidden: &Tensor, batch: &Batch, mode: Mode, chunk: usize) -> Result<Tensor> {
        let targets = Targets {
            rows: batch.targets(),
            chunk,
        };
        match self.head() {
            Weight::Dense(head) if mode.gradient && head.var().is_some() => {
                cross_entropy(hidden, head.get(mode), targets)
            }
            head => frozen_cross_entropy(hidden, &head.frozen(), targets),
        }
    }

    /// The sum of −log p over the batch's labels (a scalar; divide by [`Batch::trained_tokens`]).
    pub fn loss_sum(&self, batch: &Batch, mode: Mode, chunk: usize) -> Result<Tensor> {
        self.loss_of_hidden(&self.hidden(batch, mode)?, batch, mode, chunk)
    }
}
