//! What a run shows on standard error while it goes on: a bar on a terminal, lines elsewhere.

use indicatif::ProgressBar;

use super::Output;
use crate::trainer::Metrics;

const BAR: &str = "{msg} {wide_bar} {pos}/{len} {elapsed}, {eta} to go";

/// A run's progress.
#[derive(Debug)]
pub(super) struct Show {
    bar: ProgressBar,
    quiet: bool,
    steps: usize,
}

impl Show {
    /// Of a run of so many steps.
    pub(super) fn new(output: Output, steps: usize) -> Self {
        Self {
            bar: output.progress(steps as u64, BAR),
            quiet: output.quiet,
            steps,
        }
    }

    /// A step is done.
    pub(super) fn step(&self, step: usize, loss: f64, tokens_per_second: f64) {
        self.bar.set_position(step as u64);
        self.bar
            .set_message(format!("loss {loss:.3}, {tokens_per_second:.0} tokens/s"));
    }

    /// A line of figures, where there is no bar.
    pub(super) fn metrics(&self, metrics: &Metrics) {
        if self.bar.is_hidden() && !self.quiet {
            eprintln!(
                "step {}/{}  loss {:.4}  lr {:.2e}  grad {:.3}  {:.0} tokens/s  eta {:.0} s",
                metrics.step,
                self.steps,
                metrics.loss,
                metrics.learning_rate,
                metrics.grad_norm,
                metrics.tokens_per_second,
                metrics.seconds / metrics.step as f64 * (self.steps - metrics.step) as f64
            );
        }
    }

    /// A line beside the bar.
    pub(super) fn say(&self, text: &str) {
        if !self.quiet {
            self.bar.suspend(|| eprintln!("{text}"));
        }
    }

    /// A checkpoint is saved.
    pub(super) fn saved(&self, step: usize) {
        tracing::info!("step {step}: a checkpoint is saved");
    }

    /// The run ends early.
    pub(super) fn stopped(&self, step: usize) {
        self.say(&format!(
            "step {step}: the evaluation does not become better, so the run ends"
        ));
    }

    /// Takes the bar away.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
