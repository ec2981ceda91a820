//! Which samples a step sees: shuffled anew for every pass over the data, in forward passes of so many samples or of
//! so many tokens.
//!
//! The order is a function of the seed and the step, and of nothing else: a run that goes on from a checkpoint needs no
//! state of a generator, it skips to its step.

use crate::random::Random;

/// How samples come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    /// Samples in one forward pass, at least 1.
    pub batch_size: usize,
    /// The most tokens of one forward pass: as many samples as fit, whatever `batch_size` says (packing). A longer
    /// sample is a pass of its own.
    pub packed_tokens: Option<usize>,
    /// Forward passes in one step, at least 1.
    pub gradient_accumulation_steps: usize,
    /// Decides the order.
    pub seed: u64,
}

/// The samples of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The samples of each forward pass, by index.
    pub passes: Vec<Vec<usize>>,
    /// Passes over the data when the step is done.
    pub epoch: f64,
    /// Whether a pass over the data ends with it.
    pub ends_epoch: bool,
}

/// Deals out the steps of a run.
#[derive(Debug)]
pub struct Sampler {
    /// Tokens of every sample.
    lengths: Vec<usize>,
    sampling: Sampling,
    epoch: u64,
    /// The forward passes of the epoch, and how many of them are done.
    passes: Vec<Vec<usize>>,
    done: usize,
}

impl Sampler {
    /// At the first step, over samples of these lengths; there must be at least one.
    pub fn new(lengths: Vec<usize>, sampling: Sampling) -> Self {
        let passes = passes(&lengths, sampling, 0);
        Self {
            lengths,
            sampling,
            epoch: 0,
            passes,
            done: 0,
        }
    }

    /// The steps of so many passes over the data, at least 1. As in transformers, a part of a step counts whole.
    pub fn steps(&self, epochs: f64) -> usize {
        let whole = epochs.floor() as u64;
        // Without packing all epochs are alike.
        let full = match self.sampling.packed_tokens {
            None => self.steps_of(0) * whole as usize,
            Some(_) => (0..whole).map(|epoch| self.steps_of(epoch)).sum(),
        };
        let rest = (epochs.fract() * self.steps_of(whole) as f64).ceil() as usize;
        (full + rest).max(1)
    }

    fn steps_of(&self, epoch: u64) -> usize {
        let passes = match self.sampling.packed_tokens {
            None => self.lengths.len().div_ceil(self.sampling.batch_size),
            Some(_) => passes(&self.lengths, self.sampling, epoch).len(),
        };
        passes.div_ceil(self.sampling.gradient_accumulation_steps)
    }

    /// Leaves out so many steps.
    pub fn skip(&mut self, mut steps: usize) {
        let per_step = self.sampling.gradient_accumulation_steps;
        loop {
            let left = (self.passes.len() - self.done).div_ceil(per_step);
            if steps < left {
                self.done += steps * per_step;
                return;
            }
            steps -= left;
            self.begin(self.epoch + 1);
        }
    }

    /// The next step. The last one of a pass over the data may be smaller.
    pub fn take(&mut self) -> Step {
        if self.done == self.passes.len() {
            self.begin(self.epoch + 1);
        }
        let end = self
            .passes
            .len()
            .min(self.done + self.sampling.gradient_accumulation_steps);
        let step = self.passes[self.done..end].to_vec();
        self.done = end;
        let total = self.passes.len();
        Step {
            passes: step,
            epoch: self.epoch as f64 + end as f64 / total as f64,
            ends_epoch: end == total,
        }
    }

    fn begin(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.passes = passes(&self.lengths, self.sampling, epoch);
        self.done = 0;
    }
}

/// The forward passes of one pass over the data.
fn passes(lengths: &[usize], sampling: Sampling, epoch: u64) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    Random::new(sampling.seed, &format!("order of the samples, epoch {epoch}")).shuffle(&mut order);
    let Some(budget) = sampling.packed_tokens else {
        return order.chunks(sampling.batch_size).map(<[usize]>::to_vec).collect();
    };
    // The next sample joins the pass or opens another one: no sample waits for a gap of its size, so that the order
    // stays a fair shuffle.
    let mut passes: Vec<Vec<usize>> = Vec::new();
    let mut tokens = 0;
    for sample in order {
        match passes.last_mut() {
            Some(pass) if tokens + lengths[sample] <= budget => pass.push(sample),
            _ => {
                tokens = 0;
                passes.push(vec![sample]);
            }
        }
        tokens += lengths[sample];
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLING: Sampling = Sampling {
        batch_size: 3,
        packed_tokens: None,
        gradient_accumulation_steps: 2,
        seed: 7,
    };
    const PACKING: Sampling = Sampling {
        packed_tokens: Some(20),
        ..SAMPLING
    };

    fn lengths() -> Vec<usize> {
        (0..23).map(|i| 2 + i * 5 % 11).collect()
    }

    #[test]
    fn every_epoch_has_every_sample_once_and_the_last_step_may_be_smaller() {
        for sampling in [SAMPLING, PACKING] {
            let mut sampler = Sampler::new(lengths(), sampling);
            let mut orders = Vec::new();
            for epoch in 0..3 {
                let (mut seen, mut steps) = (Vec::new(), 0);
                loop {
                    let step = sampler.take();
                    steps += 1;
                    assert!(step.passes.len() <= 2 && step.passes.iter().all(|pass| !pass.is_empty()));
                    seen.extend(step.passes.into_iter().flatten());
                    if step.ends_epoch {
                        assert_eq!(step.epoch, f64::from(epoch) + 1.0);
                        break;
                    }
                }
                assert_eq!(steps, sampler.steps_of(epoch as u64));
                orders.push(seen.clone());
                seen.sort_unstable();
                assert_eq!(seen, (0..23).collect::<Vec<_>>());
            }
            assert_ne!(orders[0], orders[1], "an epoch is shuffled anew");
        }
    }

    #[test]
    fn packed_passes_keep_to_their_tokens_and_are_full() {
        let lengths = lengths();
        let packed = passes(&lengths, PACKING, 0);
        let tokens = |pass: &Vec<usize>| pass.iter().map(|i| lengths[*i]).sum::<usize>();
        assert!(packed.iter().all(|pass| tokens(pass) <= 20));
        for pair in packed.windows(2) {
            assert!(
                tokens(&pair[0]) + lengths[pair[1][0]] > 20,
                "there was room for the next"
            );
        }
        // A sample that is longer than all that fits is alone.
        assert_eq!(passes(&[50, 3], PACKING, 0).len(), 2);
    }

    #[test]
    fn skipping_is_taking() {
        for sampling in [SAMPLING, PACKING] {
            let mut taken = Sampler::new(lengths(), sampling);
            for step in 0..20 {
                let mut skipped = Sampler::new(lengths(), sampling);
                skipped.skip(step);
                assert_eq!(skipped.take(), taken.take(), "step {step}");
            }
        }
    }

    #[test]
    fn steps_of_epochs() {
        let sampler = Sampler::new(lengths(), SAMPLING);
        assert_eq!(
            [0.1, 1.0, 1.5, 2.0].map(|epochs| sampler.steps(epochs)),
            [1, 4, 6, 8]
        );
        let packed = Sampler::new(lengths(), PACKING);
        assert_eq!(packed.steps(2.0), packed.steps_of(0) + packed.steps_of(1));
    }
}
