//! The gemma3 architecture (Gemma 3 without its eyes): embeddings scaled by √hidden_size, norms whose factor is 1 + w
//! before and after attention and the feed-forward layer, and over every head of queries and keys, GeGLU, and two
//! kinds of blocks: those that see a window turn by `local_rope`, those that see everything by `rope`.
//!
//! Source: transformers models/gemma3/modeling_gemma3.py.

use candle_core::{Result, Tensor};

use super::block::{Attend, Block, Pass};
use super::config::{Defaults, Reader, Rope, windows};
use super::load::Loader;
use super::norm::Norm;
use super::ops::{Heads, geglu, rope};
use super::parts::{Mlp, QkvBias, SelfAttn};
use super::{Architecture, Config, Linear, ModelError, Parameter};

pub(super) fn config(reader: &Reader<'_>) -> std::result::Result<Config, ModelError> {
    reader.one_of("hidden_activation", &["gelu_pytorch_tanh"])?;
    let why = "attention that sees what follows is not supported";
    reader.refuse_flags(&["use_bidirectional_attention"], why)?;
    let caps = ["final_logit_softcapping", "attn_logit_softcapping"];
    reader.refuse_values(&caps, "capped logits are not supported")?;
    let defaults = Defaults {
        head_dim: Some(256),
        max_position_embeddings: 131_072,
        tie_word_embeddings: true,
    };
    let (rope, local_rope) = Rope::read_pair(reader, 1_000_000.0, 10_000.0)?;
    // A size of null is none, a size that is left out is 4096.
    let size = match reader.json.get("sliding_window") {
        Some(serde_json::Value::Null) => None,
        _ => Some(reader.size_or("sliding_window", 4096)?),
    };
    // transformers writes the key with and without the underscore.
    let period = reader.size_or(
        "sliding_window_pattern",
        reader.size_or("_sliding_window_pattern", 6)?,
    )?;
    Ok(Config {
        attention_scale: 1.0 / reader.number_or("query_pre_attn_scalar", 256.0)?.sqrt(),
        windows: windows(reader, size, |block| !(block + 1).is_multiple_of(period))?,
        local_rope: Some(local_rope),
        ..Config::common(reader, Architecture::Gemma3, defaults, rope)?
    })
}

#[derive(Debug)]
pub(super) struct Gemma3Block {
    heads: Heads,
    /// Which of the two rotary embeddings.
    rope: usize,
    input_layernorm: Norm,
    self_attn: SelfAttn,
    q_norm: Norm,
    k_norm: Norm,
    post_attention_layernorm: Norm,
    pre_feedforward_layernorm: Norm,
    mlp: Mlp,
    post_feedforward_layernorm: Norm,
}

impl Gemma3Block {
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
            rope: config.rope_of(i),
            input_layernorm: Norm::load(loader, config, &name("input_layernorm"), d)?,
            self_attn: SelfAttn::load(loader, config, i, QkvBias::Without)?,
            q_norm: Norm::load(loader, config, &name("self_attn.q_norm"), head_dim)?,
            k_norm: Norm::load(loader, config, &name("self_attn.k_norm"), head_dim)?,
            post_attention_layernorm: Norm::load(loader, config, &name("post_attention_layernorm"), d)?,
            pre_feedforward_layernorm: Norm::load(loader, config, &name("pre_feedforward_layernorm"), d)?,
            mlp: Mlp::load(loader, config, i)?,
            post_feedforward_layernorm: Norm::load(loader, config, &name("post_feedforward_layernorm"), d)?,
        })
    }
}

impl Block for Gemma3Block {
    fn forward(&self, x: &Tensor, pass: &Pass, attend: &mut Attend<'_>) -> Result<Tensor> {
        let (mode, rotation, head_dim) = (pass.mode, &pass.rotations[self.rope], self.heads.head_dim);
        let normed = self.input_layernorm.forward(x, mode)?;
        let q = self.self_attn.q_proj.forward(&normed, mode)?;
        let k = self.self_attn.k_proj.forward(&normed, mode)?;
        let v = self.self_attn.v_proj.forward(&normed, mode)?;
        let q = rope(&self.q_norm.heads(&q, head_dim, mode)?, rotation)?;
        let k = rope(&self.k_norm.heads(&k, head_dim, mode)?, rotation)?;
        let attended = self
            .self_attn
            .o_proj
            .forward(&attend(&q, &k, &v, self.heads)?, mode)?;
        let x = (x + self.post_attention_layernorm.forward(&attended, mode)?)?;
        let normed = self.pre_feedforward_layernorm.forward(&x, mode)?;
        let y = self.mlp.forward(&normed, mode, geglu)?;
        &x + self.post_feedforward_layernorm.forward(&y, mode)?
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
            &self.pre_feedforward_layernorm,
            &self.post_feedforward_layernorm,
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
            &mut self.pre_feedforward_layernorm,
            &mut self.post_feedforward_layernorm,
        ]
    }
}
