//! The scheduler: every step of the model serves all requests under way (continuous batching).
//!
//! In: jobs and cancels, at any time between two steps. Out: events for the daemon. A step takes one token of every slot
//! that decodes, and shares what is left of the batch out among the slots that prefill, so that a short prompt is not
//! stuck behind a long one. `admit` says who gets a slot and what it need not compute.
//!
//! The context is one pool of cells, for those who compute. A request is let in when its prompt fits; when cells run out
//! later, the youngest slot gives up its cells and goes on when there is room. `rest` says what becomes of cells that
//! nobody computes with any more.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use llama_cpp_2::token::data::LlamaTokenData;

use super::constraint::Compiler;
use super::context::DecodeError;
use super::interrupt::Interrupt;
use super::llama::{Llama, N_BATCH};
use super::pace::Pace;
use super::pool::Pool;
use super::prefix::Prefixes;
use super::prefix::disk::Disk;
use super::slot::{Prepared, Slot};
use super::{FromWorker, Job, JobError, Settings};
use crate::thermal::Step;

mod admit;
mod rest;

/// A rest is no longer than this, so that the daemon hears of the worker.
const LONGEST_REST: Duration = Duration::from_secs(2);

/// All requests that the worker has.
#[derive(Debug)]
pub struct Scheduler {
    llama: Llama,
    pool: Pool,
    prefixes: Prefixes,
    disk: Option<Disk>,
    settings: Settings,
    compiler: Option<Compiler>,
    pace: Pace,
    interrupt: Interrupt,
    /// Tokens of prompts in the batch.
    prefilling: usize,
    /// Whose tokens are in the batch, and how many.
    batched: Vec<(u64, usize)>,
    slots: Vec<Slot>,
    waiting: VecDeque<Slot>,
    /// The first of those who wait did not fit when so many cells were free.
    refused: Option<(u64, usize)>,
    /// Done, but still in the context until somebody else computes: the next prompt may go on there.
    resting: Vec<rest::Resting>,
    /// Sequences that nobody has.
    sequences: Vec<i32>,
    /// Room for samplers.
    candidates: Vec<LlamaTokenData>,
    arrivals: u64,
    /// Slots that may be under way at a time.
    most: usize,
    /// Whether it rests after each step, against heat.
    rests: bool,
    /// The adapter of the last step.
    turn: Option<String>,
    events: Vec<FromWorker>,
}

impl Scheduler {
    /// A scheduler without work; `interrupt` is the one that `llama` was loaded with.
    pub fn new(llama: Llama, settings: &Settings, interrupt: Interrupt) -> Self {
        let all = super::llama::sequences(settings.slots).cast_signed();
        // The last one is llama's own.
        let slots = settings.slots.cast_signed().clamp(1, (all - 2).max(1));
        Self {
            pool: Pool::new(llama.info().context),
            prefixes: Prefixes::new(settings.prefix_bytes, llama.is_exact()),
            disk: None,
            compiler: None,
            pace: Pace::new(
                Duration::from_millis(u64::from(settings.prefill_ms)),
                settings.prefill_chunk.min(N_BATCH) as usize,
            ),
            interrupt,
            prefilling: 0,
            batched: Vec::new(),
            slots: Vec::new(),
            waiting: VecDeque::new(),
            refused: None,
            resting: Vec::new(),
            sequences: (0..all - 1).rev().collect(),
            candidates: Vec::new(),
            arrivals: 0,
            most: slots.unsigned_abs() as usize,
            rests: false,
            turn: None,
            events: Vec::new(),
            settings: settings.clone(),
            llama,
        }
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.slots.is_empty() && self.waiting.is_empty() && self.resting.iter().all(|rest| rest.stored)
    }

    /// What happened since the last call.
    pub fn events(&mut self) -> Vec<FromWorker> {
        std::mem::take(&mut self.events)
    }

    /// The model's hash is known: beginnings that an earlier worker has left on the disk can be used.
    pub fn identify(&mut self, sha256: &str) {
        if let Some(place) = &self.settings.prefix_disk {
            self.disk = Some(Disk::open(place, sha256, &self.settings));
        }
    }

