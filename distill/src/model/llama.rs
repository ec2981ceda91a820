//! The llama architecture (Llama 2 and 3, SmolLM2, TinyLlama): RMSNorm, attention, RMSNorm, SwiGLU. Qwen 2 has its
//! block too, with biases and windows.
//!
//! Source: transformers models/llama/modeling_llama.py.

use candle_core::{Result, Tensor};

use super::block::{Attend, Block, Pass};
use super::config::{Defaults, Reader, Rope};
use super::load::Loader;
use super::norm::Norm;
use super::ops::{Heads, rope, swiglu};
use super::parts::{Mlp, QkvBias, SelfAttn};
use super::{Architecture, Config, Linear, ModelError, Parameter};

pub(super) fn config(reader: &Reader<'_>) -> std::result::Result<Config, ModelError> {
    reader.one_of("hidden_act", &["silu"])?;
    let defaults = Defaults {
        head_dim: None,
        max_position_embeddings: 2048,
        tie_word_embeddings: false,
    };
    Config::common(
        reader,
        Architecture::Llama,
        defaults,
        Rope::read(reader, 10_000.0)?,
    )
}

#[derive(Debug)]
pub(super) struct LlamaBlock {
    heads: Heads,
    input_layernorm: Norm,
    self_attn: SelfAttn,
    post_attention_layernorm: Norm,
    mlp: Mlp,
}

impl LlamaBlock {
    /// Takes block `i` out of a checkpoint.
    pub(super) fn load(
        loader: &mut Loader<'_>,
        config: &Config,
        i: usize,
        bias: QkvBias,
    ) -> std::result::Result<Self, ModelError> {
        let d = config.hidden_size;
        let name = |part: &str| format!("model.layers.{i}.{part}");
        Ok(Self {
            heads: config.heads(i),
            input_layernorm: Norm::load(loader, config, &name("input_layernorm"), d)?,
            self_attn: SelfAttn::load(loader, config, i, bias)?,
            post_attention_layernorm: Norm::load(loader, config, &name("post_attention_layernorm"), d)?,
            mlp: Mlp::load(loader, config, i)?,
        })
    }
}

impl Block for LlamaBlock {
    fn forward(&self, x: &Tensor, pass: &Pass, attend: &mut Attend<'_>) -> Result<Tensor> {
        let (mode, rotation) = (pass.mode, &pass.rotations[0]);
        let normed = self.input_layernorm.forward(x, mode)?;
        let q = rope(&self.self_attn.q_proj.forward(&normed, mode)?, rotation)?;
        let k = rope(&self.self_attn.k_proj.forward(&normed, mode)?, rotation)?;
        let v = self.self_attn.v_proj.forward(&normed, mode)?;
        let attended = attend(&q, &k, &v, self.heads)?;
        let x = (x + self.self_attn.o_proj.forward(&attended, mode)?)?;
        let normed = self.post_attention_layernorm.forward(&x, mode)?;
        &x + self.mlp.forward(&normed, mode, swiglu)?
    }

    fn linears(&self) -> Vec<&Linear> {
        let attention = self.self_attn.linears().into_iter();
        attention.chain(self.mlp.linears()).collect()
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let attention = self.self_attn.linears_mut().into_iter();
        attention.chain(self.mlp.linears_mut()).collect()
    }

    fn parameters(&self) -> Vec<&Parameter> {
        let attention = std::iter::once(&self.input_layernorm.weight).chain(self.self_attn.parameters());
        let mlp = std::iter::once(&self.post_attention_layernorm.weight).chain(self.mlp.parameters());
        attention.chain(mlp).collect()
    }

    fn norms_mut(&mut self) -> Vec<&mut Norm> {
        vec![&mut self.input_layernorm, &mut self.post_attention_layernorm]
    }
}
