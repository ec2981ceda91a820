//! A decoder: embedding, blocks, last norm, output layer. What a block does is its architecture's file's to say.

use std::path::Path;

use candle_core::{Result, Tensor, Var};

use super::block::{Block, Pass};
use super::gemma3::Gemma3Block;
use super::llama::LlamaBlock;
use super::load::{Keep, Loader};
use super::norm::Norm;
use super::ops::{Distillation, RopeTable, Rotation, Targets, attention, put_before, take_before, widened};
use super::parts::QkvBias;
use super::qwen3::Qwen3Block;
use super::source::Source;
use super::{
    Architecture, Config, Embedding, Head, KvCache, Linear, Lora, Mode, ModelError, Parameter, QuantizedRows,
    VirtualTokens, Weight,
};
use crate::batch::{Batch, positions};
use crate::device::Place;
use crate::loss::{Measures, Objective, Taught};

/// A model whose weights are frozen or trained, with or without an adapter.
#[derive(Debug)]
pub struct Model {
    config: Config,
    pub(super) embed_tokens: Embedding,
    pub(super) layers: Vec<Box<dyn Block>>,
    pub(super) norm: Norm,
    pub(super) head: Head,
    pub(super) virtual_tokens: Option<VirtualTokens>,
    ropes: Vec<RopeTable>,
    pub(super) place: Place,
}

impl Model {
    /// Loads a checkpoint folder or a GGUF file in f32 or its own blocks; `train` makes every weight a trained one.
    pub fn open(path: &Path, train: bool) -> std::result::Result<Self, ModelError> {
        Self::open_as(path, if train { Keep::Trained } else { Keep::Frozen })
    }

    /// Loads a checkpoint folder or a GGUF file, to compute in f32 on the CPU.
    pub fn open_as(path: &Path, keep: Keep) -> std::result::Result<Self, ModelError> {
        Self::open_on(path, keep, &Place::default())
    }

    /// The same to compute in a type on a device: frozen matrices are kept in that type, and what is trained in f32.
    pub fn open_on(path: &Path, keep: Keep, place: &Place) -> std::result::Result<Self, ModelError> {
        let source = Source::open(path)?;
        if keep == Keep::Trained && matches!(source, Source::File(_)) {
            return Err(ModelError::Blocks {
                path: path.to_path_buf(),
            });
        }
        let config = source.config()?;
        let table = [config.vocab_size, config.hidden_size];
        let mut loader = Loader::new(&source, keep, place);
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
            place: place.clone(),
            config,
            embed_tokens: Embedding {
                weight: embed_tokens,
                lora: None,
            },
            layers,
            norm,
            head: Head {
                weight: lm_head,
                lora: None,
            },
            virtual_tokens: None,
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
        let head = self.head.weight.as_ref().and_then(Weight::dense);
        let embed_tokens = self.embed_tokens.weight.dense().into_iter();
        embed_tokens
            .chain(layers)
            .chain(Some(&self.norm.weight))
            .chain(head)
    }

    /// The matrices of the checkpoint that stay quantised blocks.
    pub fn quantized(&self) -> impl Iterator<Item = &dyn QuantizedRows> {
        let linears = self.linears().map(|linear| &linear.weight);
        let matrices = linears
            .chain([&self.embed_tokens.weight])
            .chain(&self.head.weight);
        matrices.filter_map(Weight::quantized)
    }

    /// The number of the checkpoint's weights, quantised ones too.
    pub fn parameters(&self) -> usize {
        let dense = self
            .weights()
            .map(|weight| weight.get(Mode::INFERENCE).elem_count());
        let quantized = self.quantized().map(|rows| rows.dims().iter().product::<usize>());
        dense.sum::<usize>() + quantized.sum::<usize>()
    }

    /// The bytes of the checkpoint's weights, in memory or in a mapped file.
    pub fn bytes(&self) -> u64 {
        let dense = self.weights().map(Parameter::bytes);
        let quantized = self.quantized().map(QuantizedRows::bytes);
        dense.chain(quantized).sum::<usize>() as u64
    }

