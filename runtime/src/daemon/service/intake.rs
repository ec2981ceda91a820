//! Intake: a message from the link becomes an accepted request, a repeated answer or a refusal.
//!
//! In: messages on the request and cancel topics. Out: records of accepted requests, refusals. A message is
//! acknowledged when its request is on the disk, or when it needs no more care.

use std::collections::HashSet;

use super::{OnCommit, Service, Unpublished};
use crate::clock::unix_ms;
use crate::engine::ToWorker;
use crate::fault;
use crate::journal::table::Stage;
use crate::journal::{Key, Record};
use crate::mqtt::{Ack, Incoming};
use crate::reply;
use crate::thermal::Step;
use crate::wire::{Cancel, Envelope, ErrorCode, Rejection, Reply, Request, Rules, Topics, request, topics};

impl Service {
    pub(super) fn message(&mut self, message: &Incoming) {
        if self.pool.as_ref().is_some_and(|pool| pool.has(&message.topic)) {
            return self.pool_message(message);
        }
        if self.draining {
            // Not acknowledged: the broker gives it to the next daemon.
            return;
        }
        if self.home_assistant_is_born(message) {
            return;
        }
        if message.retain {
            tracing::warn!(
                "a retained message on {} is ignored: a request must not be retained",
                message.topic
            );
            self.ack(message.ack);
        } else if let Some(verb) = self.topics.command_of(&message.topic) {
            let verb = verb.to_owned();
            self.command(message, &verb);
        } else if let Some(name) = self.topics.task_of(&message.topic) {
            let name = name.to_owned();
            self.task(message, &name);
        } else if message.topic == self.topics.cancel() {
            self.cancel(&message.payload);
            self.ack(message.ack);
        } else {
            self.request(message);
        }
    }

    fn request(&mut self, message: &Incoming) {
        let parsed = self.parse(message, &self.topics);
        self.parsed(parsed, message);
    }

    /// Reads a request that came on one of these topics.
    pub(super) fn parse(&self, message: &Incoming, topics: &Topics) -> Result<Request, Box<Rejection>> {
        let envelope = Envelope {
            payload: &message.payload,
            response_topic: message.response_topic.as_deref(),
            correlation: message.correlation.as_deref(),
            content_type: message.content_type.as_deref(),
            expiry_s: message.expiry_s,
        };
        request::parse(&envelope, &self.rules(topics, &self.config.reply.prefixes))
    }

