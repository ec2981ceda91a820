//! The service: every request's way from the link to its answer.
//!
//! In: what happens on link, journal and worker. Out: messages, records, frames. Nothing here waits, so nothing
//! here can be stuck. A request goes through these steps, and a crash between any two of them loses nothing:
//!
//! ```text
//! receive → check → known? → accept (record, fdatasync) → PUBACK → queue → run → done (record, fdatasync)
//!         → publish (QoS 1) → PUBACK of the broker → delivered (record)
//! ```

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::clock::unix_ms;
use crate::config::Config;
use crate::health::{self, Counters, State};
use crate::journal::table::{Bounds, Stage, Table};
use crate::journal::writer::{Committed, Writer};
use crate::journal::{Key, Record, StoredAnswer};
use crate::mqtt::{Ack, Event as LinkEvent, Link, Outgoing};
use crate::queue::{Queue, Waiting};
use crate::reply::{self, Author, Stream};
use crate::wire::{ErrorCode, Request, Topics};
use crate::worker::Worker;

mod intake;
mod work;

/// Requests that the worker has besides those under way, so that it goes on without a pause, and sees which of them
/// begin alike.
const AHEAD: usize = 2;
/// Final answers that may wait for the broker's PUBACK at a time; the others wait in the table.
const WINDOW: usize = 32;
/// Refusals that may wait for a PUBACK; beyond it they go out at QoS 0, so that a flood of bad requests takes no memory.
const REFUSALS: usize = 128;
/// A request that has ended the worker this often is answered with an error.
const MOST_ATTEMPTS: u32 = 3;
/// The journal is written anew when it is this large and less than half of it counts.
const COMPACT_BYTES: u64 = 1024 * 1024;

/// One that the worker has.
struct Running {
    key: Key,
    client: String,
    request: Box<Request>,
    since: Instant,
    began: Instant,
    stream: Option<Stream>,
    cancelled: bool,
}

/// What a commit of the journal is waited for.
enum OnCommit {
    Accepted { key: Key, acks: Vec<Ack> },
    Done { key: Key, correlation: Option<Vec<u8>> },
    Nothing,
}

/// What a PUBACK of the broker means.
enum OnDelivery {
    Answer(Key),
    Nothing,
}

/// All state of the daemon.
pub struct Service {
    config: Config,
    /// Names of the configured LoRA adapters.
    adapters: Vec<String>,
    topics: Topics,
    bounds: Bounds,
    link: Link,
    writer: Writer,
    worker: Worker,
    author: Author,
    table: Table,
    queue: Queue,
    running: HashMap<u64, Running>,
    /// How often each request has ended the worker.
    attempts: HashMap<Key, u32>,
    on_commit: HashMap<u64, OnCommit>,
    /// Tickets by key, for a duplicate that comes before the commit.
    accepting: HashMap<Key, u64>,
    on_delivery: HashMap<u64, OnDelivery>,
    /// Final answers that have not been given to the link yet, with the Correlation Data to echo.
    unpublished: VecDeque<(Key, Option<Vec<u8>>)>,
    /// Entries that a redelivered message without an id was recognised as, in this epoch.
    recognised: (u64, HashSet<Key>),
    /// Acknowledgements that found no room in the link.
    acks: VecDeque<Ack>,
    last_number: u64,
    journal_bytes: u64,
    worker_pid: Option<u32>,
    loaded: bool,
    /// The model was unloaded because nobody asked.
    asleep: bool,
    /// When somebody last did.
    active: Instant,
    hashed: bool,
    unloadable: Option<String>,
    connected: bool,
    link_reason: Option<String>,
    state: State,
    announced: Option<State>,
    draining: bool,
    counters: Counters,
    started: Instant,
    last_metrics: Instant,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service")
            .field("state", &self.state)
            .field("waiting", &self.queue.len())
            .finish_non_exhaustive()
    }
}

