//! The training loop: batches, loss, gradients, clipping, AdamW; evaluation, checkpoints, early stop.

mod backward;
pub mod checkpoint;
#[cfg(test)]
mod device_tests;
mod learner;
mod loss_scale;
mod progress;
mod sampler;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub use checkpoint::{CheckpointError, Checkpoints};
pub use learner::{Gradients, Learner, LearnerOptions, Stepped, unreached};
pub use loss_scale::LossScale;
pub(crate) use progress::Sums;
pub use progress::{Event, Metrics, Outcome, Progress};
pub use sampler::{Sampler, Sampling, Step};
use serde::{Deserialize, Serialize};

use crate::batch::Batch;
use crate::data::Sample;
use crate::evaluate;
use crate::model::{Mode, Model};
use crate::optimizer::Schedule;
use crate::random::mix;

/// How to train, spelled as transformers' `TrainingArguments` spells it.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// The order of the samples, and which of them make a step.
    pub sampling: Sampling,
    /// How gradients move the weights.
    pub learner: LearnerOptions,
    /// The learning rate after the warm-up.
    pub learning_rate: f64,
    /// How it goes on.
    pub schedule: Schedule,
    /// Steps over which it rises from 0.
    pub warmup_steps: usize,
    /// The number of steps.
    pub steps: usize,
    /// A report every so many steps.
    pub logging_steps: usize,
    /// When to evaluate; once at the end always.
    pub eval: When,
    /// When to save a checkpoint.
    pub save: When,
    /// The run ends after so many evaluations that were not better; 0 does not count them.
    pub early_stopping_patience: usize,
    /// An evaluation is better when its loss is smaller by more than this.
    pub early_stopping_threshold: f64,
    /// Rows of the output layer that are computed at a time.
    pub loss_chunk: usize,
}

/// Something that happens every so often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Not at all.
    Never,
    /// Every so many steps, at least 1.
    Steps(usize),
    /// When all samples were seen.
    Epoch,
}

/// `eval_strategy` and `save_strategy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Not at all.
    No,
    /// Every so many steps.
    Steps,
    /// After every pass over the data.
    Epoch,
}

impl Strategy {
    /// With its number of steps; 0 steps are never.
    pub fn every(self, steps: usize) -> When {
        match self {
            Self::No => When::Never,
            Self::Steps if steps == 0 => When::Never,
            Self::Steps => When::Steps(steps),
            Self::Epoch => When::Epoch,
        }
    }
}

impl When {
    pub(crate) fn is_due(self, step: usize, ends_epoch: bool) -> bool {
        match self {
            Self::Never => false,
            Self::Steps(steps) => step.is_multiple_of(steps),
            Self::Epoch => ends_epoch,
        }
    }
}

