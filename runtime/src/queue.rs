//! The queue: requests that were accepted and wait for the engine.
//!
//! In: keys with a client, a priority and a deadline. Out: the next one to run. Higher priority goes first; within one,
//! the client that has had the least of the engine (in tokens) is next, with the request that it sent first: a client
//! that sends a thousand requests does not keep the others waiting. Those whose deadline has passed come out apart,
//! before any work is done for them. The clock is an argument.
//!
//! The order is start-time fair queueing (Goyal, Vin and Cheng, 1996): every client has a virtual time that its own work
//! moves on, and one who comes back after a rest starts at the time of who is being served, without credit for it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Instant;

use crate::journal::Key;

/// One that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub key: Key,
    /// Whose.
    pub client: String,
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

/// What a request is taken to cost before any was finished, in tokens.
const FIRST_COST: f64 = 64.0;

type Level = HashMap<String, VecDeque<Waiting>>;

/// Fair, ordered, cancellable.
#[derive(Debug)]
pub struct Queue {
    levels: BTreeMap<Reverse<i32>, Level>,
    places: HashMap<Key, (i32, String)>,
    /// Virtual time of each client that waits or has run ahead, in tokens.
    times: HashMap<String, f64>,
    /// Virtual time of who was served last.
    now: f64,
    /// Mean tokens of a request.
    cost: f64,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            levels: BTreeMap::new(),
            places: HashMap::new(),
            times: HashMap::new(),
            now: 0.0,
            cost: FIRST_COST,
        }
    }
}

impl Queue {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// How many of a client wait.
    pub fn of_client(&self, client: &str) -> usize {
        let levels = self.levels.values();
        levels
            .filter_map(|level| level.get(client))
            .map(VecDeque::len)
            .sum()
    }

    /// Adds one, behind those of its client.
    pub fn push(&mut self, waiting: Waiting, priority: i32) {
        self.cancel(&waiting.key);
        let time = self.times.entry(waiting.client.clone()).or_insert(self.now);
        *time = time.max(self.now);
        self.places
            .insert(waiting.key.clone(), (priority, waiting.client.clone()));
        let level = self.levels.entry(Reverse(priority)).or_default();
        level
            .entry(waiting.client.clone())
            .or_default()
            .push_back(waiting);
    }

    /// The next one.
    pub fn pop(&mut self, now: Instant) -> Option<Next> {
        let level = self.levels.values().next()?;
        let client = level
            .iter()
            .min_by(|(a, of_a), (b, of_b)| {
                let time = |client: &String| self.times.get(client).copied().unwrap_or(self.now);
                let since = |waiting: &VecDeque<Waiting>| waiting.front().map(|first| first.since);
                time(a)
                    .total_cmp(&time(b))
                    .then_with(|| since(of_a).cmp(&since(of_b)))
                    .then_with(|| a.cmp(b))
            })?
            .0
            .clone();
        let key = level.get(&client)?.front()?.key.clone();
        let waiting = self.cancel(&key)?;
        if waiting.deadline.is_some_and(|deadline| deadline <= now) {
            return Some(Next::Expired(waiting));
        }
        let time = self.times.entry(client).or_insert(self.now);
        self.now = self.now.max(*time);
        *time += self.cost;
        Some(Next::Run(waiting))
    }

    /// A request of `client` is done and took so many tokens.
    pub fn charge(&mut self, client: &str, tokens: u32) {
        let tokens = f64::from(tokens);
        if let Some(time) = self.times.get_mut(client) {
            *time += tokens - self.cost;
        }
        self.cost += (tokens - self.cost) / 16.0;
        // Who neither waits nor has run ahead starts anew.
        let (now, levels) = (self.now, &self.levels);
        self.times
            .retain(|client, time| *time > now || levels.values().any(|level| level.contains_key(client)));
    }

    /// Takes out every one that is too late.
    pub fn expired(&mut self, now: Instant) -> Vec<Waiting> {
        let late: Vec<Key> = self
            .levels
            .values()
            .flat_map(HashMap::values)
            .flatten()
            .filter(|waiting| waiting.deadline.is_some_and(|deadline| deadline <= now))
            .map(|waiting| waiting.key.clone())
            .collect();
        late.iter().filter_map(|key| self.cancel(key)).collect()
    }