    /// Every trained tensor with its name: weights by their name in the checkpoint, adapters by PEFT's
    /// (`model.layers.0.self_attn.q_proj.lora_A.weight`).
    pub fn trained(&self) -> Vec<(&str, &Var)> {
        let virtual_tokens = self.virtual_tokens.iter().flat_map(VirtualTokens::parameters);
        self.weights()
            .chain(self.adapter_parameters())
            .chain(virtual_tokens)
            .filter_map(|p| Some((p.name.as_str(), p.var()?)))
            .collect()
    }

    /// The tokens that a sequence can have: the positions that the model was made for, but for virtual tokens.
    pub fn longest(&self) -> usize {
        let virtual_tokens = self.virtual_tokens.as_ref().map_or(0, VirtualTokens::count);
        self.config.max_position_embeddings.saturating_sub(virtual_tokens)
    }

    /// What all blocks share in a pass over a batch; `before` rows of each sequence stand in a cache already, or none
    /// where it is empty.
    pub fn pass(&self, batch: &Batch, before: &[usize], mode: Mode) -> Pass {
        let token_starts = batch.starts();
        // A soft prompt stands before the first tokens of a sequence only; a prefix is not among the rows, but it
        // takes the first positions.
        let begins = before.iter().all(|rows| *rows == 0);
        let virtual_tokens = self.virtual_tokens.as_ref().filter(|_| begins && !mode.base);
        let virtual_rows = virtual_tokens.map_or(0, VirtualTokens::rows);
        let offset = virtual_tokens.map_or(0, |tokens| tokens.count() - tokens.rows());
        let starts = widened(&token_starts, virtual_rows);
        let positions = match begins {
            true => positions(&starts, &vec![offset; starts.len()]),
            false => positions(&starts, before),
        };
        Pass {
            mode,
            rotations: self
                .ropes
                .iter()
                .map(|table| Rotation::new(table, &positions))
                .collect(),
            starts: starts.into(),
            virtual_rows,
            token_starts,
        }
    }

    /// Embeddings of tokens as the first block gets them.
    pub(super) fn scaled(&self, embeddings: Tensor) -> Result<Tensor> {
        match self.config.embedding_scale() {
            Some(scale) => embeddings * scale,
            None => Ok(embeddings),
        }
    }

    /// The embeddings, `[rows, hidden_size]`: what the first block gets. Those of a soft prompt stand before the tokens'
    /// of every sequence.
    pub fn embed(&self, batch: &Batch, pass: &Pass) -> Result<Tensor> {
        let tokens = self.scaled(self.embed_tokens.forward(batch, pass.mode, &self.place)?)?;
        match &self.virtual_tokens {
            Some(VirtualTokens::Prompt(prompt)) if pass.virtual_rows > 0 => {
                let prompt = prompt.get(pass.mode).to_dtype(tokens.dtype())?;
                put_before(&prompt, &tokens, &pass.token_starts)
            }
            _ => Ok(tokens),
        }
    }

    /// Block `i` on its input, `[rows, hidden_size]` → the same shape.
    pub fn block(&self, i: usize, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.layers[i].forward(x, pass, &mut |q, k, v, heads| {
            let starts = pass.starts.clone();
            let virtual_tokens = self.virtual_tokens.as_ref().filter(|_| !pass.mode.base);
            let Some(prefix) = virtual_tokens.and_then(VirtualTokens::prefix) else {
                return attention(q, k, v, heads, starts.clone(), starts);
            };
            let [k, v] = prefix.put_before(i, [k, v], &starts, pass.mode)?;
            let key_starts = widened(&starts, prefix.num_virtual_tokens).into();
            attention(q, &k, &v, heads, starts, key_starts)
        })
    }