/// Why a run stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The loss, a gradient or a weight became NaN or infinite.
    #[error(
        "step {step}: {what} is not finite ({value})\nhint: lower --learning-rate (now {learning_rate:e}), or set --max-grad-norm"
    )]
    NotFinite {
        /// The step, from 1.
        step: usize,
        /// `the loss`, `the gradient's norm`, or a weight's name.
        what: String,
        /// Its value.
        value: f64,
        /// The learning rate of the step.
        learning_rate: f64,
        /// The samples of the step.
        samples: Vec<Sample>,
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
        /// The checkpoint that holds them.
        checkpoint: Option<PathBuf>,
    },
    /// A checkpoint cannot be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// What the loop tells could not be written down.
    #[error(transparent)]
    Tell(#[from] io::Error),
    /// The arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The steps that a run will do over samples of these lengths: the samples of each forward pass, by index.
pub fn plan_steps(lengths: Vec<usize>, options: &TrainOptions) -> impl Iterator<Item = Vec<Vec<usize>>> {
    let mut sampler = Sampler::new(lengths, options.sampling);
    (0..options.steps).map(move |_| sampler.take().passes)
}

fn batch_of<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Batch {
    Batch::new(
        samples
            .into_iter()
            .map(|sample| (sample.ids.as_slice(), sample.labels.as_slice())),
    )
}

/// Nats a token over samples, `batch_size` of them at a time.
pub fn evaluation_loss(model: &Model, samples: &[Sample], batch_size: usize) -> candle_core::Result<f64> {
    let (mut sum, mut tokens) = (0.0, 0);
    let all: Vec<&Sample> = samples.iter().collect();
    for part in all.chunks(batch_size.max(1)) {
        sum += evaluate::loss_sum(model, part)?;
        tokens += batch_of(part.iter().copied()).trained_tokens();
    }
    Ok(sum / tokens.max(1) as f64)
}

/// Trains whatever the model has that is trained, on the answers of `samples`, of which there must be at least one.
/// Needs a stack that is deep enough for the backward pass of the whole graph, see [`with_deep_stack`].
///
/// With `checkpoints` the run saves itself, also when it is stopped, and goes on where it was told to; then it ends
/// with the bits of a run that was never stopped.
pub fn train(
    model: &Model,
    samples: &[Sample],
    eval_samples: &[Sample],
    options: &TrainOptions,
    checkpoints: Option<&Checkpoints<'_>>,
    stop: &AtomicBool,
    mut tell: impl FnMut(Event) -> io::Result<()>,
) -> Result<Outcome, TrainError> {
    let mut learner = Learner::new(model, options.learner);
    let sequences = samples.iter().map(|sample| (&*sample.ids, &*sample.labels));
    let data = checkpoint::fingerprint(sequences);
    let mut progress = match checkpoints {
        Some(checkpoints) => checkpoints.start(&mut learner, data)?,
        None => Progress::default(),
    };
    let mut sampler = Sampler::new(
        samples.iter().map(|sample| sample.ids.len()).collect(),
        options.sampling,
    );
    sampler.skip(progress.global_step);
    let batch_size = options.sampling.batch_size;
    let load_best = checkpoints.is_some_and(|checkpoints| checkpoints.load_best_model_at_end);
    let patience = options.early_stopping_patience;
    let mut stopped_early = progress.is_out_of(patience) && progress.global_step < options.steps;

    while progress.global_step < options.steps && !stopped_early {
        if stop.load(Ordering::Relaxed) {
            return Err(interrupted(&learner, &progress, checkpoints, data)?);
        }
        let start = Instant::now();
        let step = sampler.take();
        let learning_rate = options.learning_rate
            * options
                .schedule
                .factor(progress.global_step, options.warmup_steps, options.steps);

        let at_once = learner.moves_at_once(step.passes.len());
        let (sums, gradients) = loop {
            // Σ over all tokens of the step, divided once: accumulation equals the large batch.
            let mut sums = Sums::default();
            for (i, pass) in step.passes.iter().enumerate() {
                let batch = batch_of(pass.iter().map(|sample| &samples[*sample]));
                let mode = Mode {
                    gradient: true,
                    dropout_seed: Some(dropout_seed(options.sampling.seed, progress.global_step, i)),
                    ..Mode::INFERENCE
                };
                let loss_of = |hidden: &_| model.loss_of_hidden(hidden, &batch, mode, options.loss_chunk);
                sums.loss += learner.pass(&batch, mode, learning_rate, at_once, loss_of)?;
                sums.trained_tokens += batch.trained_tokens();
                sums.tokens += batch.tokens();
            }
            let gradients = learner.gradients(sums.trained_tokens)?;
            let overflow = sums.loss.is_finite() && !gradients.norm.is_finite();
            if !overflow || !learner.lower_loss_scale() {
                break (sums, gradients);
            }
        };
        let loss = sums.loss / sums.trained_tokens as f64;
        let number = progress.global_step + 1;
        let not_finite = |what: &str, value: f64| TrainError::NotFinite {
            step: number,
            what: what.to_owned(),
            value,
            learning_rate,
            samples: step
                .passes
                .iter()
                .flatten()
                .map(|sample| samples[*sample].clone())
                .collect(),
        };
        for (what, value) in [("the loss", loss), ("the gradient's norm", gradients.norm)] {
            if !value.is_finite() {
                return Err(not_finite(what, value));
            }
        }
        learner.update(&gradients, learning_rate)?;
        let grad_norm = gradients.norm;
        drop(gradients);
        let last = number == options.steps;
        let is_due = |when: When| when.is_due(number, step.ends_epoch);
        let logs = last || number.is_multiple_of(options.logging_steps.max(1));
        let evaluates = (last || is_due(options.eval)) && !eval_samples.is_empty();
        let mut saves = is_due(options.save);
        // What is saved or ended with must be whole; elsewhere the next step's loss says it.
        if (saves || evaluates || last)
            && let Some(name) = learner.not_finite()?
        {
            return Err(not_finite(name, f64::NAN));
        }

        progress.add(sums, step.epoch, start.elapsed().as_secs_f64());
        tell(Event::Step(
            progress.global_step,
            loss,
            progress.tokens_per_second(),
        ))?;
        if logs {
            tell(Event::Metrics(progress.report(learning_rate, grad_norm)))?;
        }
        if evaluates {
            let eval_loss = evaluation_loss(model, eval_samples, batch_size)?;
            if !eval_loss.is_finite() {
                return Err(not_finite("the evaluation loss", eval_loss));
            }
            tell(Event::Evaluation(progress.global_step, eval_loss))?;
            saves |= progress.judge(eval_loss, options.early_stopping_threshold) && load_best;
            stopped_early = progress.is_out_of(patience) && !last;
        }
        if let Some(checkpoints) = checkpoints
            && saves
        {
            checkpoints.save(&learner, &progress, data)?;
            tell(Event::Saved(progress.global_step))?;
        }
    }

    if stopped_early {
        tell(Event::Stopped(progress.global_step))?;
    }
    let mut eval_loss = progress.eval_loss;
    if let (Some(checkpoints), Some(best)) = (checkpoints.filter(|_| load_best), progress.best_global_step)
        && best != progress.global_step
    {
        checkpoints.load_weights(&learner, best)?;
        eval_loss = progress.best_metric;
    }
    Ok(progress.outcome(eval_loss, stopped_early))
}

/// The error of a run that was told to stop, once what is worth it is saved.
pub(crate) fn interrupted(
    learner: &Learner<'_>,
    progress: &Progress,
    checkpoints: Option<&Checkpoints<'_>>,
    data: u64,
) -> Result<TrainError, TrainError> {
    let step = progress.global_step;
    let worth_saving = step > 0 && learner.not_finite()?.is_none();
    let checkpoint = match checkpoints.filter(|_| worth_saving) {
        Some(checkpoints) => Some(checkpoints.save(learner, progress, data)?),
        None => None,
    };
    Ok(TrainError::Interrupted { step, checkpoint })
}

/// The seed of the dropout in forward pass `pass` of a step.
pub(crate) fn dropout_seed(seed: u64, step: usize, pass: usize) -> u64 {
    mix(seed ^ mix(mix(step as u64) ^ pass as u64))
}

/// Runs `work` on a thread with a stack of 512 MiB (reserved, not used): candle walks the graph recursively,
/// and a deep model overflows the usual one.
pub fn with_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
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
