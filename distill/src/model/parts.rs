//! The linear layers that every block here has, under the names of their modules.

use candle_core::{Result, Tensor};

use super::load::Loader;
use super::{Config, Linear, Mode, ModelError, Parameter};

/// The linear layers of attention.
#[derive(Debug)]
pub(super) struct SelfAttn {
    /// `[heads · head_dim, hidden_size]`.
    pub(super) q_proj: Linear,
    /// `[kv_heads · head_dim, hidden_size]`.
    pub(super) k_proj: Linear,
    /// `[kv_heads · head_dim, hidden_size]`.
    pub(super) v_proj: Linear,
    /// `[hidden_size, heads · head_dim]`.
    pub(super) o_proj: Linear,
}

/// Whether queries, keys and values have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QkvBias {
    With,
    Without,
}

impl SelfAttn {
    pub(super) fn load(
        loader: &mut Loader<'_>,
        config: &Config,
        block: usize,
        bias: QkvBias,
    ) -> std::result::Result<Self, ModelError> {
        let (d, heads) = (config.hidden_size, config.heads(block));
        let (q, kv) = (heads.q_width(), heads.kv_width());
        let name = |part: &str| format!("model.layers.{block}.self_attn.{part}");
        let bias = bias == QkvBias::With;
        Ok(Self {
            q_proj: loader.linear(&name("q_proj"), q, d, bias)?,
            k_proj: loader.linear(&name("k_proj"), kv, d, bias)?,
            v_proj: loader.linear(&name("v_proj"), kv, d, bias)?,
            o_proj: loader.linear(&name("o_proj"), d, q, false)?,
        })
    }

    pub(super) fn linears(&self) -> [&Linear; 4] {
        [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj]
    }

    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 4] {
        [
            &mut self.q_proj,
            &mut self.k_proj,
            &mut self.v_proj,
            &mut self.o_proj,
        ]
    }

    pub(super) fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.linears().into_iter().flat_map(Linear::parameters)
    }
}

/// A gated feed-forward layer: down(activation(gate(x)) · up(x)), <https://arxiv.org/abs/2002.05202>.
#[derive(Debug)]
pub(super) struct Mlp {
    /// `[intermediate_size, hidden_size]`.
    gate_proj: Linear,
    /// `[intermediate_size, hidden_size]`.
    up_proj: Linear,
    /// `[hidden_size, intermediate_size]`.
    down_proj: Linear,
}

impl Mlp {
    pub(super) fn load(
        loader: &mut Loader<'_>,
        config: &Config,
        block: usize,
    ) -> std::result::Result<Self, ModelError> {
        let (d, ffn) = (config.hidden_size, config.intermediate_size);
        let name = |part: &str| format!("model.layers.{block}.mlp.{part}");
        Ok(Self {
            gate_proj: loader.linear(&name("gate_proj"), ffn, d, false)?,
            up_proj: loader.linear(&name("up_proj"), ffn, d, false)?,
            down_proj: loader.linear(&name("down_proj"), d, ffn, false)?,
        })
    }

    /// x `[rows, hidden_size]` → the same shape. `glu` is activation(gate) · up.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        mode: Mode,
        glu: fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let gate = self.gate_proj.forward(x, mode)?;
        let up = self.up_proj.forward(x, mode)?;
        self.down_proj.forward(&glu(&gate, &up)?, mode)
    }

    pub(super) fn linears(&self) -> [&Linear; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj]
    }

    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 3] {
        [&mut self.gate_proj, &mut self.up_proj, &mut self.down_proj]
    }

    pub(super) fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.linears().into_iter().flat_map(Linear::parameters)
    }
}
