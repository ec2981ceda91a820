//! The door: programs that ask without a broker, and wait on a connection of their own (HTTP).
//!
//! In: [`Event`]s of the door's connections. Out: [`Said`]. Their requests go the way of every other one, through journal
//! and queue; only where the answer goes is different: to whoever waits for it here. Who stops to wait is not owed an
//! answer: the request is taken back, and nothing of it stays. After a restart nobody waits any more; a request that
//! brought its own id is run all the same, because its client can ask for it again.

use std::collections::HashMap;

use tokio::sync::{mpsc, oneshot};

use super::{OnCommit, Service};
use crate::journal::table::Stage;
use crate::journal::{Key, Record, StoredAnswer};
use crate::reply;
use crate::wire::{Card, Chunk, Envelope, ErrorCode, Metrics, Reply, Request, Status, request, topics};

/// What the door's connections bring.
#[derive(Debug)]
pub enum Event {
    /// A request.
    Ask(Ask),
    /// Somebody wants to see what the device says of itself.
    Look(oneshot::Sender<View>),
}

/// A request at the door.
#[derive(Debug)]
pub struct Ask {
    /// The JSON of the wire.
    pub body: Vec<u8>,
    /// What its id is made of when the body names none.
    pub id: Option<Vec<u8>>,
    /// Who asks, as far as fairness goes: an id of the wire.
    pub client: Option<String>,
    /// Who waits; dropped when they go.
    pub tell: mpsc::UnboundedSender<Said>,
}

/// What is said to who waits. There is as much of it as an answer has tokens, at most.
#[derive(Clone, Debug)]
pub enum Said {
    /// A piece.
    Chunk(Chunk),
    /// The final answer.
    Answer(Box<StoredAnswer>),
}

/// What the device says of itself.
#[derive(Clone, Debug)]
pub struct View {
    /// What it is doing.
    pub status: Status,
    /// What it is and serves.
    pub card: Card,
    /// Its figures.
    pub metrics: Metrics,
}

/// Who waits at the door, and for what.
#[derive(Debug, Default)]
pub(super) struct Askers {
    waiting: HashMap<Key, Vec<mpsc::UnboundedSender<Said>>>,
}

impl Askers {
    /// A piece of the answer that is being made.
    pub(super) fn chunk(&self, key: &Key, chunk: &Chunk) {
        for tell in self.waiting.get(key).into_iter().flatten() {
            // Who has gone is noticed at the next tick.
            let _ = tell.send(Said::Chunk(chunk.clone()));
        }
    }

    /// The final answer.
    fn answer(&mut self, key: &Key, answer: &StoredAnswer) {
        for tell in self.waiting.remove(key).into_iter().flatten() {
            let _ = tell.send(Said::Answer(Box::new(answer.clone())));
        }
    }

    /// An answer that the journal does not keep.
    pub(super) fn refuse(&mut self, answer: &StoredAnswer) {
        let id = serde_json::from_str::<crate::wire::ErrorAnswer>(&answer.body).map(|error| error.id);
        self.answer(&(answer.reply.topic.clone(), id.unwrap_or_default()), answer);
    }

    /// What they wait for is no more.
    pub(super) fn erased(&mut self, key: &Key) {
        let why = "the request was erased";
        self.answer(
            key,
            &reply::error(&place(&key.0), &key.1, ErrorCode::Cancelled, why),
        );
    }

    /// Keys that nobody waits for any more; they are taken out.
    fn left(&mut self) -> Vec<Key> {
        let mut left = Vec::new();
        self.waiting.retain(|key, tell| {
            tell.retain(|tell| !tell.is_closed());
            if tell.is_empty() {
                left.push(key.clone());
            }
            !tell.is_empty()
        });
        left
    }
}

/// Where an answer at the door goes.
fn place(topic: &str) -> Reply {
    Reply {
        topic: topic.to_owned(),
        correlation: None,
        plain: false,
    }
}

impl Service {
    /// Something happened at the door.
    pub fn door(&mut self, event: Event) {
        match event {
            Event::Ask(ask) => self.ask(ask),
            Event::Look(tell) => {
                let view = View {
                    status: self.status(),
                    card: self.card(),
                    metrics: self.metrics(),
                };
                let _ = tell.send(view);
            }
        }
    }

    fn ask(&mut self, ask: Ask) {
        let topic = topics::at_door(ask.client.as_deref());
        let (id, parsed) = self.read(&ask);
        let refused = match parsed {
            Err(refused) => Err(refused),
            Ok(_) if self.draining => Err((ErrorCode::QueueFull, "the device is being stopped".to_owned())),
            Ok(request) => Ok(request),
        };
        match refused {
            Ok(mut request) => {
                request.reply = place(&topic);
                let waiting = self.askers.waiting.entry(request.key()).or_default();
                waiting.push(ask.tell);
                self.take(request, None);
            }
            Err((code, why)) => {
                self.counters.errors += 1;
                let answer = reply::error(&place(&topic), &id, code, why);
                let _ = ask.tell.send(Said::Answer(Box::new(answer)));
            }
        }
    }

    /// The request and its id, or why it is none.
    fn read(&self, ask: &Ask) -> (String, Result<Request, (ErrorCode, String)>) {
        let envelope = Envelope {
            payload: &ask.body,
            correlation: ask.id.as_deref(),
            content_type: Some("application/json"),
            ..Envelope::default()
        };
        let rules = self.rules(&self.topics, &self.config.reply.prefixes);
        match request::parse(&envelope, &rules) {
            Err(rejection) => (rejection.id, Err((rejection.code, rejection.message))),
            Ok(request) if request.reply.topic != self.topics.answer(&request.id) => {
                let why = "`reply_to`: the answer goes to who asks on this connection";
                (request.id, Err((ErrorCode::InvalidRequest, why.to_owned())))
            }
            Ok(request) => (request.id.clone(), Ok(request)),
        }
    }

    /// Gives the answer of the journal to who waits for it. When nobody does, it is kept for who asks again.
    pub(super) fn answer_askers(&mut self, key: Key) {
        if let Some(Stage::Done(answer) | Stage::Delivered(answer)) = self.table.stage(&key) {
            self.askers.answer(&key, answer);
        }
        self.mark_delivered(key);
    }

    /// Takes back what nobody waits for any more.
    pub(super) fn look_after_askers(&mut self) {
        for key in self.askers.left() {
            if matches!(self.table.stage(&key), Some(Stage::Accepted(_))) {
                tracing::info!(id = key.1, "who asked has gone: it is taken back");
                self.forget(&key);
                self.write_off(vec![Record::Erased { key }]);
            }
        }
    }

    /// After a restart: connections of before are gone.
    pub(super) fn close_old_door(&mut self) {
        let at_door = self.table.entries().filter(|(key, _)| topics::is_at_door(&key.0));
        let records: Vec<Record> = at_door
            .filter_map(|(key, entry)| {
                let key = key.clone();
                match &entry.stage {
                    // Nobody knows the id that was made for it.
                    Stage::Accepted(request) if request.fingerprint.is_some() => Some(Record::Erased { key }),
                    Stage::Done(_) => Some(Record::Delivered { key }),
                    Stage::Accepted(_) | Stage::Delivered(_) => None,
                }
            })
            .collect();
        for record in &records {
            self.table.apply(record.clone());
        }
        self.write_off(records);
    }

    /// Records that need not be on the disk before anything else happens.
    fn write_off(&mut self, records: Vec<Record>) {
        if !records.is_empty() {
            let ticket = self.record(records, false);
            self.on_commit.insert(ticket, OnCommit::Nothing);
        }
    }
}