    /// Takes a request.
    pub fn add(&mut self, job: u64, request: Job) {
        match self.prepare(job, request) {
            Ok(slot) if slot.ended.is_some() => {
                // The schema allows one answer only.
                self.finish(slot);
            }
            Ok(slot) => self.waiting.push_back(slot),
            Err(error) => self.fail(job, &error),
        }
    }

    fn prepare(&mut self, job: u64, request: Job) -> Result<Slot, JobError> {
        let model = self.llama.model();
        if let Some(name) = &request.adapter
            && !self.llama.info().adapters.contains(name)
        {
            return Err(JobError::Adapter(name.clone()));
        }
        let tokens = self.llama.prompt().tokens(model, &request.messages)?;
        let longest = self.llama.longest();
        if tokens.is_empty() {
            return Err(JobError::Template("it rendered nothing".to_owned()));
        }
        // The answer needs room for one token at least.
        if tokens.len() + 1 > longest as usize {
            return Err(JobError::TooLarge {
                tokens: tokens.len(),
                context: longest,
            });
        }
        let constraint = match &request.schema {
            None => None,
            Some(_) if !request.stop.is_empty() => {
                let why = "it does not go with `stop`, which would cut the JSON";
                return Err(JobError::Schema(why.to_owned()));
            }
            Some(schema) => {
                if self.compiler.is_none() {
                    self.compiler = Some(Compiler::new(model).map_err(JobError::Schema)?);
                }
                let compiler = self.compiler.as_ref();
                compiler
                    .map(|compiler| compiler.compile(schema))
                    .transpose()
                    .map_err(JobError::Schema)?
            }
        };
        let beginning = self.llama.prompt().beginning(model, &request.messages, &tokens);
        self.arrivals += 1;
        let prompt = Prepared {
            tokens,
            beginning,
            longest,
            constraint,
        };
        Ok(Slot::new(job, request, self.arrivals, model, prompt))
    }

    /// Stops a request.
    pub fn cancel(&mut self, job: u64) {
        if let Some(at) = self.waiting.iter().position(|slot| slot.job == job) {
            self.waiting.remove(at);
        } else if let Some(at) = self.slots.iter().position(|slot| slot.job == job) {
            let slot = self.slots.swap_remove(at);
            self.keep(slot);
        } else {
            return;
        }
        self.fail(job, &JobError::Cancelled);
    }

    /// Works with fewer threads and with pauses while the machine is hot.
    pub fn ease(&mut self, step: Step) {
        self.llama.use_threads(match step {
            Step::Cool => 1.0,
            _ => 0.5,
        });
        self.rests = step >= Step::Slower;
    }

    /// One step of the model.
    pub fn step(&mut self) {
        self.admit();
        if self.slots.is_empty() {
            // There is time now for what would delay the next request.
            self.store_resting();
            return;
        }
        let rows = self.batch();
        if self.llama.batched() == 0 {
            return;
        }
        let started = Instant::now();
        // A state that is not made of cells would be spoilt.
        if self.prefilling > 0 && !self.llama.is_exact() {
            self.interrupt.begin(
                self.batched
                    .iter()
                    .filter(|(_, count)| *count > 1)
                    .map(|&(job, _)| job),
            );
        }
        let outcome = self.llama.decode();
        self.interrupt.end();
        match outcome {
            Ok(()) => self.pace.took(self.prefilling, started.elapsed()),
            Err(DecodeError::Interrupted) => {
                self.take_back();
                return;
            }
            Err(error) => {
                self.undecodable(error);
                return;
            }
        }
        for (job, row) in rows {
            let Some(at) = self.slots.iter().position(|slot| slot.job == job) else {
                continue;
            };
            let outcome = match self.llama.logits(row) {
                Some(logits) => self.slots[at].advance(self.llama.model(), logits, &mut self.candidates),
                None => Err(JobError::Llama("llama.cpp gave no logits".to_owned())),
            };
            self.settle(at, outcome);
        }
        if self.rests {
            std::thread::sleep(started.elapsed().min(LONGEST_REST));
        }
    }