impl Service {
    /// A service that has not yet looked at its journal.
    pub fn new(
        config: Config,
        table: Table,
        journal_bytes: u64,
        link: Link,
        writer: Writer,
        worker: Worker,
    ) -> Self {
        Self {
            adapters: config.adapters.keys().cloned().collect(),
            topics: Topics::new(&config.root, &config.device),
            bounds: Bounds {
                bytes: config.journal.bytes,
                age_ms: config.journal.answer_hours.saturating_mul(3_600_000),
            },
            author: Author {
                device: config.device.clone(),
                ..Author::default()
            },
            queue: Queue::default(),
            link,
            writer,
            worker,
            table,
            running: HashMap::new(),
            attempts: HashMap::new(),
            on_commit: HashMap::new(),
            accepting: HashMap::new(),
            on_delivery: HashMap::new(),
            unpublished: VecDeque::new(),
            recognised: (0, HashSet::new()),
            acks: VecDeque::new(),
            last_number: 0,
            journal_bytes,
            worker_pid: None,
            loaded: false,
            asleep: false,
            active: Instant::now(),
            hashed: false,
            unloadable: None,
            connected: false,
            link_reason: None,
            state: State::Online,
            announced: None,
            draining: false,
            counters: Counters::default(),
            started: Instant::now(),
            last_metrics: Instant::now(),
            config,
        }
    }

    /// Takes up what the journal says is still owed.
    pub fn replay(&mut self) {
        let now_ms = unix_ms();
        let now = Instant::now();
        for (key, entry) in self.table.entries() {
            match &entry.stage {
                Stage::Accepted(request) => {
                    // What has passed since; on a clock that went back, nothing has.
                    let passed = now_ms.saturating_sub(entry.at);
                    let deadline = request.deadline_ms.map(|most| {
                        now + Duration::from_millis(most.saturating_sub(passed).min(u64::from(u32::MAX)))
                    });
                    let waiting = Waiting {
                        key: key.clone(),
                        client: self.topics.client(&key.0, &self.config.reply.prefixes),
                        since: now,
                        deadline,
                    };
                    self.queue.push(waiting, request.priority);
                }
                Stage::Done(answer) => {
                    self.unpublished
                        .push_back((key.clone(), answer.reply.correlation.clone()));
                }
                Stage::Delivered(_) => {}
            }
        }
        if !self.queue.is_empty() || !self.unpublished.is_empty() {
            tracing::info!(
                "journal: {} requests to run again, {} answers to publish again",
                self.queue.len(),
                self.unpublished.len()
            );
        }
    }

