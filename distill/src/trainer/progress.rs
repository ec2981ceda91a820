//! How far a run has come: what it tells while it runs, and what a checkpoint must know to go on.

use serde::{Deserialize, Serialize};

use crate::opd::OpdProgress;

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
    /// Seconds of training so far.
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
    /// The step after which a checkpoint was saved.
    Saved(usize),
    /// The evaluation has not become better for so many times: the run ends early.
    Stopped(usize),
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
    /// Nats a token on the evaluation data, of the weights that the run ends with.
    pub eval_loss: Option<f64>,
    /// The step of the best evaluation.
    pub best_step: Option<usize>,
    /// The loss of that evaluation.
    pub best_eval_loss: Option<f64>,
    /// Whether the run ended before its last step, because the evaluation did not become better.
    pub stopped_early: bool,
    /// Seconds of training, without evaluation.
    pub seconds: f64,
    /// Tokens a second over the whole run.
    pub tokens_per_second: f64,
}

/// Sums over the steps since the last report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Window {
    loss_sum: f64,
    trained_tokens: usize,
    tokens: usize,
    seconds: f64,
}

/// What the loop knows between two steps, beside weights and optimizer. Names of transformers' `TrainerState` where it
/// has them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub global_step: usize,
    /// Passes over the data.
    pub epoch: f64,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Seconds of training, without evaluation.
    pub seconds: f64,
    /// Nats a token over the last logged steps.
    pub loss: Option<f64>,
    /// Nats a token at the last evaluation.
    pub eval_loss: Option<f64>,
    /// The smallest evaluation loss so far.
    pub best_metric: Option<f64>,
    /// The step it was measured after.
    pub best_global_step: Option<usize>,
    /// Evaluations since then that were not better by the threshold.
    pub early_stopping_patience_counter: usize,
    window: Window,
    /// What on-policy distillation knows beside it.
    #[serde(default, skip_serializing_if = "OpdProgress::is_empty")]
    pub(crate) opd: OpdProgress,
}

/// What a step came to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Sums {
    /// Σ −log p.
    pub(crate) loss: f64,
    /// Tokens that it is over.
    pub(crate) trained_tokens: usize,
    /// Tokens that went through the model.
    pub(crate) tokens: usize,
}

impl Progress {
    /// Takes up a step.
    pub(crate) fn add(&mut self, step: Sums, epoch: f64, seconds: f64) {
        self.global_step += 1;
        self.epoch = epoch;
        self.tokens += step.tokens;
        self.seconds += seconds;
        self.window.loss_sum += step.loss;
        self.window.trained_tokens += step.trained_tokens;
        self.window.tokens += step.tokens;
        self.window.seconds += seconds;
    }

    /// Tokens a second so far.
    pub(crate) fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }

    /// The report on the steps since the last one.
    pub(crate) fn report(&mut self, learning_rate: f64, grad_norm: f64) -> Metrics {
        let window = std::mem::take(&mut self.window);
        let loss = window.loss_sum / window.trained_tokens.max(1) as f64;
        self.loss = Some(loss);
        Metrics {
            step: self.global_step,
            epoch: self.epoch,
            loss,
            learning_rate,
            grad_norm,
            tokens_per_second: window.tokens as f64 / window.seconds.max(1e-9),
            tokens: self.tokens,
            seconds: self.seconds,
        }
    }

    /// What came of the run. `eval_loss` is that of the weights that it ends with.
    pub(crate) fn outcome(&self, eval_loss: Option<f64>, stopped_early: bool) -> Outcome {
        Outcome {
            steps: self.global_step,
            tokens: self.tokens,
            loss: self.loss.unwrap_or(f64::NAN),
            eval_loss,
            best_step: self.best_global_step,
            best_eval_loss: self.best_metric,
            stopped_early,
            seconds: self.seconds,
            tokens_per_second: self.tokens_per_second(),
        }
    }

    /// Whether so many evaluations in a row were not better; 0 does not count them.
    pub(crate) fn is_out_of(&self, patience: usize) -> bool {
        patience > 0 && self.early_stopping_patience_counter >= patience
    }

    /// Takes up an evaluation; true when it is the best so far. It resets the patience where it is better than the best
    /// by more than `threshold`, as transformers' `EarlyStoppingCallback` does.
    pub(crate) fn judge(&mut self, eval_loss: f64, threshold: f64) -> bool {
        let before = self.best_metric;
        self.eval_loss = Some(eval_loss);
        if before.is_none_or(|best| best - eval_loss > threshold) {
            self.early_stopping_patience_counter = 0;
        } else {
            self.early_stopping_patience_counter += 1;
        }
        let best = before.is_none_or(|best| eval_loss < best);
        if best {
            self.best_metric = Some(eval_loss);
            self.best_global_step = Some(self.global_step);
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_counts_evaluations_that_are_not_better_by_the_threshold() {
        let mut progress = Progress::default();
        let counts: Vec<(bool, usize)> = [2.0, 1.9, 1.85, 1.7, 1.8, 1.75]
            .into_iter()
            .map(|loss| {
                progress.global_step += 10;
                let best = progress.judge(loss, 0.08);
                (best, progress.early_stopping_patience_counter)
            })
            .collect();
        // 1.85 is the best so far, but not by 0.08; 1.7 is better than it by enough.
        assert_eq!(
            counts,
            [(true, 0), (true, 0), (true, 1), (true, 0), (false, 1), (false, 2)]
        );
        assert_eq!(
            (progress.best_metric, progress.best_global_step),
            (Some(1.7), Some(40))
        );
    }
}
