//! The llama architecture: embedding, blocks of attention and SwiGLU with RMSNorm before each, output layer.

use std::path::Path;

use candle_core::{Device, Result, Tensor, Var};
use pipit_convert::checkpoint::Checkpoint;

use super::ops::{
    RopeTable, Rotation, Targets, attention, cross_entropy, embedding, frozen_linear, rms_norm, rope, swiglu,
};
use super::{KvCache, Linear, LlamaConfig, Mode, ModelError, Parameter};
use crate::batch::Batch;

/// A llama whose weights are frozen or trained, with or without an adapter. f32, on the CPU.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    embed_tokens: Parameter,
    layers: Vec<Layer>,
    norm: Parameter,
    /// The output layer, unless it is the embedding.
    lm_head: Option<Parameter>,
    rope: RopeTable,
}

#[derive(Debug)]
struct Layer {
    input_layernorm: Parameter,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: Parameter,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Layer {
    fn linears(&self) -> [&Linear; 7] {
        let Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            gate_proj,
            up_proj,
            down_proj,
            ..
        } = self;
        [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
    }

    fn linears_mut(&mut self) -> [&mut Linear; 7] {
        let Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            gate_proj,
            up_proj,
            down_proj,
            ..
        } = self;
        [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
    }
}

/// Takes tensors out of a checkpoint, checking shapes and counting what was used.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    train: bool,
    used: Vec<String>,
}

impl Loader<'_> {
    fn take(&mut self, name: String, shape: &[usize]) -> std::result::Result<Parameter, ModelError> {
        let path = || self.checkpoint.dir().to_path_buf();
        let view = self.checkpoint.tensor(&name)?;
        if view.shape != shape {
            let (found, expected) = (view.shape.to_vec(), shape.to_vec());
            return Err(ModelError::Shape {
                path: path(),
                tensor: name,
                found,
                expected,
            });
        }
        let data = view.to_f32()?;
        if data.iter().any(|x| !x.is_finite()) {
            return Err(ModelError::NotFinite {
                path: path(),
                tensor: name,
            });
        }
        let tensor = Tensor::from_vec(data, shape, &Device::Cpu)?;
        self.used.push(name.clone());
        Ok(if self.train {
            Parameter::trained(name, &tensor)?
        } else {
            Parameter::frozen(name, &tensor)
        })
    }

    fn linear(&mut self, module: &str, out: usize, input: usize) -> std::result::Result<Linear, ModelError> {
        Ok(Linear {
            weight: self.take(format!("{module}.weight"), &[out, input])?,
            lora: None,
        })
    }
}

impl Llama {
    /// Loads a checkpoint folder; `train` makes every weight a trained one.
    pub fn open(dir: &Path, train: bool) -> std::result::Result<Self, ModelError> {
        Self::load(&Checkpoint::open(dir)?, train)
    }

