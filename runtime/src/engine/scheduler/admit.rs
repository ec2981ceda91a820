//! Admission: a waiting request gets a slot, and with it whatever was computed before of its prompt.

use std::time::Instant;

use super::Scheduler;
use crate::engine::JobError;
use crate::engine::prefix::{SHORTEST, common, disk};
use crate::engine::slot::Slot;

/// Tokens of the answer that must fit beside the prompt for a request to be let in.
const HEADROOM: usize = 32;
/// Tokens that are worth waiting for: fewer are sooner computed twice.
const WORTH_WAITING: usize = 32;

/// Where in the context a beginning is.
#[derive(Clone, Copy, Debug)]
struct Source {
    sequence: i32,
    count: usize,
    /// The job that still computes it.
    job: Option<u64>,
}

impl Scheduler {
    /// Lets in who waits, in order, as long as there are slots and cells; then lets followers take over what their
    /// leaders have computed. Nobody rests in the context after that, if somebody computes.
    pub(super) fn admit(&mut self) {
        self.expire();
        while self.slots.len() < self.most {
            let Some(slot) = self.waiting.pop_front() else {
                break;
            };
            // What did not fit does not fit now, if no cell more is free.
            let still = |(job, free)| job == slot.job && self.pool.free() <= free;
            let is_refused =
                self.refused.is_some_and(still) && self.resting.is_empty() && !self.slots.is_empty();
            let refused = if is_refused { Some(slot) } else { self.place(slot) };
            if let Some(slot) = refused {
                self.refused = Some((slot.job, self.pool.free()));
                self.waiting.push_front(slot);
                break;
            }
        }
        self.follow();
        self.mark_beginnings();
        if !self.slots.is_empty() {
            self.put_away(None);
        }
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

    /// Lets a request in; returns it when there is no room.
    fn place(&mut self, mut slot: Slot) -> Option<Slot> {
        let source = self.source(&slot);
        let shared = source.map_or(0, |source| source.count);
        let capacity = self.pool.capacity();
        let need =
            (slot.tokens.len() + HEADROOM.min(slot.request.max_tokens as usize)).min(capacity) - shared;
        if !self.make_room(need, source.map(|source| source.sequence)) {
            return Some(slot);
        }
        let Some(sequence) = self.sequences.pop() else {
            return Some(slot);
        };
        slot.begin();
        slot.sequence = sequence;
        if self.llama.is_exact() && slot.beginning == 0 {
            slot.beginning = self.branch(&slot, shared);
        }
        // To make room, it may have gone.
        let source = source.filter(|source| self.is_in_context(source.sequence));
        self.resume(&mut slot, source);
        self.slots.push(slot);
        None
    }

    fn is_in_context(&self, sequence: i32) -> bool {
        self.resting.iter().any(|rest| rest.sequence == sequence)
            || self.slots.iter().any(|slot| slot.sequence == sequence)
    }

    /// The longest beginning of a request's tokens that somebody in the context has, or will have soon.
    fn source(&self, slot: &Slot) -> Option<Source> {
        // The last token is always computed: its logits are what is wanted.
        let (tokens, most) = (&slot.tokens, slot.tokens.len() - 1);
        let adapter = &slot.request.adapter;
        let resting = self
            .resting
            .iter()
            .filter(|rest| rest.adapter == *adapter)
            .filter_map(|rest| {
                let count = common(&rest.tokens, tokens).min(most);
                let reached = self.llama.reaches_back(rest.sequence, rest.tokens.len(), count);
                reached.then_some(Source {
                    sequence: rest.sequence,
                    count,
                    job: None,
                })
            });
        let slots = self
            .slots
            .iter()
            .filter(|other| other.job != slot.job && other.request.adapter == *adapter)
            .filter_map(|other| {
                let count = common(&other.tokens, tokens).min(most);
                let computed = other.cells.len();
                let whole = count.min(computed);
                if count > computed + WORTH_WAITING && other.leader.is_none() {
                    return Some(Source {
                        sequence: other.sequence,
                        count,
                        job: Some(other.job),
                    });
                }
                let reached = whole > 0 && self.llama.reaches_back(other.sequence, computed, whole);
                reached.then_some(Source {
                    sequence: other.sequence,
                    count: whole,
                    job: None,
                })
            });
        // What is there already is better than as much that is still to come.
        resting
            .chain(slots)
            .max_by_key(|source| source.count - if source.job.is_some() { WORTH_WAITING } else { 0 })
            .filter(|source| source.count >= SHORTEST)
    }

    /// Where a prompt parts from a kept beginning that it could share only in part, which this model cannot: the next
    /// prompt that begins so will find one that ends there. 0 when that is not worth it.
    fn branch(&self, slot: &Slot, shared: usize) -> usize {
        let (adapter, most) = (slot.request.adapter.as_deref(), slot.tokens.len() - 1);
        let kept = self.prefixes.find(adapter, &slot.tokens[..most]).count;
        let resting = self
            .resting
            .iter()
            .filter(|rest| rest.adapter.as_deref() == adapter);
        let seen = resting
            .map(|rest| common(&rest.tokens, &slot.tokens))
            .chain([self.prefixes.likest(adapter, &slot.tokens)])
            .max()
            .unwrap_or(0);
        let point = disk::worth_keeping(0, seen.min(most));
        if point > shared.max(kept) + WORTH_WAITING {
            point
        } else {
            0
        }
    }

    /// Makes sure that `need` cells and a sequence are free, at the expense of those who rest; the one with the sequence
    /// `spared` goes only when nothing else is under way.
    fn make_room(&mut self, need: usize, spared: Option<i32>) -> bool {
        let fits = |this: &Self| this.pool.free() >= need && !this.sequences.is_empty();
        if !fits(self) {
            self.put_away(spared);
        }
        if !fits(self) && self.slots.is_empty() {
            self.put_away(None);
            // Alone, with the whole context: what does not fit is cut when it gets there.
            return true;
        }
        fits(self)
    }

    /// Gives a slot what is there of its tokens: in the context, in memory, on the disk; or lets it wait for one that
    /// computes them.
    fn resume(&mut self, slot: &mut Slot, source: Option<Source>) {
        let most = slot.tokens.len() - 1;
        let found = self
            .prefixes
            .find(slot.request.adapter.as_deref(), &slot.tokens[..most]);
        let in_context = source.map_or(0, |source| source.count);
        if self.restore_from_disk(slot, in_context.max(found.count)) {
            return;
        }
        match source {
            Some(Source {
                job: Some(leader),
                count,
                ..
            }) if count > found.count + WORTH_WAITING => {
                slot.leader = Some((leader, count));
                return;
            }
            // Less than memory has is worth its cells only beside others, and never to a model that can share only whole
            // sequences.
            Some(Source {
                job: None,
                sequence,
                count,
            }) if count >= found.count || !self.slots.is_empty() && !self.llama.is_exact() => {
                self.take_over(slot, sequence, count);
            }
            // Alone, cells in the order of their tokens: attention adds up in half precision, so that another order is
            // another answer now and then.
            _ if self.slots.is_empty() => self.put_away(None),
            _ => {}
        }
        self.bring_back(slot, &found);
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
                // Gone: what it has left may serve.
                _ => self.with_slot(at, |this, slot| {
                    let source = this.source(slot).filter(|source| source.job.is_none());
                    this.resume(slot, source);
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

    /// A slot that stands right at the end of its system messages is copied there, where later they could not be taken out
    /// of a longer sequence any more; and what many prompts begin with is written to the disk.
    fn mark_beginnings(&mut self) {
        for at in 0..self.slots.len() {
            let slot = &self.slots[at];
            if self.llama.is_exact()
                && slot.beginning >= SHORTEST
                && slot.cells.len() == slot.beginning
                && slot.is_prefilling()
            {
                let slot = self.slots.remove(at);
                self.store_slot(&slot);
                self.slots.insert(at, slot);
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
        match disk.load(&found) {
            Ok(state)
                if self
                    .llama
                    .restore(slot.sequence, &state, &(0..count), &(0..count)) =>
            {
                if self.pool.take(count, &mut slot.cells) {
                    slot.took();
                    return true;
                }
                self.llama.forget(slot.sequence);
            }
            Ok(_) => {
                tracing::debug!("llama.cpp does not take a beginning from the disk: it is computed again")
            }
            Err(error) => tracing::warn!("{error}; it is computed again"),
        }
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
            let (computed, count) = (slot.cells.len(), disk::worth_keeping(slot.beginning, slot.cached));
            let certain = count == slot.beginning;
            if computed < count
                || !disk.wants(slot.job, adapter, &slot.tokens[..count], certain)
                || !self.llama.reaches_back(slot.sequence, computed, count)
            {
                continue;
            }
            if let Some(state) = self
                .llama
                .state(slot.sequence, computed, 0..count, disk.most_bytes())
            {
                disk.store(state, adapter, &slot.tokens[..count]);
            }
        }
    }
}
