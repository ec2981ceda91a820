//! Prefixes: beginnings of prompts whose KV is kept, so that the next prompt which begins so need not compute them.
//!
//! When a request is done, its sequence stays in the context as an entry, as long as there is room: the longest common
//! beginning of a new prompt with any entry, or with a request that is still under way, is shared (not copied: the cells
//! get one more owner). A system prompt is so computed once for all who send it, a conversation goes on where it was.
//! [`disk`] keeps those that are asked for again and again over a restart.

use llama_cpp_2::token::LlamaToken;

use super::pool::{Cells, Pool};

pub mod disk;

/// A beginning in the context.
#[derive(Debug)]
pub struct Entry {
    /// Its sequence.
    pub sequence: i32,
    /// The adapter that computed it.
    pub adapter: Option<String>,
    /// Its tokens.
    pub tokens: Vec<LlamaToken>,
    /// One for each token.
    pub cells: Cells,
    /// When it was last of use.
    used: u64,
    /// Whether a prompt has begun with half of it or more, or of one that it replaced.
    proven: bool,
}

/// Entries that nobody has used yet, at a time: attention looks at the mask of every cell that is in use, so each of
/// them makes every token a little slower.
const MOST_UNPROVEN: usize = 4;

/// All entries.
#[derive(Debug)]
pub struct Prefixes {
    entries: Vec<Entry>,
    sequences: Vec<i32>,
    clock: u64,
}

impl Prefixes {
    /// No entries yet; `sequences` are the ones that they may use.
    pub fn new(sequences: impl Iterator<Item = i32>) -> Self {
        Self {
            entries: Vec::new(),
            sequences: sequences.collect(),
            clock: 0,
        }
    }

    /// Every entry.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// A prompt begins with the first `count` tokens of the entry with this sequence.
    pub fn touch(&mut self, sequence: i32, count: usize) {
        self.clock += 1;
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.sequence == sequence) {
            entry.used = self.clock;
            // A few words of a template that all prompts share say nothing about the rest.
            entry.proven |= 2 * count >= entry.tokens.len();
        }
    }

    /// Whether an entry begins with all of `tokens`.
    pub fn covers(&self, adapter: Option<&str>, tokens: &[LlamaToken]) -> bool {
        self.entries
            .iter()
            .any(|entry| entry.adapter.as_deref() == adapter && entry.tokens.starts_with(tokens))
    }

    /// A free sequence for a new entry; `None` when the oldest entry must go first, or entries are not kept.
    pub fn sequence(&mut self) -> Option<i32> {
        self.sequences.pop()
    }

    /// Adds an entry whose sequence is filled.
    pub fn add(
        &mut self,
        sequence: i32,
        adapter: Option<String>,
        tokens: Vec<LlamaToken>,
        cells: Cells,
        proven: bool,
    ) {
        self.clock += 1;
        self.entries.push(Entry {
            sequence,
            adapter,
            tokens,
            cells,
            used: self.clock,
            proven,
        });
    }

    /// Takes out entries that `tokens` makes superfluous, because they are beginnings of it; returns their sequences, and
    /// whether one of them was of use.
    pub fn supersede(
        &mut self,
        adapter: Option<&str>,
        tokens: &[LlamaToken],
        pool: &mut Pool,
    ) -> (Vec<i32>, bool) {
        let old: Vec<(i32, bool)> = self
            .entries
            .iter()
            .filter(|entry| entry.adapter.as_deref() == adapter && tokens.starts_with(&entry.tokens))
            .map(|entry| (entry.sequence, entry.proven))
            .collect();
        for &(sequence, _) in &old {
            self.remove(sequence, pool);
        }
        let proven = old.iter().any(|&(_, proven)| proven);
        (old.into_iter().map(|(sequence, _)| sequence).collect(), proven)
    }

    /// Takes out the entry that is likeliest of no use: one that never was before one that was, and the one whose last use
    /// is longest ago, but not the one with the sequence `spared`; returns its sequence.
    pub fn evict(&mut self, spared: Option<i32>, pool: &mut Pool) -> Option<i32> {
        let entries = self.entries.iter();
        let least = entries
            .filter(|entry| Some(entry.sequence) != spared)
            .min_by_key(|entry| (entry.proven, entry.used))?
            .sequence;
        self.remove(least, pool);
        Some(least)
    }

    /// Takes out an entry when there are too many that were never of use; returns its sequence.
    pub fn thin(&mut self, pool: &mut Pool) -> Option<i32> {
        let unproven = self.entries.iter().filter(|entry| !entry.proven).count();
        (unproven > MOST_UNPROVEN)
            .then(|| self.evict(None, pool))
            .flatten()
    }

    fn remove(&mut self, sequence: i32, pool: &mut Pool) {
        if let Some(at) = self.entries.iter().position(|entry| entry.sequence == sequence) {
            let mut entry = self.entries.swap_remove(at);
            pool.release(&mut entry.cells, 0);
            self.sequences.push(sequence);
        }
    }
}

/// Length of the common beginning.
pub fn common(a: &[LlamaToken], b: &[LlamaToken]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: &[i32]) -> Vec<LlamaToken> {
        ids.iter().map(|&id| LlamaToken(id)).collect()
    }

    fn fill(prefixes: &mut Prefixes, pool: &mut Pool, ids: &[i32], adapter: Option<&str>) -> i32 {
        let sequence = prefixes.sequence().unwrap();
        let mut cells = Cells::new();
        assert!(pool.take(ids.len(), &mut cells));
        prefixes.add(
            sequence,
            adapter.map(ToOwned::to_owned),
            tokens(ids),
            cells,
            false,
        );
        sequence
    }

    #[test]
    fn the_oldest_goes_and_a_longer_one_replaces_its_beginnings() {
        let mut pool = Pool::new(16);
        let mut prefixes = Prefixes::new(5..8);
        let first = fill(&mut prefixes, &mut pool, &[1, 2], None);
        let second = fill(&mut prefixes, &mut pool, &[1, 2, 3], Some("a"));
        fill(&mut prefixes, &mut pool, &[4], None);
        assert_eq!((prefixes.sequence(), pool.free()), (None, 10));
        assert!(prefixes.covers(None, &tokens(&[1])) && !prefixes.covers(None, &tokens(&[1, 2, 3])));
        prefixes.touch(first, 2);
        assert_eq!(prefixes.evict(None, &mut pool), Some(second));
        let superseded = prefixes.supersede(None, &tokens(&[1, 2, 9]), &mut pool);
        assert_eq!(superseded, (vec![first], true));
        assert_eq!((pool.free(), prefixes.entries().len()), (15, 1));
        assert_eq!(common(&tokens(&[1, 2, 3]), &tokens(&[1, 2, 4, 5])), 2);
    }

    #[test]
    fn few_are_kept_that_nobody_has_used() {
        let mut pool = Pool::new(16);
        let mut prefixes = Prefixes::new(0..9);
        let used = fill(&mut prefixes, &mut pool, &[0], None);
        prefixes.touch(used, 1);
        let first = fill(&mut prefixes, &mut pool, &[1], None);
        for id in 2..5 {
            fill(&mut prefixes, &mut pool, &[id], None);
        }
        assert_eq!(prefixes.thin(&mut pool), None);
        fill(&mut prefixes, &mut pool, &[5], None);
        assert_eq!(
            (prefixes.thin(&mut pool), prefixes.thin(&mut pool)),
            (Some(first), None)
        );
        // The used one goes last.
        for _ in 0..4 {
            assert_ne!(prefixes.evict(None, &mut pool), Some(used));
        }
        assert_eq!(prefixes.evict(None, &mut pool), Some(used));
    }
}
