//! Admission: a waiting request gets a slot, and with it whatever was computed before of its prompt.

use std::time::Instant;

use llama_cpp_2::token::LlamaToken;

use super::{LEAST_ENTRY, Scheduler};
use crate::engine::JobError;
use crate::engine::prefix::{common, disk};
use crate::engine::slot::Slot;

/// Tokens of the answer that must fit beside the prompt for a request to be let in.
const HEADROOM: usize = 32;
/// Tokens that are worth waiting for: fewer are sooner computed twice.
const WORTH_WAITING: usize = 32;

/// Where a beginning is.
#[derive(Clone, Copy, Debug)]
struct Source {
    sequence: i32,
    count: usize,
    /// The job that still computes it.
    job: Option<u64>,
}

impl Scheduler {
    /// Lets in who waits, in order, as long as there are slots and cells; then lets followers take over what their
    /// leaders have computed.
    pub(super) fn admit(&mut self) {
        self.expire();
        while let Some(slot) = self.waiting.front() {
            if self.sequences.is_empty() || self.slots.len() >= self.most {
                break;
            }
            let adapter = slot.request.adapter.clone();
            let tokens = slot.tokens.clone();
            let source = self.source(adapter.as_deref(), &tokens);
            let shared = source.map_or(0, |source| source.count);
            let capacity = self.pool.capacity();
            let need = (tokens.len() + HEADROOM.min(slot.request.max_tokens as usize)).min(capacity) - shared;
            if !self.make_room(need, source.map(|source| source.sequence)) {
                break;
            }
            let (Some(mut slot), Some(sequence)) = (self.waiting.pop_front(), self.sequences.pop()) else {
                break;
            };
            slot.begin();
            slot.sequence = sequence;
            if self.llama.is_exact() && slot.beginning == 0 {
                slot.beginning = self.branch(adapter.as_deref(), &tokens, shared);
            }
            self.restore(&mut slot, source);
            self.slots.push(slot);
        }
        self.follow();
        self.mark_beginnings();
    }

    /// Those whose deadline has passed cost nothing more.
    fn expire(&mut self) {
        let now = Instant::now();
        let late = |slot: &Slot| slot.deadline.is_some_and(|deadline| deadline <= now);
        let jobs: Vec<u64> = self
            .waiting
            .iter()
            .filter(|slot| late(slot))
            .map(|slot| slot.job)
            .collect();
        self.waiting.retain(|slot| !late(slot));
        for job in jobs {
            self.fail(job, &JobError::Expired);
        }
    }

    /// The longest beginning of `tokens` that an entry or a slot has, or will have soon.
    fn source(&self, adapter: Option<&str>, tokens: &[LlamaToken]) -> Option<Source> {
        // The last token is always computed: its logits are what is wanted.
        let most = tokens.len() - 1;
        let entries = self
            .prefixes
            .entries()
            .iter()
            .filter(|entry| entry.adapter.as_deref() == adapter)
            .filter_map(|entry| {
                let count = common(&entry.tokens, tokens).min(most);
                self.llama
                    .reaches_back(entry.sequence, entry.tokens.len(), count)
                    .then_some(Source {
                        sequence: entry.sequence,
                        count,
                        job: None,
                    })
            });
        let slots = self
            .slots
            .iter()
            .filter(|slot| slot.request.adapter.as_deref() == adapter)
            .filter_map(|slot| {
                let count = common(&slot.tokens, tokens).min(most);
                let computed = slot.cells.len();
                let whole = count.min(computed);
                if count > computed + WORTH_WAITING && slot.leader.is_none() {
                    return Some(Source {
                        sequence: slot.sequence,
                        count,
                        job: Some(slot.job),
                    });
                }
                (whole > 0 && self.llama.reaches_back(slot.sequence, computed, whole)).then_some(Source {
                    sequence: slot.sequence,
                    count: whole,
                    job: None,
                })
            });
        // What is there already is better than as much that is still to come.
        entries
            .chain(slots)
            .max_by_key(|source| source.count - if source.job.is_some() { WORTH_WAITING } else { 0 })
            .filter(|source| source.count >= LEAST_ENTRY)
    }

    /// Where `tokens` part from an entry that they could share only in part, which this model cannot: the next prompt
    /// that begins so will find an entry that ends there. 0 when that is not worth an entry.
    fn branch(&self, adapter: Option<&str>, tokens: &[LlamaToken], shared: usize) -> usize {
        let entries = self.prefixes.entries().iter();
        let seen = entries
            .filter(|entry| entry.adapter.as_deref() == adapter)
            .map(|entry| common(&entry.tokens, tokens).min(tokens.len() - 1))
            .max()
            .unwrap_or(0);
        let point = disk::worth_keeping(0, seen);
        if point > shared + WORTH_WAITING { point } else { 0 }
    }

    /// Makes sure that `need` cells are free, at the expense of entries other than `spared`; changes nothing when that
    /// is not enough. When nothing else is under way, even the spared one goes.
    fn make_room(&mut self, need: usize, spared: Option<i32>) -> bool {
        let alone = self.slots.is_empty();
        let entries = self.prefixes.entries().iter();
        let evictable = self.pool.freed_by(
            entries
                .filter(|entry| Some(entry.sequence) != spared)
                .map(|entry| &entry.cells),
        );
        if self.pool.free() + evictable < need && !alone {
            return false;
        }
        while self.pool.free() < need {
            let others = self.prefixes.evict(spared, &mut self.pool);
            let Some(sequence) = others.or_else(|| self.prefixes.evict(None, &mut self.pool)) else {
                // Alone, with the whole context: what does not fit is cut when it gets there.
                return alone;
            };
            self.llama.forget(sequence);
        }
        true
    }

