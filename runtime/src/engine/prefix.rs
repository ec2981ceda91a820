//! Prefixes: beginnings of prompts whose KV is kept in memory, so that the next prompt which begins so need not compute
//! them.
//!
//! They lie outside of the context, because attention looks at the mask of every cell up to the last used one: a beginning
//! that nobody computes with would make every token slower. Getting one back is a copy of a few milliseconds.
//!
//! A beginning is a chain of parts, and a part is the KV of some tokens that follow those of its parent: what many prompts
//! begin with is there once, with each prompt's own tail behind it. Parts end where prompts were seen to part, where
//! system messages end, and at the latest after 256 tokens. [`disk`] keeps those that are asked for again and
//! again over a restart.

use std::collections::HashSet;
use std::ops::Range;

use llama_cpp_2::token::LlamaToken;

use super::context::State;

pub mod disk;

/// Shortest part, in tokens: fewer are sooner computed again.
pub const SHORTEST: usize = 16;
/// Longest part, in tokens, where a part can be a piece of a sequence: what does not fit whole is kept in part.
const LONGEST: usize = 256;

/// Some tokens of a beginning.
#[derive(Debug)]
pub struct Part {
    id: u64,
    /// Whose tokens come before these; `None` where these are the first.
    parent: Option<u64>,
    /// The adapter that computed it.
    adapter: Option<String>,
    first: usize,
    piece: Piece,
    /// When it was last of use.
    used: u64,
}

/// What a part is made of.
#[derive(Debug)]
pub struct Piece {
    /// Its tokens.
    pub tokens: Vec<LlamaToken>,
    /// Their KV.
    pub state: State,
    /// Whether the first of its tokens are of use without the others.
    pub divisible: bool,
    /// Whether a second prompt has begun so.
    pub proven: bool,
}

impl Part {
    /// The positions of its tokens.
    pub fn range(&self) -> Range<usize> {
        self.first..self.first + self.piece.tokens.len()
    }

    /// Its KV.
    pub fn state(&self) -> &State {
        &self.piece.state
    }

    fn bytes(&self) -> u64 {
        (self.piece.state.bytes().len() + size_of_val(&self.piece.tokens[..])) as u64
    }
}

/// A beginning of a prompt that is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Its parts, first to last.
    pub parts: Vec<u64>,
    /// Its length in tokens; the last part may have more.
    pub count: usize,
}

/// Where a new part goes: behind this one, at this position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// The part before it.
    pub parent: Option<u64>,
    /// Its first position.
    pub position: usize,
}

/// All that is kept.
#[derive(Debug)]
pub struct Prefixes {
    parts: Vec<Part>,
    /// Most bytes.
    most: u64,
    /// Whether only whole sequences are of use (sliding windows, recurrent models): then every part is one.
    whole: bool,
    clock: u64,
    ids: u64,
}

impl Prefixes {
    /// Nothing yet, and at most `most` bytes later.
    pub fn new(most: u64, whole: bool) -> Self {
        Self {
            parts: Vec::new(),
            most,
            whole,
            clock: 0,
            ids: 0,
        }
    }