    /// Loads an opened checkpoint; `train` makes every weight a trained one.
    pub fn load(checkpoint: &Checkpoint, train: bool) -> std::result::Result<Self, ModelError> {
        let config = LlamaConfig::read(checkpoint)?;
        let (d, ffn) = (config.hidden_size, config.intermediate_size);
        let heads = config.heads();
        let (q, kv) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let mut loader = Loader {
            checkpoint,
            train,
            used: Vec::new(),
        };
        let embed_tokens = loader.take("model.embed_tokens.weight".into(), &[config.vocab_size, d])?;
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{i}.{part}");
            layers.push(Layer {
                input_layernorm: loader.take(name("input_layernorm.weight"), &[d])?,
                q_proj: loader.linear(&name("self_attn.q_proj"), q, d)?,
                k_proj: loader.linear(&name("self_attn.k_proj"), kv, d)?,
                v_proj: loader.linear(&name("self_attn.v_proj"), kv, d)?,
                o_proj: loader.linear(&name("self_attn.o_proj"), d, q)?,
                post_attention_layernorm: loader.take(name("post_attention_layernorm.weight"), &[d])?,
                gate_proj: loader.linear(&name("mlp.gate_proj"), ffn, d)?,
                up_proj: loader.linear(&name("mlp.up_proj"), ffn, d)?,
                down_proj: loader.linear(&name("mlp.down_proj"), d, ffn)?,
            });
        }
        let norm = loader.take("model.norm.weight".into(), &[d])?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.take("lm_head.weight".into(), &[config.vocab_size, d])?),
        };
        let used = loader.used;
        let harmless = |name: &str| {
            name.ends_with("rotary_emb.inv_freq") || (lm_head.is_none() && name == "lm_head.weight")
        };
        let unused: Vec<String> = checkpoint
            .names()
            .filter(|name| !harmless(name) && !used.iter().any(|used| used == name))
            .map(str::to_owned)
            .collect();
        if !unused.is_empty() {
            let path = checkpoint.dir().to_path_buf();
            return Err(ModelError::UnusedTensors {
                path,
                model_type: "llama".into(),
                tensors: unused,
            });
        }
        Ok(Self {
            rope: config.rope_table(),
            config,
            embed_tokens,
            layers,
            norm,
            lm_head,
        })
    }

    /// Sizes and constants.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The linear layers that an adapter can stand on.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(Layer::linears)
    }

    /// The linear layers that an adapter can stand on, to change.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(Layer::linears_mut)
    }

    /// The weights of the checkpoint, without adapters, in the order of the forward pass.
    pub fn weights(&self) -> impl Iterator<Item = &Parameter> {
        let layers = self.layers.iter().flat_map(|layer| {
            let [q, k, v, o, gate, up, down] = layer.linears().map(|linear| &linear.weight);
            [
                &layer.input_layernorm,
                q,
                k,
                v,
                o,
                &layer.post_attention_layernorm,
                gate,
                up,
                down,
            ]
        });
        std::iter::once(&self.embed_tokens)
            .chain(layers)
            .chain(Some(&self.norm))
            .chain(&self.lm_head)
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

    /// The hidden states after the last norm, `[rows, hidden_size]`.
    pub fn hidden(&self, batch: &Batch, mode: Mode) -> Result<Tensor> {
        let heads = self.config.heads();
        let starts = batch.starts();
        let rotation = Rotation::new(&self.rope, &batch.positions(&[]));
        self.blocks(batch, &rotation, mode, |_, q, k, v| {
            attention(q, k, v, heads, starts.clone())
        })
    }

    /// The same for tokens that follow those in the cache, which takes them up.
    pub fn hidden_cached(&self, batch: &Batch, cache: &mut KvCache) -> Result<Tensor> {
        let starts = batch.starts();
        let rotation = Rotation::new(&self.rope, &batch.positions(cache.lengths()));
        let hidden = self.blocks(batch, &rotation, Mode::INFERENCE, |layer, q, k, v| {
            cache.attend(layer, q, k, v, &starts)
        })?;
        cache.advance(&starts);
        Ok(hidden)
    }

    fn blocks(
        &self,
        batch: &Batch,
        rotation: &Rotation,
        mode: Mode,
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let eps = self.config.rms_norm_eps;
        let mut x = embedding(self.embed_tokens.get(mode), batch.ids())?;
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, layer.input_layernorm.get(mode), eps)?;
            let q = rope(&layer.q_proj.forward(&normed, mode)?, rotation)?;
            let k = rope(&layer.k_proj.forward(&normed, mode)?, rotation)?;
            let v = layer.v_proj.forward(&normed, mode)?;
            x = (x + layer.o_proj.forward(&attend(i, &q, &k, &v)?, mode)?)?;
            let normed = rms_norm(&x, layer.post_attention_layernorm.get(mode), eps)?;
            let gate = layer.gate_proj.forward(&normed, mode)?;
            let up = layer.up_proj.forward(&normed, mode)?;
            x = (x + layer.down_proj.forward(&swiglu(&gate, &up)?, mode)?)?;
        }
        rms_norm(&x, self.norm.get(mode), eps)
    }

    fn head(&self) -> &Parameter {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// The logits of hidden states, `[rows, hidden_size]` → `[rows, vocab_size]`, without a gradient.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        frozen_linear(&hidden.detach(), self.head().get(Mode::INFERENCE))
    }

    /// The sum of −log p over the batch's labels (a scalar; divide by [`Batch::trained_tokens`]).
    /// The output layer is computed `chunk` rows at a time.
    pub fn loss_sum(&self, batch: &Batch, mode: Mode, chunk: usize) -> Result<Tensor> {
        let hidden = self.hidden(batch, mode)?;
        cross_entropy(
            &hidden,
            self.head().get(mode),
            Targets {
                rows: batch.targets(),
                chunk,
            },
        )
    }
}
