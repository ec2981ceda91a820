//! What the journal's records add up to: every request the device has promised to answer, and the answers it
//! keeps so that a request that comes again gets the same one.
//!
//! In: records, in order. Out: what is still to run, what is still to publish, what was answered before. Bounded
//! by bytes and by age; what is still owed to a client is never dropped.

use std::collections::{BTreeMap, HashMap};

use super::{Key, Record, StoredAnswer};
use crate::clock::elapsed_ms;
use crate::wire::Request;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes of requests and answers together.
    pub bytes: usize,
    /// Milliseconds that a delivered answer is kept for duplicates.
    pub age_ms: u64,
}

/// How far a request has come.
#[derive(Clone, Debug, PartialEq)]
pub enum Stage {
    /// It is to be run.
    Accepted(Box<Request>),
    /// It is to be published.
    Done(Box<StoredAnswer>),
    /// The broker has it; kept for duplicates.
    Delivered(Box<StoredAnswer>),
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Unix time in milliseconds of the last record.
    pub at: u64,
    /// How far it has come.
    pub stage: Stage,
    order: u64,
    bytes: usize,
}

/// Every request that is known.
#[derive(Debug, Default)]
pub struct Table {
    entries: HashMap<Key, Entry>,
    /// Arrival order, which is also the order of eviction and of a replay.
    order: BTreeMap<u64, Key>,
    next: u64,
    bytes: usize,
}

impl Table {
    /// The sum of `records`.
    pub fn from_records(records: Vec<Record>) -> Self {
        let mut table = Self::default();
        for record in records {
            table.apply(record);
        }
        table
    }

    /// Adds one record. Records about requests that are not known any more change nothing.
    pub fn apply(&mut self, record: Record) {
        match record {
            Record::Accepted { at, request } => {
                let key = request.key();
                // The first one counts.
                if !self.entries.contains_key(&key) {
                    self.put(key, at, Stage::Accepted(request));
                }
            }
            Record::Done { at, key, answer } => {
                // An entry that was answered keeps its answer.
                if !matches!(self.stage(&key), Some(Stage::Done(_) | Stage::Delivered(_))) {
                    self.put(key, at, Stage::Done(answer));
                }
            }
            Record::Delivered { key } => {
                if let Some(entry) = self.entries.get_mut(&key)
                    && let Stage::Done(answer) = &entry.stage
                {
                    entry.stage = Stage::Delivered(answer.clone());
                }
            }
            Record::Erased { key } => self.remove(&key),
        }
    }

    /// How far the request has come.
    pub fn stage(&self, key: &Key) -> Option<&Stage> {
        self.entries.get(key).map(|entry| &entry.stage)
    }

    /// Every entry in order of arrival.
    pub fn entries(&self) -> impl Iterator<Item = (&Key, &Entry)> {
        self.order
            .values()
            .filter_map(|key| self.entries.get(key).map(|entry| (key, entry)))
    }

    /// Bytes of requests and answers.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The shortest list of records that adds up to this table.
    pub fn records(&self) -> Vec<Record> {
        let mut records = Vec::new();
        for (key, entry) in self.entries() {
            match &entry.stage {
                Stage::Accepted(request) => {
                    records.push(Record::Accepted {
                        at: entry.at,
                        request: request.clone(),
                    });
                }
                Stage::Done(answer) => {
                    records.push(Record::Done {
                        at: entry.at,
                        key: key.clone(),
                        answer: answer.clone(),
                    });
                }
                Stage::Delivered(answer) => {
                    records.push(Record::Done {
                        at: entry.at,
                        key: key.clone(),
                        answer: answer.clone(),
                    });
                    records.push(Record::Delivered { key: key.clone() });
                }
            }
        }
        records
    }

    /// Drops delivered answers that are too old or more than fit, oldest first; returns their records. When
    /// what is left is still more than `bounds.bytes`, no more can be taken.
    pub fn evict(&mut self, bounds: Bounds, now: u64) -> Vec<Record> {
        let mut excess = self.bytes.saturating_sub(bounds.bytes);
        let mut victims = Vec::new();
        for (key, entry) in self.entries() {
            if !matches!(entry.stage, Stage::Delivered(_)) {
                continue;
            }
            if excess > 0 || elapsed_ms(entry.at, now) > bounds.age_ms {
                excess = excess.saturating_sub(entry.bytes);
                victims.push(key.clone());
            }
        }
        for key in &victims {
            self.remove(key);
        }
        victims.into_iter().map(|key| Record::Erased { key }).collect()
    }

    fn put(&mut self, key: Key, at: u64, stage: Stage) {
        let bytes = 128 + 2 * (key.0.len() + key.1.len()) + stage_bytes(&stage);
        self.bytes += bytes;
        if let Some(entry) = self.entries.get_mut(&key) {
            self.bytes -= entry.bytes;
            (entry.at, entry.stage, entry.bytes) = (at, stage, bytes);
            return;
        }
        let order = self.next;
        self.next += 1;
        self.order.insert(order, key.clone());
        self.entries.insert(
            key,
            Entry {
                at,
                stage,
                order,
                bytes,
            },
        );
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.order.remove(&entry.order);
            self.bytes -= entry.bytes;
        }
    }
}

fn stage_bytes(stage: &Stage) -> usize {
    match stage {
        Stage::Accepted(request) => request
            .messages
            .iter()
            .map(|message| message.content.len() + 16)
            .sum(),
        Stage::Done(answer) | Stage::Delivered(answer) => {
            answer.body.len()
                + answer.reply.topic.len()
                + answer.reply.correlation.as_ref().map_or(0, Vec::len)
        }
    }
}