    /// Fills the batch; returns the jobs whose next token can be chosen after it, with the index of the token whose
    /// logits say which.
    fn batch(&mut self) -> Vec<(u64, usize)> {
        self.llama.clear();
        self.prefilling = 0;
        self.batched.clear();
        let Some(adapter) = self.next_turn() else {
            return Vec::new();
        };
        if let Err(error) = self.llama.adapt(adapter.as_deref()) {
            for at in (0..self.slots.len()).rev() {
                if self.slots[at].request.adapter == adapter {
                    self.settle(at, Err(JobError::Llama(error.clone())));
                }
            }
            return Vec::new();
        }
        // Few pending tokens first: those who decode, then the shorter prompts.
        let mut order: Vec<(usize, u64, u64)> = self
            .slots
            .iter()
            .filter(|slot| slot.request.adapter == adapter && slot.leader.is_none())
            .map(|slot| (slot.pending(), slot.order, slot.job))
            .collect();
        order.sort_unstable();
        let prefill: usize = order
            .iter()
            .map(|&(pending, ..)| pending)
            .filter(|&pending| pending > 1)
            .sum();
        let alone = order.len() == 1 && self.waiting.is_empty();
        let mut left = self.pace.tokens(prefill, alone);
        let mut rows = Vec::new();
        for (done, &(pending, _, job)) in order.iter().enumerate() {
            let share = if pending == 1 {
                1
            } else {
                left.div_ceil(order.len() - done).max(1)
            };
            let room = (N_BATCH as usize).saturating_sub(self.llama.batched());
            let count = self.until_a_follower(job, pending.min(share)).min(room);
            if count == 0 || !self.reserve(job, count) {
                continue;
            }
            // Making room may have moved it.
            let Some(slot) = self.slots.iter().find(|slot| slot.job == job) else {
                continue;
            };
            let first = slot.cells.len() - count;
            for position in first..slot.cells.len() {
                let last = position + 1 == slot.tokens.len();
                let row = self
                    .llama
                    .add(slot.tokens[position], position, slot.sequence, last);
                if let (true, Some(row)) = (last, row) {
                    rows.push((job, row));
                }
            }
            self.batched.push((job, count));
            if pending > 1 {
                left = left.saturating_sub(count);
                self.prefilling += count;
            }
        }
        rows
    }

    /// Whose turn it is: one step computes with one adapter, and those that have work take turns.
    fn next_turn(&mut self) -> Option<Option<String>> {
        let mut wanted: Vec<&Option<String>> = self
            .slots
            .iter()
            .filter(|slot| slot.leader.is_none())
            .map(|slot| &slot.request.adapter)
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        let next = wanted
            .iter()
            .find(|adapter| ***adapter > self.turn)
            .or(wanted.first())
            .map(|adapter| (*adapter).clone())?;
        self.turn.clone_from(&next);
        Some(next)
    }

    /// At most `count`, but not past the point where another slot waits to take over what this one has computed.
    fn until_a_follower(&self, job: u64, count: usize) -> usize {
        let Some(slot) = self.slots.iter().find(|slot| slot.job == job) else {
            return 0;
        };
        let computed = slot.cells.len();
        let own = Some(slot.beginning).filter(|_| self.llama.is_exact());
        self.slots
            .iter()
            .filter_map(|other| other.leader)
            .filter(|(leader, _)| *leader == job)
            .map(|(_, point)| point)
            .chain(own)
            .filter(|&point| point > computed)
            .map(|point| point - computed)
            .min()
            .map_or(count, |most| count.min(most))
    }

