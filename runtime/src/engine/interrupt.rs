//! Interrupt: a cancel is heard while a step computes.
//!
//! A step of prefill takes as long as `prefill_ms` says, and more on a board whose smallest step takes longer. The thread
//! that reads frames tells here what is cancelled; when the step computes that request's prompt, ggml ends it between two
//! operations of the graph, and the other requests' part of it is computed again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Shared between the thread that computes and the one that reads.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    flag: Arc<AtomicBool>,
    /// Whose prompts the step under way computes.
    jobs: Arc<Mutex<Vec<u64>>>,
}

impl Interrupt {
    /// True ends the step.
    pub fn flag(&self) -> &Arc<AtomicBool> {
        &self.flag
    }

    /// A step begins that computes the prompts of these jobs.
    pub fn begin(&self, jobs: impl Iterator<Item = u64>) {
        self.jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(jobs);
    }

    /// The step is over.
    pub fn end(&self) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.clear();
        self.flag.store(false, Ordering::Relaxed);
    }

    /// Ends the step if it computes the prompt of this job.
    pub fn cancel(&self, job: u64) {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.contains(&job) {
            self.flag.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_job_of_the_step_ends_it() {
        let interrupt = Interrupt::default();
        let reader = interrupt.clone();
        let is_set = || interrupt.flag().load(Ordering::Relaxed);
        reader.cancel(1);
        interrupt.begin([1, 2].into_iter());
        assert!(!is_set());
        reader.cancel(3);
        assert!(!is_set());
        reader.cancel(2);
        assert!(is_set());
        interrupt.end();
        reader.cancel(2);
        assert!(!is_set());
    }
}
