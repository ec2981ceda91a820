//! The table of an architecture: a line for every tensor, with its name on both sides and its shape.
//!
//! In: lines, and the [`Sizes`] that `config.json` gives. Out: a [`TensorRule`] for every tensor of the model.

use super::decoder::Sizes;
use super::{ArchError, Change, Config, RowOrder, TensorRule};

/// A dimension, by what it counts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Dim {
    Vocabulary,
    Hidden,
    /// All query heads.
    Query,
    /// All key heads, and as many value heads.
    KeyValue,
    /// One head.
    Head,
    FeedForward,
    /// Queries, keys and values, fused into one matrix.
    QueryKeyValue,
    /// The gate and what it gates, fused into one matrix.
    GateUp,
    /// The three inputs of a short convolution, fused into one matrix.
    ConvInputs,
    One,
    /// The length of a short convolution.
    Kernel,
}

/// When a tensor has a bias beside it.
#[derive(Debug, Clone, Copy)]
enum Bias {
    Never,
    Always,
    /// Where this key of `config.json` is true.
    If(&'static str),
}

/// One line of a table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Line {
    hf: &'static str,
    gguf: &'static str,
    shape: &'static [Dim],
    bias: Bias,
    rotated: bool,
    change: Change,
    always_f32: bool,
}

/// A tensor by its names without `.weight`, and without what stands before them in a layer.
pub(super) const fn line(hf: &'static str, gguf: &'static str, shape: &'static [Dim]) -> Line {
    Line {
        hf,
        gguf,
        shape,
        bias: Bias::Never,
        rotated: false,
        change: Change::None,
        always_f32: false,
    }
}

impl Line {
    /// llama.cpp rotates neighbours in this architecture ([`RowOrder::Interleaved`]).
    pub(super) const fn rotated(self) -> Self {
        Self {
            rotated: true,
            ..self
        }
    }

    /// It has a bias where `key` of `config.json` is true.
    pub(super) const fn bias_if(self, key: &'static str) -> Self {
        Self {
            bias: Bias::If(key),
            ..self
        }
    }

    /// It has a bias.
    pub(super) const fn bias(self) -> Self {
        Self {
            bias: Bias::Always,
            ..self
        }
    }

    /// llama.cpp's weight is one more.
    pub(super) const fn plus_one(self) -> Self {
        Self {
            change: Change::PlusOne,
            ..self
        }
    }

    /// It is never quantised.
    pub(super) const fn always_f32(self) -> Self {
        Self {
            always_f32: true,
            ..self
        }
    }
}

/// Where the lines of a table stand: outside the layers, or in one of them.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    Outside,
    Layer(usize),
}

/// The rules of `lines` at `place`.
pub(super) fn rules(
    lines: &[Line],
    place: Place,
    config: &Config<'_>,
    sizes: &Sizes,
) -> Result<Vec<TensorRule>, ArchError> {
    let name = |own: &str, layers: &str, suffix: &str| match place {
        Place::Outside => format!("{own}.{suffix}"),
        Place::Layer(layer) => format!("{layers}.{layer}.{own}.{suffix}"),
    };
    let mut rules = Vec::new();
    for line in lines {
        let shape: Vec<_> = line.shape.iter().map(|dim| sizes.of(*dim)).collect();
        let bias = match line.bias {
            Bias::Never => false,
            Bias::Always => true,
            Bias::If(key) => config.flag(key)?,
        };
        let rows = if line.rotated {
            RowOrder::Interleaved {
                head_dim: sizes.head_dim,
            }
        } else {
            RowOrder::Same
        };
        let rule = |suffix: &str, shape: &[usize]| TensorRule {
            hf: name(line.hf, "model.layers", suffix),
            gguf: name(line.gguf, "blk", suffix),
            shape: shape.to_vec(),
            rows,
            change: line.change,
            always_f32: line.always_f32,
        };
        rules.push(rule("weight", &shape));
        if bias {
            rules.push(rule("bias", &shape[..1]));
        }
    }
    Ok(rules)
}
