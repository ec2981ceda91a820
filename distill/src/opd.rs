//! On-policy distillation: a student learns from what a teacher thinks of every token of the student's own answers
//! (GKD, <https://arxiv.org/abs/2306.13649>; MiniLLM, <https://arxiv.org/abs/2306.08543>).
//!
//! Data flows: [`tasks`] → rollouts of the student → scores of the [`teacher`](crate::teacher) →
//! [`loss`](crate::loss) → [`Learner`] → metrics. Beside it: [`preflight`] refuses what cannot work, [`through`] has
//! the student compute with the weights that it will be deployed with, [`divergence`] measures how far it is from its
//! teacher, [`deployed`] does so on the GGUF file that it becomes, [`draft`] says what that is worth to a draft model.

pub mod deployed;
pub mod divergence;
pub mod draft;
#[cfg(test)]
mod modes;
pub mod preflight;
mod progress;
pub mod rolls;
pub mod tasks;
pub mod through;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use std::{io, mem};

pub use deployed::DeployError;
pub use divergence::Divergence;
pub use progress::{Event, OpdMetrics, OpdProgress};
pub use rolls::{Rolls, Source};
pub use tasks::Task;
use tasks::Text;
pub use through::{Through, ThroughError};

use crate::batch::Batch;
use crate::loss::{LossError, Objective, Taught};
use crate::model::{Mode, Model};
use crate::rollout::{RolloutOptions, Stop};
use crate::teacher::{Asked, Teacher, TeacherError};
use crate::trainer::{
    Checkpoints, Learner, Outcome, Progress, Sampler, Sums, TrainError, TrainOptions, checkpoint,
    dropout_seed, interrupted,
};

/// How to distil.
#[derive(Debug, Clone, PartialEq)]
pub struct OpdOptions {
    /// Steps, learning rate, evaluation and the like, as for any training.
    pub train: TrainOptions,
    /// What is minimised.
    pub objective: Objective,
    /// λ: the share of rows that the student answers itself; the others are trained on with the answers that they have.
    pub on_policy_fraction: f64,
    /// How the student answers.
    pub rollout: RolloutOptions,
    /// The most tokens of an answer.
    pub max_new_tokens: usize,
    /// Answers are drawn for so many steps at a time, at least 1.
    pub steps_per_generation: usize,
}

/// Why a distillation stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpdError {
    /// As for any training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The teacher gives no scores.
    #[error(transparent)]
    Teacher(Box<TeacherError>),
    /// The teacher's scores are not enough for the loss.
    #[error(transparent)]
    Loss(#[from] LossError),
    /// The student cannot be quantised.
    #[error(transparent)]
    Through(Box<ThroughError>),
    /// The student's GGUF file cannot be made or run.
    #[error(transparent)]
    Deploy(Box<DeployError>),
}

impl From<TeacherError> for OpdError {
    fn from(error: TeacherError) -> Self {
        Self::Teacher(Box::new(error))
    }
}

impl From<ThroughError> for OpdError {
    fn from(error: ThroughError) -> Self {
        Self::Through(Box::new(error))
    }
}

impl From<DeployError> for OpdError {
    fn from(error: DeployError) -> Self {
        Self::Deploy(Box::new(error))
    }
}

impl From<candle_core::Error> for OpdError {
    fn from(error: candle_core::Error) -> Self {
        Self::Train(error.into())
    }
}

impl From<crate::trainer::CheckpointError> for OpdError {
    fn from(error: crate::trainer::CheckpointError) -> Self {
        Self::Train(error.into())
    }
}

impl From<io::Error> for OpdError {
    fn from(error: io::Error) -> Self {
        Self::Train(error.into())
    }
}

/// Who takes part.
pub struct Cast<'a> {
    /// Whatever it has that is trained is trained.
    pub student: &'a Model,
    /// Its end tokens.
    pub eos: &'a [u32],
    /// Whom it learns from.
    pub teacher: &'a mut dyn Teacher,
    /// Who draws the student's answers.
    pub source: Source<'a>,
    /// The student computes with quantised weights.
    pub through: Option<Through>,
}