    /// Takes one out.
    pub fn cancel(&mut self, key: &Key) -> Option<Waiting> {
        let (priority, client) = self.places.remove(key)?;
        let level = self.levels.get_mut(&Reverse(priority))?;
        let line = level.get_mut(&client)?;
        let at = line.iter().position(|waiting| waiting.key == *key)?;
        let waiting = line.remove(at);
        if line.is_empty() {
            level.remove(&client);
        }
        if level.is_empty() {
            self.levels.remove(&Reverse(priority));
        }
        waiting
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn waiting(client: &str, id: &str, since: Instant, deadline: Option<Instant>) -> Waiting {
        Waiting {
            key: (client.to_owned(), id.to_owned()),
            client: client.to_owned(),
            since,
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
        let mut queue = Queue::default();
        for (id, priority) in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)] {
            queue.push(waiting("t", id, now, None), priority);
        }
        assert_eq!(
            (queue.len(), queue.of_client("t"), queue.of_client("u")),
            (5, 5, 0)
        );
        assert_eq!(ids(&mut queue, now), ["b", "d", "a", "c", "e"]);
    }

    #[test]
    fn clients_take_turns() {
        let now = Instant::now();
        let mut queue = Queue::default();
        for number in 0..100 {
            queue.push(waiting("busy", &format!("busy{number}"), now, None), 0);
        }
        let later = now + Duration::from_secs(1);
        for id in ["x0", "x1"] {
            queue.push(waiting("x", id, later, None), 0);
        }
        queue.push(waiting("y", "y0", later, None), 0);
        assert_eq!(
            ids(&mut queue, later)[..6],
            ["busy0", "x0", "y0", "busy1", "x1", "busy2"]
        );
    }

    #[test]
    fn long_answers_count_as_more() {
        let now = Instant::now();
        let mut queue = Queue::default();
        for number in 0..40 {
            queue.push(waiting("long", &format!("l{number}"), now, None), 0);
            queue.push(waiting("short", &format!("s{number}"), now, None), 0);
        }
        let mut served = HashMap::from([("long", 0), ("short", 0)]);
        for _ in 0..40 {
            let Some(Next::Run(next)) = queue.pop(now) else {
                panic!()
            };
            let (name, tokens) = if next.client == "long" {
                ("long", 300)
            } else {
                ("short", 100)
            };
            *served.get_mut(name).unwrap() += 1;
            queue.charge(&next.client, tokens);
        }
        assert!((9..=11).contains(&served["long"]), "{served:?}");
        // A rest gives no credit.
        queue.push(waiting("new", "n0", now, None), 0);
        queue.push(waiting("new", "n1", now, None), 0);
        let first: Vec<_> = ids(&mut queue, now).into_iter().take(4).collect();
        assert!(first.iter().any(|id| !id.starts_with('n')), "{first:?}");
    }

    #[test]
    fn deadlines_and_cancel() {
        let now = Instant::now();
        let soon = now + Duration::from_secs(1);
        let mut queue = Queue::default();
        queue.push(waiting("t", "a", now, Some(now)), 0);
        queue.push(waiting("t", "b", now, Some(soon)), 0);
        queue.push(waiting("t", "c", now, None), 0);
        queue.push(waiting("t", "d", now, Some(soon)), 0);
        let key = ("t".to_owned(), "d".to_owned());
        assert_eq!(queue.cancel(&key).map(|w| w.key.1), Some("d".to_owned()));
        assert_eq!(queue.cancel(&key), None);
        assert_eq!(queue.expired(soon).len(), 2);
        queue.push(waiting("t", "e", now, Some(now)), 0);
        assert_eq!(ids(&mut queue, now), ["c", "late e"]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_doubled(requests in proptest::collection::vec((-3..3_i32, 0..4_u8), 0..40)) {
            let now = Instant::now();
            let mut queue = Queue::default();
            for (at, &(priority, client)) in requests.iter().enumerate() {
                let since = now + Duration::from_millis(at as u64);
                queue.push(waiting(&client.to_string(), &at.to_string(), since, None), priority);
            }
            let order: Vec<usize> = ids(&mut queue, now).iter().map(|id| id.parse().unwrap()).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..requests.len()).collect::<Vec<_>>());
            for pair in order.windows(2) {
                let (a, b) = (requests[pair[0]], requests[pair[1]]);
                prop_assert!(a.0 >= b.0, "priority");
                // Within a client: in order of arrival.
                prop_assert!(a != b || pair[0] < pair[1]);
            }
            prop_assert!(queue.is_empty() && queue.levels.is_empty());
        }
    }
}