    /// Everything of block `i` that is numbers in memory, its adapters too.
    pub(crate) fn block_parameters(&self, i: usize) -> impl Iterator<Item = &Parameter> {
        let layer = &self.layers[i];
        let adapters = layer
            .linears()
            .into_iter()
            .filter_map(|linear| linear.lora.as_ref());
        layer
            .parameters()
            .into_iter()
            .chain(adapters.flat_map(Lora::parameters))
    }

    /// The last norm, of the batch's tokens only, `[rows, hidden_size]` → `[tokens, hidden_size]`.
    pub fn last_norm(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let x = take_before(x, pass.virtual_rows, &pass.token_starts)?;
        self.norm.forward(&x, pass.mode)
    }

    /// The hidden states after the last norm, `[tokens, hidden_size]`.
    pub fn hidden(&self, batch: &Batch, mode: Mode) -> Result<Tensor> {
        let pass = self.pass(batch, &[], mode);
        let mut x = self.embed(batch, &pass)?;
        for i in 0..self.blocks() {
            x = self.block(i, &x, &pass)?;
        }
        self.last_norm(&x, &pass)
    }

    /// The same for tokens that follow those in the cache, which takes them up. Without gradients. The sequences of a
    /// cache begin together.
    pub fn hidden_cached(&self, batch: &Batch, cache: &mut KvCache) -> Result<Tensor> {
        let pass = self.pass(batch, cache.lengths(), Mode::DRAWN);
        let mut x = self.embed(batch, &pass)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &pass, &mut |q, k, v, heads| {
                cache.attend(i, q, k, v, heads, &pass.starts)
            })?;
        }
        cache.advance(&pass.starts);
        self.last_norm(&x, &pass)
    }

    /// A cache for so many sequences, empty but for a prefix.
    pub fn cache(&self, sequences: usize) -> Result<KvCache> {
        let mut cache = KvCache::new(self.blocks(), sequences);
        if let Some(prefix) = self.virtual_tokens.as_ref().and_then(VirtualTokens::prefix) {
            for i in 0..self.blocks() {
                let [k, v] = prefix.keys_and_values(i, Mode::INFERENCE)?;
                cache.put_before(i, &self.place.put(&k)?, &self.place.put(&v)?)?;
            }
        }
        Ok(cache)
    }

    /// The logits of hidden states, `[rows, hidden_size]` → `[rows, vocab_size]`, without a gradient.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head
            .logits(hidden, &self.embed_tokens.weight, Mode::INFERENCE)
    }

    /// The same of tokens that are drawn, from the states of [`hidden_cached`](Self::hidden_cached).
    pub fn drawn_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.logits(hidden, &self.embed_tokens.weight, Mode::DRAWN)
    }

    /// The sum of −log p over the batch's labels (a scalar), from the hidden states after the last norm.
    /// The output layer is computed `chunk` rows at a time.
    pub fn loss_of_hidden(&self, hidden: &Tensor, batch: &Batch, mode: Mode, chunk: usize) -> Result<Tensor> {
        let rows = batch.targets();
        self.head
            .loss(hidden, &self.embed_tokens.weight, Targets { rows, chunk }, mode)
    }

    /// The sum of −log p over the batch's labels (a scalar; divide by [`Batch::trained_tokens`]).
    pub fn loss_sum(&self, batch: &Batch, mode: Mode, chunk: usize) -> Result<Tensor> {
        self.loss_of_hidden(&self.hidden(batch, mode)?, batch, mode, chunk)
    }

    /// The sum of a loss against a teacher over the batch's labels (a scalar), and its parts, from the hidden states
    /// after the last norm. Of the student's and the teacher's logits as many rows exist at a time as the objective
    /// says. Without gradients it measures.
    pub fn distillation_loss(
        &self,
        hidden: &Tensor,
        batch: &Batch,
        taught: Taught,
        objective: &Objective,
        mode: Mode,
    ) -> Result<(Tensor, Measures)> {
        let distillation = Distillation::new(batch, taught, objective, self.config.vocab_size)?;
        self.head
            .distillation_loss(hidden, &self.embed_tokens.weight, distillation, mode)
    }
}
