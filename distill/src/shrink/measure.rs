//! What blocks, heads and channels do to a text: the measures by which some of them go.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor};

use crate::batch::Batch;
use crate::data::Sample;
use crate::model::ops::with_elements;
use crate::model::{Mode, Model, Watch};

/// The rows of the output layer that are computed at once.
const CHUNK: usize = 256;

/// What was measured of a model on a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// For each block its influence: 1 − the mean over all tokens of the cosine between what goes into it and what
    /// comes out. ShortGPT, <https://arxiv.org/abs/2403.03853> equation 1.
    pub influence: Vec<f64>,
    /// For each block, for each query head, how large its output is: the mean over a sequence's tokens of its norm, and
    /// of that the norm over the sequences. Minitron, <https://arxiv.org/abs/2407.14679> section 2.2 and table 10.
    pub heads: Vec<Vec<f64>>,
    /// The same for the channels of the feed-forward layer, of what goes into `down_proj`.
    pub channels: Vec<Vec<f64>>,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Σ −log p over the labels, in nats.
    pub loss_sum: f64,
    /// The number of labels.
    pub labels: usize,
}

/// Puts samples through a model, one after the other. `each` is told how many are done, and stops by an error.
pub fn measure<E: From<candle_core::Error>>(
    model: &mut Model,
    samples: &[Sample],
    mut each: impl FnMut(usize) -> std::result::Result<(), E>,
) -> std::result::Result<Measured, E> {
    let config = model.config().clone();
    let watched = |end: &str, group: usize, model: &mut Model| -> Vec<Arc<Sizes>> {
        let linears = model
            .linears_mut()
            .filter(|linear| linear.module().ends_with(end));
        let watch = |linear: &mut crate::model::Linear| {
            let sizes = Arc::new(Sizes::new(group));
            linear.watch = Some(sizes.clone());
            sizes
        };
        linears.map(watch).collect()
    };
    let heads = watched("self_attn.o_proj", config.head_dim, model);
    let channels = watched("mlp.down_proj", 1, model);
    let sums = through(model, samples, &mut each);
    model.linears_mut().for_each(|linear| linear.watch = None);
    let (cosines, loss_sum, labels) = sums?;
    let tokens = samples.iter().map(|sample| sample.ids.len()).sum();
    let norms = |watched: &[Arc<Sizes>]| watched.iter().map(|sizes| sizes.norms()).collect();
    Ok(Measured {
        influence: cosines.iter().map(|sum| 1.0 - sum / tokens as f64).collect(),
        heads: norms(&heads),
        channels: norms(&channels),
        tokens,
        loss_sum,
        labels,
    })
}

/// The sum of the cosines over each block, the sum of the loss, and the number of labels.
fn through<E: From<candle_core::Error>>(
    model: &Model,
    samples: &[Sample],
    each: &mut impl FnMut(usize) -> std::result::Result<(), E>,
) -> std::result::Result<(Vec<f64>, f64, usize), E> {
    let (mut cosines, mut loss_sum, mut labels) = (vec![0.0; model.blocks()], 0.0, 0);
    for (done, sample) in samples.iter().enumerate() {
        let batch = Batch::new([(sample.ids.as_slice(), sample.labels.as_slice())]);
        let pass = model.pass(&batch, &[], Mode::INFERENCE);
        let mut x = model.embed(&batch, &pass)?;
        for (i, sum) in cosines.iter_mut().enumerate() {
            let y = model.block(i, &x, &pass)?;
            *sum += cosine_sum(&x, &y)?;
            x = y;
        }
        let hidden = model.last_norm(&x, &pass)?;
        let loss = model.loss_of_hidden(&hidden, &batch, Mode::INFERENCE, CHUNK)?;
        loss_sum += f64::from(loss.to_scalar::<f32>()?);
        labels += batch.trained_tokens();
        each(done + 1)?;
    }
    Ok((cosines, loss_sum, labels))
}

/// The sum over the rows of the cosine between them, x and y `[rows, d]`. A row of zeros has cosine 0.
fn cosine_sum(x: &Tensor, y: &Tensor) -> Result<f64> {
    const OP: &str = "cosine";
    let d = x.dim(1)?;
    with_elements::<f32, _>(x, OP, |x| {
        with_elements::<f32, _>(y, OP, |y| {
            let rows = x.chunks_exact(d).zip(y.chunks_exact(d));
            Ok(rows
                .map(|(x, y)| dot(x, y) / (dot(x, x) * dot(y, y)).sqrt().max(f64::MIN_POSITIVE))
                .sum())
        })
    })
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// How large the inputs of a linear layer are, by groups of neighbouring columns.
#[derive(Debug)]
struct Sizes {
    group: usize,
    /// For each group Σ over the sequences of (the mean over the rows of its norm)².
    squares: Mutex<Vec<f64>>,
}

impl Sizes {
    fn new(group: usize) -> Self {
        Self {
            group,
            squares: Mutex::default(),
        }
    }

    fn norms(&self) -> Vec<f64> {
        let squares = self.squares.lock().unwrap_or_else(PoisonError::into_inner);
        squares.iter().map(|square| square.sqrt()).collect()
    }
}

impl Watch for Sizes {
    /// Takes up one sequence.
    fn see(&self, x: &Tensor) -> Result<()> {
        let (rows, columns) = x.dims2()?;
        let mut means = vec![0.0; columns / self.group];
        with_elements::<f32, _>(x, "sizes of columns", |x| {
            for row in x.chunks_exact(columns) {
                for (mean, group) in means.iter_mut().zip(row.chunks_exact(self.group)) {
                    *mean += dot(group, group).sqrt() / rows as f64;
                }
            }
            Ok(())
        })?;
        let mut squares = self.squares.lock().unwrap_or_else(PoisonError::into_inner);
        squares.resize(means.len(), 0.0);
        for (square, mean) in squares.iter_mut().zip(means) {
            *square += mean * mean;
        }
        Ok(())
    }
}
