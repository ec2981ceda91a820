//! The qwen3 architecture (the dense models of Qwen 3): llama's block with an RMSNorm over every head of queries and
//! keys before they are turned, no biases, heads of their own width, and Qwen 2's windows.
//!
//! Source: transformers models/qwen3/modeling_qwen3.py.

use candle_core::{Result, Tensor};

use super::block::{Attend, Block, Pass};
use super::config::{Defaults, Reader, Rope};
use super::load::Loader;
use super::norm::Norm;
use super::ops::{Heads, rope, swiglu};
use super::parts::{Mlp, QkvBias, SelfAttn};
use super::qwen2::qwen_windows;
use super::{Architecture, Config, Linear, ModelError, Parameter};

pub(super) fn config(reader: &Reader<'_>) -> std::result::Result<Config, ModelError> {
    reader.one_of("hidden_act", &["silu"])?;
    let defaults = Defaults {
        head_dim: Some(128),
        max_position_embeddings: 32_768,
        tie_word_embeddings: false,
    };
    let rope = Rope::read(reader, 10_000.0)?;
    Ok(Config {
        windows: qwen_windows(reader)?,
        ..Config::common(reader, Architecture::Qwen3, defaults, rope)?
    })
}

#[derive(Debug)]
pub(super) struct Qwen3Block {
    heads: Heads,
    input_layernorm: Norm,
    self_attn: SelfAttn,
    q_norm: Norm,
    k_norm: Norm,
    post_attention_layernorm: Norm,
    mlp: Mlp,
}

impl Qwen3Block {
    /// Takes block `i` out of a checkpoint.
    pub(super) fn load(
        loader: &mut Loader<'_>,
        config: &Config,
        i: usize,
    ) -> std::result::Result<Self, ModelError> {
        let (d, head_dim) = (config.hidden_size, config.head_dim);
        let name = |part: &str| format!("model.layers.{i}.{part}");
        Ok(Self {
            heads: config.heads(i),
            input_layernorm: Norm::load(loader, config, &name("input_layernorm"), d)?,
            self_attn: SelfAttn::load(loader, config, i, QkvBias::Without)?,
            q_norm: Norm::load(loader, config, &name("self_attn.q_norm"), head_dim)?,
            k_norm: Norm::load(loader, config, &name("self_attn.k_norm"), head_dim)?,
            post_attention_layernorm: Norm::load(loader, config, &name("post_attention_layernorm"), d)?,
            mlp: Mlp::load(loader, config, i)?,
        })
    }
}

impl Block for Qwen3Block {
    fn forward(&self, x: &Tensor, pass: &Pass, attend: &mut Attend<'_>) -> Result<Tensor> {
        let (mode, rotation, head_dim) = (pass.mode, &pass.rotations[0], self.heads.head_dim);
        let normed = self.input_layernorm.forward(x, mode)?;
        let q = self.self_attn.q_proj.forward(&normed, mode)?;
        let k = self.self_attn.k_proj.forward(&normed, mode)?;
        let v = self.self_attn.v_proj.forward(&normed, mode)?;
        let q = rope(&self.q_norm.heads(&q, head_dim, mode)?, rotation)?;
        let k = rope(&self.k_norm.heads(&k, head_dim, mode)?, rotation)?;
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
        let norms = [
            &self.input_layernorm,
            &self.q_norm,
            &self.k_norm,
            &self.post_attention_layernorm,
        ];
        let norms = norms.into_iter().map(|norm| &norm.weight);
        norms
            .chain(self.self_attn.parameters())
            .chain(self.mlp.parameters())
            .collect()
    }

    fn norms_mut(&mut self) -> Vec<&mut Norm> {
        vec![
            &mut self.input_layernorm,
            &mut self.q_norm,
            &mut self.k_norm,
            &mut self.post_attention_layernorm,
        ]
    }
}