    /// Bytes that are kept.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(Part::bytes).sum()
    }

    /// Most bytes.
    pub fn most(&self) -> u64 {
        self.most
    }

    /// A part.
    pub fn part(&self, id: u64) -> Option<&Part> {
        self.parts.iter().find(|part| part.id == id)
    }

    /// The longest beginning of `tokens` that is kept.
    pub fn find(&self, adapter: Option<&str>, tokens: &[LlamaToken]) -> Found {
        self.longest(adapter, None, tokens)
    }

    fn longest(&self, adapter: Option<&str>, parent: Option<u64>, rest: &[LlamaToken]) -> Found {
        let mut best = Found::default();
        for part in self.children(adapter, parent) {
            let count = common(&part.piece.tokens, rest);
            let is_whole = count == part.piece.tokens.len();
            let least = if parent.is_none() { SHORTEST } else { 1 };
            if count < least || !is_whole && !part.piece.divisible {
                continue;
            }
            let mut found = if is_whole && !self.whole {
                self.longest(adapter, Some(part.id), &rest[count..])
            } else {
                Found::default()
            };
            found.count += count;
            if found.count > best.count {
                found.parts.insert(0, part.id);
                best = found;
            }
        }
        best
    }

    /// Most tokens that a kept beginning has in common with `tokens`, of use or not.
    pub fn likest(&self, adapter: Option<&str>, tokens: &[LlamaToken]) -> usize {
        self.children(adapter, None)
            .map(|part| common(&part.piece.tokens, tokens))
            .max()
            .unwrap_or(0)
    }

    fn children<'a>(
        &'a self,
        adapter: Option<&'a str>,
        parent: Option<u64>,
    ) -> impl Iterator<Item = &'a Part> + 'a {
        self.parts
            .iter()
            .filter(move |part| part.parent == parent && part.adapter.as_deref() == adapter)
    }

    /// A prompt begins so.
    pub fn touch(&mut self, found: &Found) {
        self.clock += 1;
        for part in &mut self.parts {
            if found.parts.contains(&part.id) {
                part.used = self.clock;
                // A few words of a template that all prompts share say nothing about the rest.
                part.piece.proven |= found.count >= part.first + part.piece.tokens.len() / 2;
            }
        }
        self.doubt();
    }

    /// What was proven long ago must not keep out for ever what is new.
    fn doubt(&mut self) {
        while self.proven_bytes() > self.most / 4 * 3 {
            let oldest = self.parts.iter_mut().filter(|part| part.piece.proven);
            let Some(part) = oldest.min_by_key(|part| part.used) else {
                return;
            };
            part.piece.proven = false;
        }
    }

    fn proven_bytes(&self) -> u64 {
        let proven = self.parts.iter().filter(|part| part.piece.proven);
        proven.map(Part::bytes).sum()
    }

    /// Where the parts end that have all of their tokens in common with `tokens`; past the last token when all of them are
    /// kept.
    pub fn end(&self, adapter: Option<&str>, tokens: &[LlamaToken]) -> End {
        if self.whole {
            let there = self
                .children(adapter, None)
                .any(|part| part.piece.tokens == tokens);
            return End {
                parent: None,
                position: if there { tokens.len() } else { 0 },
            };
        }
        let found = self.find(adapter, tokens);
        let mut end = End {
            parent: None,
            position: 0,
        };
        for part in found.parts.iter().filter_map(|&id| self.part(id)) {
            if part.range().end <= found.count {
                end = End {
                    parent: Some(part.id),
                    position: part.range().end,
                };
            }
        }
        // What ends within a part is there, too.
        if found.count == tokens.len() {
            end.position = found.count;
        }
        end
    }

    /// Where the parts end that are to be made of the positions `range`, with parts ending at `marks` if that is worth it.
    pub fn cuts(&self, range: Range<usize>, marks: &[usize]) -> Vec<usize> {
        if range.len() < SHORTEST {
            return Vec::new();
        }
        if self.whole {
            return vec![range.end];
        }
        let inside = range.start + SHORTEST..=range.end - SHORTEST;
        let mut ends: Vec<usize> = marks
            .iter()
            .copied()
            .filter(|mark| inside.contains(mark))
            .collect();
        ends.sort_unstable();
        ends.push(range.end);
        let (mut cuts, mut at) = (Vec::new(), range.start);
        for end in ends {
            if end < at + SHORTEST {
                continue;
            }
            while end > at + LONGEST {
                // What is left is no shorter than a part may be.
                at = (at + LONGEST).min(end - SHORTEST);
                cuts.push(at);
            }
            at = end;
            cuts.push(at);
        }
        cuts
    }

    /// Keeps a part; others that are of less use go, except those before it. Returns where the next one goes; `None` when
    /// there is no room.
    pub fn add(&mut self, end: End, adapter: Option<&str>, piece: Piece) -> Option<End> {
        self.clock += 1;
        self.ids += 1;
        let part = Part {
            id: self.ids,
            // A whole sequence follows nothing.
            parent: end.parent.filter(|_| !self.whole),
            adapter: adapter.map(ToOwned::to_owned),
            first: end.position,
            piece,
            used: self.clock,
        };
        let mut before = HashSet::new();
        let mut at = part.parent;
        while let Some(parent) = at.and_then(|id| self.parts.iter_mut().find(|part| part.id == id)) {
            parent.used = self.clock;
            before.insert(parent.id);
            at = parent.parent;
        }
        while self.bytes() + part.bytes() > self.most {
            if !self.evict(&before, part.piece.proven) {
                return None;
            }
        }
        let next = End {
            parent: Some(part.id),
            position: part.range().end,
        };
        self.parts.push(part);
        self.doubt();
        Some(next)
    }

    /// Takes out the part that is likeliest of no use: of those that none comes behind, one that never was before one that
    /// was, and the one whose last use is longest ago. Proven ones go for proven ones only. False when there is none.
    fn evict(&mut self, spared: &HashSet<u64>, proven: bool) -> bool {
        let parents: HashSet<u64> = self.parts.iter().filter_map(|part| part.parent).collect();
        let least = self
            .parts
            .iter()
            .enumerate()
            .filter(|(_, part)| !parents.contains(&part.id) && !spared.contains(&part.id))
            .filter(|(_, part)| proven || !part.piece.proven)
            .min_by_key(|(_, part)| (part.piece.proven, part.used))
            .map(|(at, _)| at);
        if let Some(at) = least {
            self.parts.swap_remove(at);
        }
        least.is_some()
    }
}

/// Length of the common beginning.
pub fn common(a: &[LlamaToken], b: &[LlamaToken]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
#[path = "prefix_tests.rs"]
mod tests;
