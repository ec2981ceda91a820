//! The block of llama (Llama 2 and 3, SmolLM2, TinyLlama): RMSNorm, attention, RMSNorm, SwiGLU.

use candle_core::{Result, Tensor};

use super::block::{Attend, Block, Pass};
use super::load::Loader;
use super::ops::{Heads, rms_norm, rope, swiglu};
use super::{Config, Linear, ModelError, Parameter};

#[derive(Debug)]
pub(super) struct LlamaBlock {
    heads: Heads,
    eps: f64,
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

impl LlamaBlock {
    /// Takes block `i` out of a checkpoint.
    pub(super) fn load(
        loader: &mut Loader<'_>,
        config: &Config,
        i: usize,
    ) -> std::result::Result<Self, ModelError> {
        let (d, ffn, heads) = (config.hidden_size, config.intermediate_size, config.heads());
        let (q, kv) = (heads.q_width(), heads.kv_width());
        let name = |part: &str| format!("model.layers.{i}.{part}");
        Ok(Self {
            heads,
            eps: config.rms_norm_eps,
            input_layernorm: loader.parameter(name("input_layernorm.weight"), &[d])?,
            q_proj: loader.linear(&name("self_attn.q_proj"), q, d, false)?,
            k_proj: loader.linear(&name("self_attn.k_proj"), kv, d, false)?,
            v_proj: loader.linear(&name("self_attn.v_proj"), kv, d, false)?,
            o_proj: loader.linear(&name("self_attn.o_proj"), d, q, false)?,
            post_attention_layernorm: loader.parameter(name("post_attention_layernorm.weight"), &[d])?,
            gate_proj: loader.linear(&name("mlp.gate_proj"), ffn, d, false)?,
            up_proj: loader.linear(&name("mlp.up_proj"), ffn, d, false)?,
            down_proj: loader.linear(&name("mlp.down_proj"), d, ffn, false)?,
        })
    }
}

impl Block for LlamaBlock {
    fn forward(&self, x: &Tensor, pass: &Pass, attend: &mut Attend<'_>) -> Result<Tensor> {
        let (mode, rotation) = (pass.mode, &pass.rotations[0]);
        let normed = rms_norm(x, self.input_layernorm.get(mode), self.eps)?;
        let q = rope(&self.q_proj.forward(&normed, mode)?, rotation)?;
        let k = rope(&self.k_proj.forward(&normed, mode)?, rotation)?;
        let v = self.v_proj.forward(&normed, mode)?;
        let x = (x + self.o_proj.forward(&attend(&q, &k, &v, self.heads)?, mode)?)?;
        let normed = rms_norm(&x, self.post_attention_layernorm.get(mode), self.eps)?;
        let gate = self.gate_proj.forward(&normed, mode)?;
        let up = self.up_proj.forward(&normed, mode)?;
        &x + self.down_proj.forward(&swiglu(&gate, &up)?, mode)?
    }

    fn linears(&self) -> Vec<&Linear> {
        let (attention, ffn) = (
            [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj],
            [&self.gate_proj, &self.up_proj, &self.down_proj],
        );
        attention.into_iter().chain(ffn).collect()
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        vec![
            &mut self.q_proj,
            &mut self.k_proj,
            &mut self.v_proj,
            &mut self.o_proj,
            &mut self.gate_proj,
            &mut self.up_proj,
            &mut self.down_proj,
        ]
    }

    fn parameters(&self) -> Vec<&Parameter> {
        let mut all = vec![&self.input_layernorm];
        for linear in [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj] {
            all.extend(linear.parameters());
        }
        all.push(&self.post_attention_layernorm);
        for linear in [&self.gate_proj, &self.up_proj, &self.down_proj] {
            all.extend(linear.parameters());
        }
        all
    }
}