    /// Gives a slot `count` cells more. Others give way when there are none: the youngest slot of those that are not in the
    /// batch yet, which may be this one.
    fn reserve(&mut self, job: u64, count: usize) -> bool {
        loop {
            let Some(at) = self.slots.iter().position(|slot| slot.job == job) else {
                return false;
            };
            if self.pool.take(count, &mut self.slots[at].cells) {
                return true;
            }
            if !self.resting.is_empty() {
                self.put_away(None);
                continue;
            }
            if self.slots.len() == 1 {
                let outcome = self.slots[at].cut();
                self.settle(at, outcome);
                return false;
            }
            let youngest = self
                .slots
                .iter()
                .filter(|slot| self.batched.iter().all(|&(job, _)| job != slot.job))
                .max_by_key(|slot| slot.order)
                .map_or(job, |slot| slot.job);
            self.give_way(youngest);
            if youngest == job {
                return false;
            }
        }
    }

    /// A slot gives up its cells and waits until there is room again.
    fn give_way(&mut self, job: u64) {
        let Some(at) = self.slots.iter().position(|slot| slot.job == job) else {
            return;
        };
        let mut slot = self.slots.swap_remove(at);
        tracing::debug!(job, "the context is full: this request waits");
        self.store_slot(&slot);
        self.vacate(&mut slot);
        slot.leader = None;
        self.waiting.push_front(slot);
    }

    /// The batch was interrupted, and llama.cpp has forgotten its tokens: they are pending again.
    fn take_back(&mut self) {
        for (job, count) in std::mem::take(&mut self.batched) {
            if let Some(slot) = self.slots.iter_mut().find(|slot| slot.job == job) {
                let computed = slot.cells.len() - count;
                self.pool.release(&mut slot.cells, computed);
            }
        }
    }

    /// As [`Self::give_way`], after a batch that was not computed: what the slot has is not known to be computed.
    fn begin_again(&mut self, job: u64) {
        if let Some(at) = self.slots.iter().position(|slot| slot.job == job) {
            let mut slot = self.slots.swap_remove(at);
            self.vacate(&mut slot);
            slot.leader = None;
            self.waiting.push_front(slot);
        }
    }

    /// After a token was chosen: sends what is new, and ends the slot where it is at its end.
    fn settle(&mut self, at: usize, outcome: Result<(), JobError>) {
        if let Err(error) = outcome {
            let slot = self.slots.swap_remove(at);
            let job = slot.job;
            self.keep(slot);
            self.fail(job, &error);
            return;
        }
        let slot = &mut self.slots[at];
        if slot.ended.is_some() {
            let slot = self.slots.swap_remove(at);
            self.finish(slot);
        } else if let Some(text) = slot.due(Instant::now()) {
            self.events.push(FromWorker::Delta { job: slot.job, text });
        }
    }

    fn finish(&mut self, mut slot: Slot) {
        let job = slot.job;
        let finished = slot.finish();
        if !slot.fresh.is_empty() {
            self.events.push(FromWorker::Delta {
                job,
                text: std::mem::take(&mut slot.fresh),
            });
        }
        self.keep(slot);
        self.events.push(FromWorker::Done { job, finished });
    }

    fn fail(&mut self, job: u64, error: &JobError) {
        self.events.push(FromWorker::Failed {
            job,
            code: error.code(),
            message: error.to_string(),
        });
    }

    /// llama.cpp could not compute the batch, and has put everything back as it was. For want of room (the account knows
    /// the cells of full attention, not those of sliding windows) nobody rests in the context any more, and the slots begin
    /// again, one fewer at a time; other failures are the requests'.
    fn undecodable(&mut self, error: DecodeError) {
        tracing::warn!("llama.cpp cannot decode: {error}");
        let crowded = self.slots.len() > 1 || !self.resting.is_empty();
        self.put_away(None);
        if error == DecodeError::NoRoom && crowded {
            let mut jobs: Vec<(u64, u64)> = self.slots.iter().map(|slot| (slot.order, slot.job)).collect();
            jobs.sort_unstable();
            for (_, job) in jobs.into_iter().rev() {
                self.begin_again(job);
            }
            self.most = self.most.saturating_sub(1).max(1);
            return;
        }
        for mut slot in std::mem::take(&mut self.slots) {
            self.vacate(&mut slot);
            let error = JobError::Llama(format!("llama.cpp cannot decode: {error}"));
            self.fail(slot.job, &error);
        }
    }
}