    /// Something happened on the link.
    pub fn link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Connected { epoch } => {
                tracing::info!("connected to the broker");
                self.connected = true;
                self.link_reason = None;
                self.recognised = (epoch, HashSet::new());
                self.announced = None;
                self.announce();
                if self.loaded {
                    self.publish_card();
                }
                self.publish_answers();
            }
            LinkEvent::Disconnected { reason } => {
                self.connected = false;
                // Once for each reason: a broker may be away for days.
                if self.link_reason.as_ref() != Some(&reason) {
                    tracing::warn!("no connection to the broker: {reason}; trying again");
                    self.link_reason = Some(reason);
                }
            }
            LinkEvent::Message(message) => self.message(&message),
            LinkEvent::Delivered { token, refused } => self.delivered(token, refused.as_deref()),
        }
    }

    /// The journal has put a batch on the disk, or has not.
    pub fn committed(&mut self, commit: &Committed) {
        self.journal_bytes = commit.file_bytes;
        let Some(what) = self.on_commit.remove(&commit.ticket) else {
            return;
        };
        if let Some(error) = &commit.error {
            tracing::error!("{error}");
        }
        match what {
            OnCommit::Accepted { key, acks } => {
                self.accepting.remove(&key);
                let Some(Stage::Accepted(request)) = self.table.stage(&key) else {
                    // Cancelled in the meantime.
                    acks.into_iter().for_each(|ack| self.ack(Some(ack)));
                    return;
                };
                if commit.error.is_some() {
                    let answer = reply::error(
                        &request.reply,
                        &request.id,
                        ErrorCode::QueueFull,
                        "the device cannot write its journal",
                    );
                    self.table.apply(Record::Erased { key });
                    for (at, ack) in acks.into_iter().enumerate() {
                        if at == 0 {
                            self.refuse(Some(ack), &answer)
                        } else {
                            self.ack(Some(ack))
                        }
                    }
                    return;
                }
                let now = Instant::now();
                let deadline = request
                    .deadline_ms
                    .map(|most| now + Duration::from_millis(most.min(u64::from(u32::MAX))));
                let priority = request.priority;
                let client = self.topics.client(&key.0, &self.config.reply.prefixes);
                self.counters.accepted += 1;
                acks.into_iter().for_each(|ack| self.ack(Some(ack)));
                self.queue.push(
                    Waiting {
                        key,
                        client,
                        since: now,
                        deadline,
                    },
                    priority,
                );
                self.dispatch();
            }
            OnCommit::Done { key, correlation } => {
                // When the disk is full the answer goes out all the same; it cannot be repeated after a restart.
                self.accepting.remove(&key);
                self.unpublished.push_back((key, correlation));
                self.publish_answers();
            }
            OnCommit::Nothing => {}
        }
    }

    /// Writes the answer down; it is published when it is safe.
    fn done(&mut self, key: Key, answer: StoredAnswer) {
        self.attempts.remove(&key);
        let correlation = answer.reply.correlation.clone();
        let record = Record::Done {
            at: unix_ms(),
            key: key.clone(),
            answer: Box::new(answer),
        };
        self.table.apply(record.clone());
        let ticket = self.record(vec![record], true);
        self.on_commit.insert(
            ticket,
            OnCommit::Done {
                key: key.clone(),
                correlation,
            },
        );
        self.accepting.entry(key).or_insert(ticket);
    }

    /// Gives final answers to the link, as many as the window allows.
    fn publish_answers(&mut self) {
        while self.connected && self.on_delivery.len() < WINDOW {
            let Some((key, correlation)) = self.unpublished.pop_front() else {
                return;
            };
            let (Some(Stage::Done(answer)) | Some(Stage::Delivered(answer))) = self.table.stage(&key) else {
                continue;
            };
            let token = self.last_number + 1;
            if !self
                .link
                .publish(reply::message(&self.author, answer, correlation.clone(), token))
            {
                self.unpublished.push_front((key, correlation));
                return;
            }
            self.last_number = token;
            self.on_delivery.insert(token, OnDelivery::Answer(key));
        }
    }

    fn delivered(&mut self, token: u64, refused: Option<&str>) {
        let Some(OnDelivery::Answer(key)) = self.on_delivery.remove(&token) else {
            return;
        };
        if let Some(reason) = refused {
            tracing::warn!(id = key.1, "the broker refuses the answer on {}: {reason}", key.0);
        }
        if matches!(self.table.stage(&key), Some(Stage::Done(_))) {
            let record = Record::Delivered { key };
            self.table.apply(record.clone());
            // A power cut before the next sync publishes the answer a second time; nothing is lost.
            let ticket = self.record(vec![record], false);
            self.on_commit.insert(ticket, OnCommit::Nothing);
        }
        self.publish_answers();
    }

    /// When the next chunk is due.
    pub fn chunk_due(&self) -> Option<Instant> {
        self.running
            .values()
            .filter_map(|running| running.stream.as_ref()?.due())
            .min()
    }

    /// Publishes the chunks that are due.
    pub fn chunks(&mut self) {
        let now = Instant::now();
        for running in self.running.values_mut() {
            if let Some(message) = running
                .stream
                .as_mut()
                .and_then(|stream| stream.take(&self.author, now))
            {
                // Lost when there is no room: the final answer has it all.
                self.link.publish(message);
            }
        }
    }

    /// The model's hash is known.
    pub fn hashed(&mut self, sha256: String) {
        self.author.sha256 = sha256;
        self.hashed = true;
        self.identify();
        if self.loaded {
            self.publish_card();
        }
        self.announce();
        self.dispatch();
    }

    /// Four times a second: what is due by the clock.
    pub fn tick(&mut self) {
        for waiting in self.queue.expired(Instant::now()) {
            self.fail(
                &waiting.key,
                ErrorCode::Expired,
                "the deadline passed before the work began",
            );
        }
        self.ack(None);
        self.publish_answers();
        self.dispatch();
        self.sleep_when_idle();
        self.evict();
        if self.journal_bytes > COMPACT_BYTES && self.journal_bytes > 3 * self.table.bytes() as u64 {
            self.writer.compact(self.table.records());
            // Known exactly after the next commit.
            self.journal_bytes = 0;
        }
        let interval = Duration::from_secs(self.config.metrics.interval_s);
        if self.connected && !interval.is_zero() && self.last_metrics.elapsed() >= interval {
            self.last_metrics = Instant::now();
            let payload = health::metrics(
                &self.counters,
                self.started,
                self.queue.len(),
                self.running.len(),
                self.journal_bytes,
                self.worker_pid,
            );
            let topic = self.topics.metrics();
            self.link.publish(Outgoing {
                topic,
                payload,
                content_type: Some("application/json"),
                ..Outgoing::default()
            });
        }
    }

    fn evict(&mut self) {
        let erased = self.table.evict(self.bounds, unix_ms());
        if !erased.is_empty() {
            let ticket = self.record(erased, false);
            self.on_commit.insert(ticket, OnCommit::Nothing);
        }
    }

    /// A line for people.
    pub fn state_line(&self) -> &'static str {
        match (self.state, self.connected) {
            (State::Ready, true) => "ready",
            (State::Ready, false) => "ready, but no connection to the broker",
            (State::Degraded, _) => "no model can be loaded",
            _ if self.asleep => "the model is unloaded until somebody asks",
            _ => "loading the model",
        }
    }

    /// Takes no more requests and begins no more work.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
            && self.on_commit.is_empty()
            && (!self.connected || self.on_delivery.is_empty())
    }

    /// Says goodbye and stops worker, journal and link. What is not finished stays in the journal.
    pub async fn stop(self, events: &mut mpsc::Receiver<LinkEvent>) {
        let Self {
            link,
            writer,
            worker,
            topics,
            config,
            connected,
            mut last_number,
            ..
        } = self;
        if connected {
            last_number += 1;
            link.publish(Outgoing {
                topic: topics.status(),
                payload: health::status(&config.device, State::Offline, Some("stopped")),
                retain: true,
                token: Some(last_number),
                content_type: Some("application/json"),
                ..Outgoing::default()
            });
            let said = async {
                while let Some(event) = events.recv().await {
                    if matches!(event, LinkEvent::Delivered { token, .. } if token == last_number) {
                        break;
                    }
                }
            };
            let _ = tokio::time::timeout(Duration::from_secs(1), said).await;
            link.close().await;
        }
        worker.stop().await;
        drop(writer);
    }

    fn announce(&mut self) {
        self.state = if self.loaded && self.hashed {
            State::Ready
        } else if self.unloadable.is_some() {
            State::Degraded
        } else if self.worker_pid.is_some() {
            State::Loading
        } else {
            State::Online
        };
        if !self.connected || self.announced == Some(self.state) {
            return;
        }
        let idle = self.asleep.then_some("the model is unloaded until somebody asks");
        let reason = self.unloadable.as_deref().or(idle);
        let payload = health::status(&self.config.device, self.state, reason);
        if self.retain(self.topics.status(), payload) {
            self.announced = Some(self.state);
        }
    }

    fn publish_card(&mut self) {
        if self.connected {
            self.retain(self.topics.card(), health::card(&self.config, &self.author));
        }
    }

    fn retain(&mut self, topic: String, payload: Vec<u8>) -> bool {
        let token = self.number();
        let given = self.link.publish(Outgoing {
            topic,
            payload,
            retain: true,
            token: Some(token),
            content_type: Some("application/json"),
            ..Outgoing::default()
        });
        if given {
            self.on_delivery.insert(token, OnDelivery::Nothing);
        }
        given
    }

    /// Acknowledges a message now or, when the link has no room, at the next tick: the ones after it wait for it.
    fn ack(&mut self, ack: Option<Ack>) {
        self.acks.extend(ack);
        while let Some(&ack) = self.acks.front()
            && self.link.ack(ack)
        {
            self.acks.pop_front();
        }
    }

    fn record(&mut self, records: Vec<Record>, sync: bool) -> u64 {
        let ticket = self.number();
        self.writer.append(ticket, records, sync);
        ticket
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }
}
