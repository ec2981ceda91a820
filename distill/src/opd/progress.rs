//! What a distillation tells while it runs, and what it must know to go on.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::Divergence;
use super::tasks::Text;
use crate::loss::Measures;
use crate::rollout::Rollout;
use crate::trainer::Metrics;

/// What the loop tells while it runs.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A step is done: its number, its loss, and tokens a second so far.
    Step(usize, f64, f64),
    /// `logging_steps` steps are done.
    Metrics(OpdMetrics),
    /// Student and teacher were compared on held-out texts after a step.
    Evaluation(usize, Divergence),
    /// The step after which a checkpoint was saved.
    Saved(usize),
    /// The evaluation has not become better for so many times: the run ends early.
    Stopped(usize),
}

/// What a report says; averages are over the steps since the last one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OpdMetrics {
    /// The loss is the objective's, in nats a token.
    #[serde(flatten)]
    pub metrics: Metrics,
    /// −log p of the texts by the student, nats a token.
    pub cross_entropy: Option<f64>,
    /// log p of the texts by the student less that by the teacher, nats a token: on the student's own answers an estimate
    /// of KL(student‖teacher).
    pub sampled_kl: Option<f64>,
    /// Tokens of an answer that the student has drawn.
    pub answer_tokens: Option<f64>,
    /// The share of those answers that came to an end token.
    pub ended: Option<f64>,
    /// The share of trained tokens that the student has drawn.
    pub on_policy: f64,
    /// Seconds of drawing answers.
    pub rollout_seconds: f64,
    /// Seconds of waiting for the teacher. One that computes logits when they are needed takes its time elsewhere.
    pub teacher_seconds: f64,
}

/// What a distillation knows between two steps, beside what any training knows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct OpdProgress {
    /// Answers that the next steps will be trained on.
    pub(super) rollouts: VecDeque<Rollout>,
    pub(super) window: Window,
}

impl OpdProgress {
    /// Whether there is nothing to know.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Sums over the steps since the last report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Window {
    trained_tokens: usize,
    answers: usize,
    answer_tokens: usize,
    ended: usize,
    cross_entropy: Option<f64>,
    sampled_kl: Option<f64>,
    pub(super) rollout_seconds: f64,
    pub(super) teacher_seconds: f64,
}

impl Window {
    /// Takes up a forward pass.
    pub(super) fn add(&mut self, texts: &[Text], eos: &[u32], measures: Option<&Measures>) {
        for text in texts {
            self.trained_tokens += text.targets();
            if text.logprobs.is_some() {
                self.answers += 1;
                self.answer_tokens += text.targets();
                self.ended += usize::from(text.ids.last().is_some_and(|last| eos.contains(last)));
            }
        }
        let add = |sum: &mut Option<f64>, more: Option<f64>| {
            if let Some(more) = more {
                *sum = Some(sum.unwrap_or(0.0) + more);
            }
        };
        add(&mut self.cross_entropy, measures.and_then(|of| of.cross_entropy));
        add(&mut self.sampled_kl, measures.and_then(|of| of.sampled_kl));
    }

    /// The report, with what any training reports.
    pub(super) fn take(&mut self, metrics: Metrics) -> OpdMetrics {
        let window = std::mem::take(self);
        let a_token = |sum: f64| sum / window.trained_tokens.max(1) as f64;
        let an_answer = |sum: usize| (window.answers > 0).then(|| sum as f64 / window.answers as f64);
        OpdMetrics {
            metrics,
            cross_entropy: window.cross_entropy.map(a_token),
            sampled_kl: window.sampled_kl.map(a_token),
            answer_tokens: an_answer(window.answer_tokens),
            ended: an_answer(window.ended),
            on_policy: a_token(window.answer_tokens as f64),
            rollout_seconds: window.rollout_seconds,
            teacher_seconds: window.teacher_seconds,
        }
    }
}
