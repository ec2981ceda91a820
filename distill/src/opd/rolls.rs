//! Which rows the student answers itself, and its answers.

use std::collections::VecDeque;

use super::tasks::Text;
use super::{Cast, OpdError, OpdOptions, Task};
use crate::opd::deployed::Deployed;
use crate::random::Random;
use crate::rollout::{Rollout, Stop, Student, rollouts};
use crate::trainer::Step;

/// Who draws the student's answers.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// The student as it is trained.
    Student,
    /// The GGUF file that the student becomes, in llama.cpp.
    Gguf(Deployed<'a>),
}

/// Draws answers. Whether a row is answered, and with which random numbers, is a function of the seed, the step and the
/// row's place in it, and of nothing else.
#[derive(Debug, Clone)]
pub struct Rolls<'a> {
    pub(super) tasks: &'a [Task],
    pub(super) options: &'a OpdOptions,
    pub(super) stop: Stop<'a>,
}

impl Rolls<'_> {
    /// For every row of every forward pass of a step whether the student answers it itself.
    pub(super) fn coins(&self, step: usize, samples: &Step) -> Vec<Vec<bool>> {
        let seed = self.options.train.sampling.seed;
        let mut random = Random::new(seed, &format!("on policy or off, step {step}"));
        let mut coin = || random.uniform() < self.options.on_policy_fraction;
        let of_pass = |pass: &Vec<usize>| pass.iter().map(|_| coin()).collect();
        samples.passes.iter().map(of_pass).collect()
    }

    /// The answers to all rows of these steps that the student answers itself, in their order.
    pub(super) fn draw(
        &self,
        cast: &mut Cast<'_>,
        steps: &[(usize, Step)],
    ) -> Result<Vec<Rollout>, OpdError> {
        let seed = self.options.train.sampling.seed;
        let (mut prompts, mut streams) = (Vec::new(), Vec::new());
        for (number, step) in steps {
            let coins = self.coins(*number, step).concat();
            let rows = step.passes.iter().flatten().zip(coins).enumerate();
            for (place, (row, _)) in rows.filter(|(_, (_, on_policy))| *on_policy) {
                prompts.push(&*self.tasks[*row].prompt);
                for generation in 0..self.options.rollout.num_generations {
                    let purpose = format!("answer {generation} to row {place} of step {number}");
                    streams.push(Random::new(seed, &purpose));
                }
            }
        }
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let (options, stop) = (&self.options.rollout, &self.stop);
        match cast.source {
            Source::Student => {
                // What is drawn is what is trained: with the weights that the forward pass will have.
                if let Some(through) = &mut cast.through {
                    through.put_on()?;
                }
                let mut student = Student::new(cast.student)?;
                Ok(rollouts(&mut student, &prompts, options, stop, &mut streams)?)
            }
            Source::Gguf(deployed) => {
                if let Some(through) = &mut cast.through {
                    through.take_off()?;
                }
                Ok(deployed.rollouts(&prompts, options, stop, &mut streams)?)
            }
        }
    }

    /// The texts of a forward pass: rows as they are, or with the next of the answers that were drawn.
    pub(super) fn texts(
        &self,
        pass: &[usize],
        on_policy: &[bool],
        answers: &mut VecDeque<Rollout>,
    ) -> Vec<Text> {
        let mut texts = Vec::new();
        for (row, on_policy) in pass.iter().zip(on_policy) {
            let task = &self.tasks[*row];
            if *on_policy {
                let count = self.options.rollout.num_generations.min(answers.len());
                texts.extend(answers.drain(..count).map(|answer| Text::on_policy(task, answer)));
            } else if let Some(sample) = &task.sample {
                texts.push(Text::off_policy(task, sample));
            }
        }
        texts
    }
}
