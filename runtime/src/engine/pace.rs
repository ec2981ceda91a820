//! The pace of prefill: how many tokens of prompts go into one step.
//!
//! A step cannot be interrupted, so its length decides how soon a cancel is heard and how long another request waits
//! for its next token. In: how long steps took. Out: tokens for a step of about the time that was asked for, on a board
//! that prefills ten tokens a second as on one that prefills a thousand.

use std::time::Duration;

/// Before anything was measured, and the least that is worth a step.
const FIRST: usize = 64;
const LEAST: usize = 16;

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

    /// Tokens of the next step.
    pub fn tokens(&self) -> usize {
        let wanted = self
            .rate
            .map_or(FIRST, |rate| (rate * self.target.as_secs_f64()) as usize);
        wanted.clamp(LEAST, self.most)
    }

    /// A step with this many tokens took so long. Small steps say nothing about prefill.
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
        let mut pace = Pace::new(Duration::from_millis(250), 512);
        assert_eq!(pace.tokens(), 64);
        for _ in 0..20 {
            pace.took(64, Duration::from_millis(640));
        }
        assert_eq!(pace.tokens(), 25);
        pace.took(3, Duration::from_millis(1));
        assert_eq!(pace.tokens(), 25, "a decode step is no prefill");
        for _ in 0..20 {
            pace.took(512, Duration::from_millis(10));
        }
        assert_eq!(pace.tokens(), 512);
        for _ in 0..20 {
            pace.took(16, Duration::from_secs(60));
        }
        assert_eq!(pace.tokens(), 16);
    }
}
