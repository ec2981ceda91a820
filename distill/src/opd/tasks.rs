//! What is distilled on: prompts, some of them with answers, and the texts that a step makes of them.

use super::OpdOptions;
use crate::batch::IGNORED;
use crate::data::Sample;
use crate::rollout::Rollout;
use crate::teacher::Asked;

/// A row of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The line of the row, from 1.
    pub line: usize,
    /// The tokens that the student answers; none for a row that is one text.
    pub prompt: Vec<u32>,
    /// The row with the answer that it has.
    pub sample: Option<Sample>,
    /// Which of several teachers is asked.
    pub route: Option<String>,
}

impl Task {
    /// The most tokens that the row can bring into a forward pass.
    pub fn longest(&self, options: &OpdOptions) -> usize {
        let on_policy = match options.on_policy_fraction > 0.0 {
            true => options.rollout.num_generations * (self.prompt.len() + options.max_new_tokens),
            false => 0,
        };
        let off_policy = match options.on_policy_fraction < 1.0 {
            true => self.sample.as_ref().map_or(0, |sample| sample.ids.len()),
            false => 0,
        };
        on_policy.max(off_policy)
    }

    /// All that it has as (ids, labels): what a run must not be gone on with when it changes.
    pub(super) fn sequences(&self) -> impl Iterator<Item = (&[u32], &[i64])> {
        let sample = self.sample.as_ref();
        let sample = sample.map_or((&[][..], &[][..]), |sample| (&*sample.ids, &*sample.labels));
        [(&*self.prompt, &[][..]), sample].into_iter()
    }
}

/// A text that is trained on.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Text {
    line: usize,
    pub(super) ids: Vec<u32>,
    pub(super) labels: Vec<i64>,
    /// Of the tokens that the student has drawn: those with a label, and all of them.
    pub(super) logprobs: Option<Vec<f32>>,
    route: Option<String>,
}

impl Text {
    /// A prompt and what the student has answered.
    pub(super) fn on_policy(task: &Task, answer: Rollout) -> Self {
        let prompt = task.prompt.iter().map(|_| IGNORED);
        let labels = prompt.chain(answer.ids.iter().map(|id| i64::from(*id))).collect();
        Self {
            line: task.line,
            ids: [&*task.prompt, &*answer.ids].concat(),
            labels,
            logprobs: Some(answer.logprobs),
            route: task.route.clone(),
        }
    }

    /// The row as it is.
    pub(super) fn off_policy(task: &Task, sample: &Sample) -> Self {
        Self {
            line: task.line,
            ids: sample.ids.clone(),
            labels: sample.labels.clone(),
            logprobs: None,
            route: task.route.clone(),
        }
    }

    pub(super) fn asked(&self) -> Asked<'_> {
        Asked {
            ids: &self.ids,
            labels: &self.labels,
            route: self.route.as_deref(),
        }
    }

    /// How many tokens are trained on.
    pub(super) fn targets(&self) -> usize {
        self.labels.iter().skip(1).filter(|label| **label >= 0).count()
    }

    pub(super) fn sample(self) -> Sample {
        Sample {
            line: self.line,
            ids: self.ids,
            labels: self.labels,
        }
    }
}

/// log p of all labels when they were drawn, where the student has drawn all of them.
pub(super) fn logprobs(texts: &[Text]) -> Option<Vec<f32>> {
    let parts: Option<Vec<&[f32]>> = texts.iter().map(|text| text.logprobs.as_deref()).collect();
    parts.map(|parts| parts.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Batch;

    #[test]
    fn every_drawn_token_is_trained_on_and_the_prompt_is_not() {
        let task = Task {
            line: 1,
            prompt: vec![5, 6],
            sample: None,
            route: None,
        };
        let answer = Rollout {
            ids: vec![7, 2],
            logprobs: vec![-0.5, -0.25],
        };
        let text = Text::on_policy(&task, answer);
        let batch = Batch::new([(&*text.ids, &*text.labels)]);
        assert_eq!(batch.targets(), [(1, 7), (2, 2)]);
        assert_eq!(text.targets(), 2);
        assert_eq!(
            logprobs(&[text.clone(), text.clone()]),
            Some(vec![-0.5, -0.25, -0.5, -0.25])
        );
        let sample = text.clone().sample();
        assert_eq!(logprobs(&[text, Text::off_policy(&task, &sample)]), None);
    }
}
