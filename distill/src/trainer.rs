//! The training loop: batches, loss, gradients, clipping, AdamW.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::Tensor;
use serde::Serialize;

use crate::batch::Batch;
use crate::data::Sample;
use crate::evaluate;
use crate::model::{Mode, Model};
use crate::optimizer::{AdamW, AdamWOptions, Schedule, clip_factor, global_norm};
use crate::random::{Random, mix};

/// How to train, spelled as transformers' `TrainingArguments` spells it.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// Sequences in one forward pass.
    pub batch_size: usize,
    /// Forward passes in one step; their gradients add up to those of one large batch.
    pub gradient_accumulation_steps: usize,
    /// The learning rate after the warm-up.
    pub learning_rate: f64,
    /// How it goes on.
    pub schedule: Schedule,
    /// Steps over which it rises from 0.
    pub warmup_steps: usize,
    /// The constants of AdamW.
    pub adamw: AdamWOptions,
    /// Longer gradients are shortened to this norm; 0 does not.
    pub max_grad_norm: f64,
    /// The number of steps.
    pub steps: usize,
    /// Decides the order of the samples and the dropout.
    pub seed: u64,
    /// A report every so many steps.
    pub logging_steps: usize,
    /// An evaluation every so many steps; 0 only at the end.
    pub eval_steps: usize,
    /// Rows of the output layer that are computed at a time.
    pub loss_chunk: usize,
}

impl TrainOptions {
    /// The number of steps in one pass over so many samples; the last may be smaller.
    pub fn steps_per_epoch(&self, samples: usize) -> usize {
        samples
            .div_ceil(self.batch_size * self.gradient_accumulation_steps)
            .max(1)
    }
}

/// What a report says; averages are over the steps since the last one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metrics {
    /// The step that was just done, from 1.
    pub step: usize,
    /// Passes over the data so far.
    pub epoch: f64,
    /// Nats a trained token.
    pub loss: f64,
    /// The learning rate of the last step.
    pub learning_rate: f64,
    /// The norm of the last step's gradient, before clipping.
    pub grad_norm: f64,
    /// Tokens that went through the model, a second.
    pub tokens_per_second: f64,
    /// Tokens that went through the model so far.
    pub tokens: usize,
    /// Seconds since the start.
    pub seconds: f64,
}

/// What the loop tells while it runs.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A step is done: its number, its loss, and tokens a second so far.
    Step(usize, f64, f64),
    /// `logging_steps` steps are done.
    Metrics(Metrics),
    /// The model was evaluated after a step: nats a token.
    Evaluation(usize, f64),
}

/// What came of a run that went through.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Steps done.
    pub steps: usize,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Nats a token over the last logged steps.
    pub loss: f64,
    /// Nats a token on the evaluation data at the end.
    pub eval_loss: Option<f64>,
    /// Seconds of training, without evaluation.
    pub seconds: f64,
    /// Tokens a second over the whole run.
    pub tokens_per_second: f64,
}

/// Why a run stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The loss or a gradient became NaN or infinite.
    #[error(
        "step {step}: {what} is {value}; nothing of this run can be used\nhint: lower --learning-rate (now {learning_rate:e}), or set --max-grad-norm"
    )]
    NotFinite {
        /// The step, from 1.
        step: usize,
        /// `the loss` or `the gradient's norm`.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The learning rate of the step.
        learning_rate: f64,
        /// The lines of the step's samples.
        lines: Vec<usize>,
    },
    /// A trained tensor got no gradient.
    #[error("{tensor} is trained but gets no gradient; this is a fault of this program")]
    NoGradient {
        /// The tensor.
        tensor: String,
    },
    /// The user asked to stop.
    #[error("interrupted after {step} steps")]
    Interrupted {
        /// Steps done.
        step: usize,
    },
    /// The arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The order of the samples: shuffled anew for every pass.
struct Sampler<'a> {
    samples: &'a [Sample],
    order: Vec<usize>,
    next: usize,
    random: Random,
}

impl<'a> Sampler<'a> {
    fn new(samples: &'a [Sample], seed: u64) -> Self {
        Self {
            samples,
            order: Vec::new(),
            next: 0,
            random: Random::new(seed, "order of the samples"),
        }
    }

    /// The samples of one step: at most `count`, fewer at the end of a pass.
    fn take(&mut self, count: usize) -> Vec<&'a Sample> {
        if self.next == self.order.len() {
            self.order = (0..self.samples.len()).collect();
            self.random.shuffle(&mut self.order);
            self.next = 0;
        }
        let end = self.order.len().min(self.next + count);
        let step = self.order[self.next..end]
            .iter()
            .map(|i| &self.samples[*i])
            .collect();
        self.next = end;
        step
    }
}

fn batch_of(samples: &[&Sample]) -> Batch {
    Batch::new(
        samples
            .iter()
            .map(|sample| (sample.ids.as_slice(), sample.labels.as_slice())),
    )
}

/// Nats a token over samples, `batch_size` of them at a time.
pub fn evaluation_loss(model: &Model, samples: &[Sample], batch_size: usize) -> candle_core::Result<f64> {
    let (mut sum, mut tokens) = (0.0, 0);
    let all: Vec<&Sample> = samples.iter().collect();
    for part in all.chunks(batch_size.max(1)) {
        sum += evaluate::loss_sum(model, part)?;
        tokens += batch_of(part).trained_tokens();
    }
    Ok(sum / tokens.max(1) as f64)
}

