//! The queue: requests that were accepted and wait for the engine.
//!
//! In: keys with a priority and a deadline. Out: the next one to run, highest priority first and first come
//! first served within it; those whose deadline has passed come out apart, before any work is done for them.
//! The clock is an argument.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use crate::journal::Key;

/// One that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub key: Key,
    /// When it came.
    pub since: Instant,
    /// When it must have begun.
    pub deadline: Option<Instant>,
}

/// What comes out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run it.
    Run(Waiting),
    /// Too late.
    Expired(Waiting),
}

/// Bounded, ordered, cancellable.
#[derive(Debug)]
pub struct Queue {
    most: usize,
    arrivals: u64,
    waiting: BTreeMap<(Reverse<i32>, u64), Waiting>,
    places: HashMap<Key, (Reverse<i32>, u64)>,
}

impl Queue {
    /// A queue for `most` requests.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            arrivals: 0,
            waiting: BTreeMap::new(),
            places: HashMap::new(),
        }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether no more should be accepted.
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= self.most
    }

    /// Adds one. What was accepted is always taken, also when the queue is full (at a replay).
    pub fn push(&mut self, waiting: Waiting, priority: i32) {
        let place = (Reverse(priority), self.arrivals);
        self.arrivals += 1;
        if let Some(old) = self.places.insert(waiting.key.clone(), place) {
            self.waiting.remove(&old);
        }
        self.waiting.insert(place, waiting);
    }

    /// The next one.
    pub fn pop(&mut self, now: Instant) -> Option<Next> {
        let (_, waiting) = self.waiting.pop_first()?;
        self.places.remove(&waiting.key);
        Some(match waiting.deadline {
            Some(deadline) if deadline <= now => Next::Expired(waiting),
            _ => Next::Run(waiting),
        })
    }

    /// Takes out every one that is too late.
    pub fn expired(&mut self, now: Instant) -> Vec<Waiting> {
        let late: Vec<Key> = self
            .waiting
            .values()
            .filter(|waiting| waiting.deadline.is_some_and(|deadline| deadline <= now))
            .map(|waiting| waiting.key.clone())
            .collect();
        late.iter().filter_map(|key| self.cancel(key)).collect()
    }

    /// Takes one out.
    pub fn cancel(&mut self, key: &Key) -> Option<Waiting> {
        let place = self.places.remove(key)?;
        self.waiting.remove(&place)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn waiting(id: &str, now: Instant, deadline: Option<Instant>) -> Waiting {
        Waiting {
            key: ("t".to_owned(), id.to_owned()),
            since: now,
            deadline,
        }
    }

    fn ids(queue: &mut Queue, now: Instant) -> Vec<String> {
        std::iter::from_fn(|| queue.pop(now))
            .map(|next| match next {
                Next::Run(waiting) => waiting.key.1,
                Next::Expired(waiting) => format!("late {}", waiting.key.1),
            })
            .collect()
    }

    #[test]
    fn priority_then_arrival() {
        let now = Instant::now();
        let mut queue = Queue::new(4);
        for (id, priority) in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)] {
            assert_eq!(queue.is_full(), id == "e");
            queue.push(waiting(id, now, None), priority);
        }
        assert_eq!(ids(&mut queue, now), ["b", "d", "a", "c", "e"]);
    }

    #[test]
    fn deadlines_and_cancel() {
        let now = Instant::now();
        let soon = now + Duration::from_secs(1);
        let mut queue = Queue::new(9);
        queue.push(waiting("a", now, Some(now)), 0);
        queue.push(waiting("b", now, Some(soon)), 0);
        queue.push(waiting("c", now, None), 0);
        queue.push(waiting("d", now, Some(soon)), 0);
        assert_eq!(
            queue.cancel(&("t".to_owned(), "d".to_owned())).map(|w| w.key.1),
            Some("d".to_owned())
        );
        assert_eq!(queue.cancel(&("t".to_owned(), "d".to_owned())), None);
        assert_eq!(queue.expired(soon).len(), 2);
        queue.push(waiting("e", now, Some(now)), 0);
        assert_eq!(ids(&mut queue, now), ["c", "late e"]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_doubled(priorities in proptest::collection::vec(-3..3_i32, 0..40)) {
            let now = Instant::now();
            let mut queue = Queue::new(10);
            for (at, &priority) in priorities.iter().enumerate() {
                queue.push(waiting(&at.to_string(), now, None), priority);
            }
            let mut expected: Vec<usize> = (0..priorities.len()).collect();
            expected.sort_by_key(|&at| (Reverse(priorities[at]), at));
            let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
            prop_assert_eq!(ids(&mut queue, now), expected);
        }
    }
}
