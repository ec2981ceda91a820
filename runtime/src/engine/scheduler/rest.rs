//! Rest: what becomes of the cells of a request that is done.
//!
//! While nobody else computes it stays in the context, because the next prompt may go on right there (a conversation); a
//! copy is made meanwhile. As soon as somebody else computes, its cells are free, so that attention looks at no cell that
//! is of no use, and the next prompt that begins so gets them back from the copy.

use llama_cpp_2::token::LlamaToken;

use super::Scheduler;
use crate::engine::pool::Cells;
use crate::engine::prefix::{Found, Piece, SHORTEST};
use crate::engine::slot::Slot;

/// A request that is done, and still in the context.
#[derive(Debug)]
pub(super) struct Resting {
    pub(super) sequence: i32,
    pub(super) adapter: Option<String>,
    /// One for each cell.
    pub(super) tokens: Vec<LlamaToken>,
    pub(super) cells: Cells,
    /// Where its system messages end, and where it parted from another.
    marks: [usize; 2],
    /// Whether there is a copy.
    pub(super) stored: bool,
}

impl Scheduler {
    /// A slot is done: it rests.
    pub(super) fn keep(&mut self, mut slot: Slot) {
        if slot.sequence < 0 {
            return;
        }
        if slot.cells.len() < SHORTEST {
            self.vacate(&mut slot);
            return;
        }
        slot.tokens.truncate(slot.cells.len());
        self.resting.push(Resting {
            sequence: slot.sequence,
            adapter: slot.request.adapter,
            marks: [slot.beginning, slot.cached],
            tokens: slot.tokens,
            cells: slot.cells,
            stored: false,
        });
    }

    /// Gives up a slot's cells and its sequence.
    pub(super) fn vacate(&mut self, slot: &mut Slot) {
        self.pool.release(&mut slot.cells, 0);
        self.llama.forget(slot.sequence);
        self.sequences.push(slot.sequence);
        slot.sequence = -1;
    }

    /// Frees the cells of all who rest, but not those of the sequence `spared`.
    pub(super) fn put_away(&mut self, spared: Option<i32>) {
        let (stay, go) = std::mem::take(&mut self.resting)
            .into_iter()
            .partition(|rest| Some(rest.sequence) == spared);
        self.resting = stay;
        for mut rest in go {
            if !rest.stored {
                self.store(rest.sequence, rest.adapter.as_deref(), &rest.tokens, rest.marks);
            }
            self.pool.release(&mut rest.cells, 0);
            self.llama.forget(rest.sequence);
            self.sequences.push(rest.sequence);
        }
    }

    /// Copies those who rest, and leaves them where they are.
    pub(super) fn store_resting(&mut self) {
        for mut rest in std::mem::take(&mut self.resting) {
            if !rest.stored {
                self.store(rest.sequence, rest.adapter.as_deref(), &rest.tokens, rest.marks);
                rest.stored = true;
            }
            self.resting.push(rest);
        }
    }

    /// Copies what a slot has computed so far.
    pub(super) fn store_slot(&mut self, slot: &Slot) {
        let tokens = &slot.tokens[..slot.cells.len()];
        let marks = [slot.beginning, slot.cached];
        self.store(slot.sequence, slot.request.adapter.as_deref(), tokens, marks);
    }

    /// Copies a sequence's tokens to memory, where they are not there yet.
    fn store(&mut self, sequence: i32, adapter: Option<&str>, tokens: &[LlamaToken], marks: [usize; 2]) {
        let mut end = self.prefixes.end(adapter, tokens);
        let whole = tokens.len();
        let [_, shared] = marks;
        for cut in self.prefixes.cuts(end.position..whole, &marks) {
            let range = end.position..cut;
            let Some(state) = self
                .llama
                .state(sequence, whole, range.clone(), self.prefixes.most())
            else {
                return;
            };
            let piece = Piece {
                tokens: tokens[range].to_vec(),
                state,
                divisible: self.llama.reaches_back(sequence, whole, 0),
                // The other one that has these tokens is the second who began so.
                proven: cut <= shared,
            };
            match self.prefixes.add(end, adapter, piece) {
                Some(next) => end = next,
                // The budget is used up by what is of more use.
                None => return,
            }
        }
    }

    /// Lets a slot have the first `count` tokens of another sequence, in the same cells.
    pub(super) fn take_over(&mut self, slot: &mut Slot, from: i32, count: usize) {
        let resting = self.resting.iter().find(|rest| rest.sequence == from);
        let cells = resting.map(|rest| &rest.cells).or_else(|| {
            let slot = self.slots.iter().find(|slot| slot.sequence == from)?;
            Some(&slot.cells)
        });
        let Some(cells) = cells.filter(|cells| cells.len() >= count) else {
            return;
        };
        slot.cells = self.pool.share(cells, count);
        self.llama.copy(from, slot.sequence, count);
        slot.took();
    }

    /// Lets a slot have what memory has beyond the tokens that it has already.
    pub(super) fn bring_back(&mut self, slot: &mut Slot, found: &Found) {
        if found.count <= slot.cells.len() {
            return;
        }
        self.prefixes.touch(found);
        for &id in &found.parts {
            // What went to make room ends the chain.
            let Some(part) = self.prefixes.part(id) else { break };
            let held = part.range();
            if held.start > slot.cells.len() {
                break;
            }
            let wanted = slot.cells.len().max(held.start)..found.count.min(held.end);
            if wanted.is_empty() {
                continue;
            }
            // It is there as a whole for a moment.
            let restored = self.pool.free() >= held.len()
                && self.llama.restore(slot.sequence, part.state(), &held, &wanted)
                && self.pool.take(wanted.len(), &mut slot.cells);
            if !restored {
                break;
            }
        }
        slot.took();
    }
}