/// Trains whatever the model has that is trained. Needs a stack that is deep enough for the backward pass of
/// the whole graph, see [`with_deep_stack`]. `samples` must not be empty.
pub fn train(
    model: &Model,
    samples: &[Sample],
    eval_samples: &[Sample],
    options: &TrainOptions,
    stop: &AtomicBool,
    mut tell: impl FnMut(Event),
) -> Result<Outcome, TrainError> {
    let trained = model.trained();
    let mut optimizer = AdamW::new(trained.iter().map(|(_, var)| (*var).clone()), options.adamw);
    let mut sampler = Sampler::new(samples, options.seed);
    let per_step = options.batch_size * options.gradient_accumulation_steps;
    let per_epoch = options.steps_per_epoch(samples.len());
    let (mut tokens, mut seconds) = (0, 0.0);
    // Since the last report: loss sum, trained tokens, tokens, seconds.
    let mut since = (0.0, 0, 0, 0.0);
    let (mut loss, mut last_loss) = (f64::NAN, f64::NAN);
    for step in 0..options.steps {
        if stop.load(Ordering::Relaxed) {
            return Err(TrainError::Interrupted { step });
        }
        let start = Instant::now();
        let learning_rate =
            options.learning_rate * options.schedule.factor(step, options.warmup_steps, options.steps);
        let chosen = sampler.take(per_step);
        let batches: Vec<Batch> = chosen.chunks(options.batch_size).map(batch_of).collect();
        let trained_tokens: usize = batches.iter().map(Batch::trained_tokens).sum();
        let step_tokens: usize = batches.iter().map(Batch::tokens).sum();

        // Σ over all tokens of the step, divided once: accumulation equals the large batch.
        let mut gradients: Vec<Tensor> = Vec::new();
        let mut step_loss = 0.0;
        for (i, batch) in batches.iter().enumerate() {
            let dropout_seed = Some(mix(options.seed ^ mix((step * per_step + i) as u64)));
            let mode = Mode {
                gradient: true,
                dropout_seed,
            };
            let sum = model.loss_sum(batch, mode, options.loss_chunk)?;
            step_loss += f64::from(sum.to_scalar::<f32>()?);
            let mut store = sum.backward()?;
            for (i, (name, var)) in trained.iter().enumerate() {
                let gradient = store.remove(var);
                let gradient = gradient.ok_or_else(|| TrainError::NoGradient {
                    tensor: (*name).to_owned(),
                })?;
                match gradients.get_mut(i) {
                    Some(sum) => *sum = (&*sum + gradient)?,
                    None => gradients.push(gradient),
                }
            }
        }
        last_loss = step_loss / trained_tokens as f64;
        let norm = global_norm(&gradients)? / trained_tokens as f64;
        for (what, value) in [("the loss", last_loss), ("the gradient's norm", norm)] {
            if !value.is_finite() {
                let lines = chosen.iter().map(|sample| sample.line).collect();
                return Err(TrainError::NotFinite {
                    step: step + 1,
                    what,
                    value,
                    learning_rate,
                    lines,
                });
            }
        }
        let scale = clip_factor(norm, options.max_grad_norm) / trained_tokens as f64;
        optimizer.step(&gradients, learning_rate, scale)?;

        let step_seconds = start.elapsed().as_secs_f64();
        tokens += step_tokens;
        seconds += step_seconds;
        since = (
            since.0 + step_loss,
            since.1 + trained_tokens,
            since.2 + step_tokens,
            since.3 + step_seconds,
        );
        tell(Event::Step(step + 1, last_loss, tokens as f64 / seconds));
        let last = step + 1 == options.steps;
        if (step + 1) % options.logging_steps.max(1) == 0 || last {
            loss = since.0 / since.1 as f64;
            tell(Event::Metrics(Metrics {
                step: step + 1,
                epoch: (step + 1) as f64 / per_epoch as f64,
                loss,
                learning_rate,
                grad_norm: norm,
                tokens_per_second: since.2 as f64 / since.3,
                tokens,
                seconds,
            }));
            since = (0.0, 0, 0, 0.0);
        }
        if options.eval_steps > 0 && (step + 1) % options.eval_steps == 0 && !last && !eval_samples.is_empty()
        {
            tell(Event::Evaluation(
                step + 1,
                evaluation_loss(model, eval_samples, options.batch_size)?,
            ));
        }
    }
    let mut eval_loss = None;
    if !eval_samples.is_empty() {
        let loss = evaluation_loss(model, eval_samples, options.batch_size)?;
        tell(Event::Evaluation(options.steps, loss));
        eval_loss = Some(loss);
    }
    let loss = if loss.is_nan() { last_loss } else { loss };
    let tokens_per_second = tokens as f64 / seconds.max(1e-9);
    Ok(Outcome {
        steps: options.steps,
        tokens,
        loss,
        eval_loss,
        seconds,
        tokens_per_second,
    })
}

/// Runs `work` on a thread with a stack of 512 MiB (reserved, not used): candle walks the graph recursively,
/// and a deep model overflows the usual one.
pub fn with_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> std::io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("train".into())
            .stack_size(512 << 20);
        match thread.spawn_scoped(scope, work)?.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