    /// Gives a new slot its beginning: from another sequence, or from the disk when that has more.
    fn restore(&mut self, slot: &mut Slot, source: Option<Source>) {
        let known = source.map_or(0, |source| source.count);
        if self.restore_from_disk(slot, known) {
            return;
        }
        let Some(source) = source else {
            return;
        };
        if let Some(leader) = source.job {
            slot.leader = Some((leader, source.count));
            return;
        }
        self.take_over(slot, source.sequence, source.count);
    }

    fn take_over(&mut self, slot: &mut Slot, from: i32, count: usize) {
        let cells = self
            .prefixes
            .entries()
            .iter()
            .find(|entry| entry.sequence == from)
            .map(|entry| &entry.cells)
            .or_else(|| {
                let slot = self.slots.iter().find(|slot| slot.sequence == from)?;
                Some(&slot.cells)
            });
        // It may have been evicted to make room.
        let Some(cells) = cells.filter(|cells| cells.len() >= count).cloned() else {
            return;
        };
        self.prefixes.touch(from, count);
        self.llama.copy(from, slot.sequence, count);
        slot.cells = self.pool.share(&cells, count);
        if slot.is_prefilling() {
            slot.cached = slot.cached.max(count);
        }
    }

    /// Followers take over when their leader has got there, and help themselves when it is gone.
    fn follow(&mut self) {
        for at in 0..self.slots.len() {
            let Some((leader, count)) = self.slots[at].leader else {
                continue;
            };
            let found = self.slots.iter().find(|slot| slot.job == leader);
            match found {
                Some(slot) if slot.cells.len() < count => continue,
                Some(slot) if self.llama.reaches_back(slot.sequence, slot.cells.len(), count) => {
                    let from = slot.sequence;
                    self.with_slot(at, |this, slot| this.take_over(slot, from, count));
                }
                // Gone: what it has left as an entry may serve.
                _ => self.with_slot(at, |this, slot| {
                    let source = this.source(slot.request.adapter.as_deref(), &slot.tokens);
                    if let Some(source) = source.filter(|source| source.job.is_none()) {
                        this.take_over(slot, source.sequence, source.count);
                    }
                }),
            }
        }
    }

    /// Takes a follower out, lets it do something, and puts it back where it was, free of its leader.
    fn with_slot(&mut self, at: usize, act: impl FnOnce(&mut Self, &mut Slot)) {
        let mut slot = self.slots.remove(at);
        slot.leader = None;
        act(self, &mut slot);
        self.slots.insert(at, slot);
    }

    /// A slot that stands right at the end of its system messages makes an entry of them, where later it could not be
    /// taken out of a longer sequence any more; and what many prompts begin with is written to the disk.
    fn mark_beginnings(&mut self) {
        for at in 0..self.slots.len() {
            let slot = &self.slots[at];
            if self.llama.is_exact()
                && slot.beginning >= LEAST_ENTRY
                && slot.cells.len() == slot.beginning
                && slot.is_prefilling()
            {
                let (from, adapter) = (slot.sequence, slot.request.adapter.clone());
                let (tokens, cells) = (slot.tokens[..slot.beginning].to_vec(), slot.cells.clone());
                self.enter(from, adapter, &tokens, &cells);
            }
        }
        self.write_to_disk();
    }

    fn restore_from_disk(&mut self, slot: &mut Slot, known: usize) -> bool {
        let Some(found) = self
            .disk
            .as_ref()
            .and_then(|disk| disk.find(slot.request.adapter.as_deref(), &slot.tokens))
        else {
            return false;
        };
        let count = found.tokens;
        if count <= known + WORTH_WAITING
            || count >= slot.tokens.len()
            || !self.make_room(slot.tokens.len() + 1, None)
        {
            return false;
        }
        let Some(disk) = &mut self.disk else {
            return false;
        };
        match disk.load(&found, self.llama.context_mut(), slot.sequence) {
            Ok(()) if self.pool.take(count, &mut slot.cells) => {
                slot.cached = count;
                return true;
            }
            Ok(()) => {}
            Err(error) => tracing::warn!("{error}; it is computed again"),
        }
        self.llama.forget(slot.sequence);
        false
    }

    /// Writes to the disk what more than one prompt began with.
    fn write_to_disk(&mut self) {
        let Some(disk) = &mut self.disk else {
            return;
        };
        for slot in self
            .slots
            .iter()
            .filter(|slot| slot.cached > 0 && slot.is_prefilling())
        {
            let adapter = slot.request.adapter.as_deref();
            let count = disk::worth_keeping(slot.beginning, slot.cached);
            let certain = count == slot.beginning;
            if slot.cells.len() < count || !disk.wants(slot.job, adapter, &slot.tokens[..count], certain) {
                continue;
            }
            if !self.llama.reaches_back(slot.sequence, slot.cells.len(), count) {
                continue;
            }
            self.llama.forget(self.scratch);
            self.llama.copy(slot.sequence, self.scratch, count);
            disk.store(
                self.llama.context_mut(),
                self.scratch,
                adapter,
                &slot.tokens[..count],
            );
            self.llama.forget(self.scratch);
        }
    }
}