/// Distils on `tasks`, of which there must be at least one. On the answers of `eval_tasks` student and teacher are
/// compared. Checkpoints, stopping and going on are as in [`train`](crate::trainer::train), and so is the stack that
/// it needs.
pub fn distil(
    cast: &mut Cast<'_>,
    tasks: &[Task],
    eval_tasks: &[Task],
    options: &OpdOptions,
    checkpoints: Option<&Checkpoints<'_>>,
    stop: &AtomicBool,
    mut tell: impl FnMut(Event) -> io::Result<()>,
) -> Result<(Outcome, Option<Divergence>), OpdError> {
    let OpdOptions { train, objective, .. } = options;
    let student = cast.student;
    let mut learner = Learner::new(student, train.learner);
    let data = checkpoint::fingerprint(tasks.iter().flat_map(Task::sequences));
    let mut progress = match checkpoints {
        Some(checkpoints) => checkpoints.start(&mut learner, data)?,
        None => Progress::default(),
    };
    let lengths = tasks.iter().map(|task| task.longest(options)).collect();
    let mut sampler = Sampler::new(lengths, train.sampling);
    sampler.skip(progress.global_step);
    let rolls = Rolls {
        tasks,
        options,
        stop: Stop {
            eos: cast.eos,
            max_new_tokens: options.max_new_tokens,
        },
    };
    let load_best = checkpoints.is_some_and(|checkpoints| checkpoints.load_best_model_at_end);
    let patience = train.early_stopping_patience;
    let mut stopped_early = progress.is_out_of(patience) && progress.global_step < train.steps;
    let mut divergence = None;

    while progress.global_step < train.steps && !stopped_early {
        if stop.load(Ordering::Relaxed) {
            return Err(interrupted(&learner, &progress, checkpoints, data)?.into());
        }
        let start = Instant::now();
        if progress.global_step.is_multiple_of(options.steps_per_generation) {
            let mut ahead = sampler.clone();
            let last = train
                .steps
                .min(progress.global_step + options.steps_per_generation);
            let steps: Vec<_> = (progress.global_step..last)
                .map(|step| (step, ahead.take()))
                .collect();
            progress.opd.rollouts = rolls.draw(cast, &steps)?.into();
            progress.opd.window.rollout_seconds += start.elapsed().as_secs_f64();
        }
        if let Some(through) = &mut cast.through {
            through.put_on()?;
        }
        let step = sampler.take();
        let learning_rate = train.learning_rate
            * train
                .schedule
                .factor(progress.global_step, train.warmup_steps, train.steps);

        // Σ over all tokens of the step, divided once: accumulation equals the large batch.
        let mut sums = Sums::default();
        let mut seen: Vec<Text> = Vec::new();
        // Quantised weights are taken off again before the real ones move.
        let at_once = learner.moves_at_once(step.passes.len()) && cast.through.is_none();
        for (i, (pass, on_policy)) in step
            .passes
            .iter()
            .zip(rolls.coins(progress.global_step, &step))
            .enumerate()
        {
            let texts = rolls.texts(pass, &on_policy, &mut progress.opd.rollouts);
            let batch = Batch::new(texts.iter().map(|text| (&*text.ids, &*text.labels)));
            let asking = Instant::now();
            let asked: Vec<Asked<'_>> = texts.iter().map(Text::asked).collect();
            let scores = cast.teacher.score(&asked)?;
            objective.accepts(&scores)?;
            progress.opd.window.teacher_seconds += asking.elapsed().as_secs_f64();
            let taught = Taught {
                scores,
                old: tasks::logprobs(&texts),
            };
            let mode = Mode {
                gradient: true,
                dropout_seed: Some(dropout_seed(train.sampling.seed, progress.global_step, i)),
                ..Mode::default()
            };
            let mut measures = None;
            let loss_of = |hidden: &_| {
                let (loss, of_batch) = student.distillation_loss(hidden, &batch, taught, objective, mode)?;
                measures = Some(of_batch);
                Ok(loss)
            };
            sums.loss += learner.pass(&batch, mode, learning_rate, at_once, loss_of)?;
            sums.trained_tokens += batch.trained_tokens();
            sums.tokens += batch.tokens();
            progress.opd.window.add(&texts, cast.eos, measures.as_ref());
            seen.extend(texts);
        }
        take_off(cast)?;
        let gradients = learner.gradients(sums.trained_tokens.max(1))?;
        let loss = sums.loss / sums.trained_tokens.max(1) as f64;
        let number = progress.global_step + 1;
        let mut not_finite = |what: &str, value: f64| TrainError::NotFinite {
            step: number,
            what: what.to_owned(),
            value,
            learning_rate,
            samples: mem::take(&mut seen).into_iter().map(Text::sample).collect(),
        };
        for (what, value) in [("the loss", loss), ("the gradient's norm", gradients.norm)] {
            if !value.is_finite() {
                return Err(not_finite(what, value).into());
            }
        }
        learner.update(&gradients, learning_rate)?;
        let grad_norm = gradients.norm;
        drop(gradients);
        let last = number == train.steps;
        let logs = last || number.is_multiple_of(train.logging_steps.max(1));
        let evaluates = (last || train.eval.is_due(number, step.ends_epoch)) && !eval_tasks.is_empty();
        let mut saves = train.save.is_due(number, step.ends_epoch);
        // What is saved or ended with must be whole; elsewhere the next step's loss says it.
        if (saves || evaluates || last)
            && let Some(name) = learner.not_finite()?
        {
            return Err(not_finite(name, f64::NAN).into());
        }

        progress.add(sums, step.epoch, start.elapsed().as_secs_f64());
        tell(Event::Step(
            progress.global_step,
            loss,
            progress.tokens_per_second(),
        ))?;
        if logs {
            let metrics = progress.report(learning_rate, grad_norm);
            tell(Event::Metrics(progress.opd.window.take(metrics)))?;
        }
        if evaluates {
            let found = compare(cast, eval_tasks, train.sampling.batch_size)?;
            tell(Event::Evaluation(progress.global_step, found))?;
            take_off(cast)?;
            let eval_loss = found.eval_loss();
            if !eval_loss.is_finite() {
                return Err(not_finite("the divergence from the teacher", eval_loss).into());
            }
            saves |= progress.judge(eval_loss, train.early_stopping_threshold) && load_best;
            stopped_early = progress.is_out_of(patience) && !last;
            divergence = Some(found);
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
        divergence = Some(compare(cast, eval_tasks, train.sampling.batch_size)?);
        take_off(cast)?;
    }
    Ok((progress.outcome(eval_loss, stopped_early), divergence))
}

/// How far the student is from its teacher, with the weights that it will be deployed with; it keeps them on.
fn compare(cast: &mut Cast<'_>, tasks: &[Task], batch_size: usize) -> Result<Divergence, OpdError> {
    if let Some(through) = &mut cast.through {
        through.put_on()?;
    }
    divergence::measure(cast.student, cast.teacher, tasks, batch_size)
}

/// The student has its own weights again, which can move and be saved.
fn take_off(cast: &mut Cast<'_>) -> Result<(), OpdError> {
    match &mut cast.through {
        Some(through) => Ok(through.take_off()?),
        None => Ok(()),
    }
}