    /// What requests must obey here.
    pub(super) fn rules<'a>(&'a self, topics: &'a Topics, prefixes: &'a [String]) -> Rules<'a> {
        Rules {
            topics,
            prefixes,
            limits: &self.config.limits,
            adapters: &self.adapters,
        }
    }

    /// A payload for a task becomes a request, whose answer is the bare text.
    fn task(&mut self, message: &Incoming, name: &str) {
        let task = self.tasks.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.tasks.keys().map(String::as_str).collect();
            format!("there is no task `{name}`; there are: {}", known.join(", "))
        });
        let text = std::str::from_utf8(&message.payload);
        let text = text.map_err(|error| format!("the payload is not UTF-8: {error}"));
        let mut prefixes = self.config.reply.prefixes.clone();
        let (body, reply_to) = match task.and_then(|task| Ok((task.request(text?), task.reply_to.clone()))) {
            Ok(made) => made,
            Err(why) => {
                let id = request::generated_id();
                let reply = Reply {
                    topic: self.topics.answer(&id),
                    correlation: message.correlation.clone(),
                    plain: false,
                };
                let answer = reply::error(&reply, &id, ErrorCode::InvalidRequest, why);
                return self.refuse(message.ack, answer);
            }
        };
        prefixes.extend(reply_to.clone());
        let envelope = Envelope {
            payload: &body,
            response_topic: message.response_topic.as_deref().or(reply_to.as_deref()),
            correlation: message.correlation.as_deref(),
            content_type: Some("application/json"),
            expiry_s: message.expiry_s,
        };
        let rules = self.rules(&self.topics, &prefixes);
        let parsed = request::parse(&envelope, &rules).map(|mut request| {
            request.reply.plain = true;
            request
        });
        self.parsed(parsed, message);
    }

    pub(super) fn parsed(&mut self, parsed: Result<Request, Box<Rejection>>, message: &Incoming) {
        let mut request = match parsed {
            Ok(request) => request,
            Err(rejection) => {
                let answer = reply::error(&rejection.reply, &rejection.id, rejection.code, rejection.message);
                self.refuse(message.ack, answer);
                return;
            }
        };
        if let (true, Some(fingerprint)) = (message.duplicate, &request.fingerprint)
            && let Some(key) = self.recognise(message.ack, fingerprint)
        {
            request.id.clone_from(&key.1);
        }
        self.take(request, message.ack);
    }

    /// A request that is as it must be: known already, refused for want of room, or accepted.
    pub(super) fn take(&mut self, request: Request, ack: Option<Ack>) {
        let key = request.key();
        match self.table.stage(&key) {
            Some(Stage::Accepted(_)) => {
                self.counters.duplicates += 1;
                // Safe already, or as soon as the first one is.
                match self
                    .accepting
                    .get(&key)
                    .and_then(|ticket| self.on_commit.get_mut(ticket))
                {
                    Some(OnCommit::Accepted { acks, .. }) => acks.extend(ack),
                    _ => self.ack(ack),
                }
                return;
            }
            Some(Stage::Done(_) | Stage::Delivered(_)) => {
                self.counters.duplicates += 1;
                // An answer that is not yet safe follows when it is. At QoS 0 nothing holds a flood back.
                let by_mqtt = !topics::is_at_door(&key.0);
                let flood = by_mqtt && ack.is_none() && self.unpublished.len() >= self.config.limits.queue;
                if flood || self.accepting.contains_key(&key) {
                    self.ack(ack);
                } else {
                    self.hand_over(Unpublished {
                        key,
                        correlation: request.reply.correlation,
                        ack,
                    });
                }
                return;
            }
            None => {}
        }
        if let Some((code, why)) = self.cannot_take(&key) {
            let answer = reply::error(&request.reply, &request.id, code, why);
            self.refuse(ack, answer);
            return;
        }
        self.accept(key, Box::new(request), ack);
    }

    fn accept(&mut self, key: Key, request: Box<Request>, ack: Option<Ack>) {
        fault::passed(fault::Point::AfterReceive);
        let record = Record::Accepted {
            at: unix_ms(),
            request,
        };
        self.table.apply(record.clone());
        let ticket = self.record(vec![record], true);
        self.on_commit.insert(
            ticket,
            OnCommit::Accepted {
                key: key.clone(),
                acks: ack.into_iter().collect(),
            },
        );
        self.accepting.insert(key, ticket);
    }

    /// Why no request can be taken now.
    pub(super) fn cannot_take(&mut self, key: &Key) -> Option<(ErrorCode, String)> {
        if let Some(why) = &self.unloadable {
            return Some((ErrorCode::ModelUnavailable, why.clone()));
        }
        if self.thermal.step() == Some(Step::Refuse) {
            return Some((
                ErrorCode::QueueFull,
                "the device is too hot to take more".to_owned(),
            ));
        }
        if self.queue.len() + self.accepting.len() >= self.config.limits.queue {
            return Some((
                ErrorCode::QueueFull,
                format!("{} requests wait", self.queue.len()),
            ));
        }
        let prefixes = &self.config.reply.prefixes;
        let client = self.topics.client(&key.0, prefixes);
        let coming = self.accepting.keys();
        let coming = coming.filter(|(topic, _)| self.topics.client(topic, prefixes) == client);
        let own = self.queue.of_client(&client) + coming.count();
        if own >= self.config.limits.client_queue {
            return Some((
                ErrorCode::QueueFull,
                format!("{own} requests of this client wait"),
            ));
        }
        if self.table.bytes() > self.bounds.bytes {
            self.evict();
        }
        (self.table.bytes() > self.bounds.bytes).then(|| {
            (
                ErrorCode::QueueFull,
                "the journal is full of requests and answers that are owed".to_owned(),
            )
        })
    }

    /// A message without an id that the broker sends again: the entry that it made the first time. Every entry is
    /// recognised once in a connection, so that two equal messages remain two.
    fn recognise(&mut self, ack: Option<Ack>, fingerprint: &str) -> Option<Key> {
        let (door, epoch) = (ack?.door(), ack?.epoch());
        let recognised = self.recognised.entry(door).or_default();
        if recognised.0 != epoch {
            *recognised = (epoch, HashSet::new());
        }
        let known = &recognised.1;
        let key = self.table.entries().find_map(|(key, entry)| {
            let same = match &entry.stage {
                Stage::Accepted(request) => request.fingerprint.as_deref() == Some(fingerprint),
                Stage::Done(answer) | Stage::Delivered(answer) => {
                    answer.fingerprint.as_deref() == Some(fingerprint)
                }
            };
            (same && !known.contains(key)).then(|| key.clone())
        })?;
        recognised.1.insert(key.clone());
        Some(key)
    }

    pub(super) fn cancel(&mut self, payload: &[u8]) {
        let Some(Cancel { id }) = Cancel::parse(payload) else {
            tracing::debug!(
                "a message on {} that is no cancel is ignored",
                self.topics.cancel()
            );
            return;
        };
        let keys: Vec<Key> = self
            .table
            .entries()
            .filter(|(key, entry)| key.1 == id && matches!(entry.stage, Stage::Accepted(_)))
            .map(|(key, _)| key.clone())
            .collect();
        for key in keys {
            if let Some((&job, running)) = self.running.iter_mut().find(|(_, running)| running.key == key) {
                running.cancelled = true;
                // Lost only when the worker has ended; then it is cancelled there.
                self.worker.send(ToWorker::Cancel { job });
            } else {
                self.queue.cancel(&key);
                self.fail(&key, ErrorCode::Cancelled, "cancelled");
            }
        }
    }
}
