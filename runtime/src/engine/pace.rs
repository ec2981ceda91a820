//! The pace of prefill: how many tokens of prompts go into one step.
//!
//! Nothing but a cancel ends a step, so its length decides how long another request waits for its next token. But small
//! steps compute fewer tokens a second: every step reads all weights once. In: how long steps took. Out: tokens for a step
//! of about the time that was asked for, on a board that prefills ten tokens a second as on one that prefills a thousand.

use std::time::Duration;

/// Before anything was measured.
const FIRST: usize = 64;
/// The least that is worth a step.
const LEAST: usize = 32;
/// How much longer a step may be when nobody waits for its end.
const ALONE: f64 = 4.0;

/// Measures and decides.
#[derive(Debug)]
pub struct Pace {
    target: Duration,
    most: usize,
    /// Tokens a second of the last steps.
    rate: Option<f64>,
}

impl Pace {
    /// A pace for steps of `target`, of at most `most` tokens.
    pub fn new(target: Duration, most: usize) -> Self {
        Self {
            target,
            most: most.max(LEAST),
            rate: None,
        }
    }

    /// Tokens of the next step, of `pending` that there are to compute; `alone` when no other request waits for its end.
    /// What is left for the step after it is not a small rest.
    pub fn tokens(&self, pending: usize, alone: bool) -> usize {
        let factor = if alone { ALONE } else { 1.0 };
        let wanted = match self.rate {
            Some(rate) => (rate * self.target.as_secs_f64() * factor) as usize,
            None => FIRST,
        };
        let most = wanted.clamp(LEAST, self.most);
        // As many steps as it takes, of equal size; a quarter more is better than one step more.
        let steps = pending.div_ceil((most + most / 4).min(self.most)).max(1);
        pending.div_ceil(steps)
    }

    /// A step with this many tokens of prompts took so long. Small steps say nothing about larger ones.
    pub fn took(&mut self, tokens: usize, time: Duration) {
        if tokens < LEAST || time.is_zero() {
            return;
        }
        let now = tokens as f64 / time.as_secs_f64();
        self.rate = Some(self.rate.map_or(now, |rate| 0.5 * rate + 0.5 * now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_take_the_time_that_was_asked_for() {
        let mut pace = Pace::new(Duration::from_millis(500), 512);
        assert_eq!(pace.tokens(1000, false), 77);
        for _ in 0..20 {
            pace.took(64, Duration::from_millis(640));
        }
        // 100 tokens a second.
        assert_eq!((pace.tokens(5000, false), pace.tokens(5000, true)), (62, 250));
        assert_eq!(pace.tokens(60, false), 60);
        pace.took(3, Duration::from_millis(1));
        assert_eq!(pace.tokens(60, false), 60, "a decode step is no prefill");
        for _ in 0..20 {
            pace.took(512, Duration::from_millis(10));
        }
        assert_eq!((pace.tokens(512, false), pace.tokens(600, false)), (512, 300));
        for _ in 0..20 {
            pace.took(32, Duration::from_secs(60));
        }
        assert_eq!(pace.tokens(4000, false), 40);
        assert_eq!(pace.tokens(1, true), 1);
    }
}
