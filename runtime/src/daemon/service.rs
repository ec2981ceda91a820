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
use crate::engine::{Finished, FromWorker, Job, ToWorker, sampler};
use crate::health::{self, Counters, State};
use crate::journal::table::{Bounds, Stage, Table};
use crate::journal::writer::{Committed, Writer};
use crate::journal::{Key, Record, StoredAnswer};
use crate::mqtt::{Ack, Event as LinkEvent, Incoming, Link, Outgoing};
use crate::queue::{Next, Queue, Waiting};
use crate::reply::{self, Author, Stream};
use crate::wire::{Envelope, ErrorCode, Request, Topics, request};
use crate::worker::{Event as WorkerEvent, Worker};

/// Requests that the worker has at a time.
const SLOTS: usize = 1;
/// Final answers that may wait for the broker's PUBACK at a time; the others wait in the table.
const WINDOW: usize = 32;
/// A request that has ended the worker this often is answered with an error.
const MOST_ATTEMPTS: u32 = 3;
/// The journal is written anew when it is this large and less than half of it counts.
const COMPACT_BYTES: u64 = 1024 * 1024;

/// One that the worker has.
struct Running {
    key: Key,
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
    last_number: u64,
    journal_bytes: u64,
    worker_pid: Option<u32>,
    loaded: bool,
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
            topics: Topics::new(&config.root, &config.device),
            bounds: Bounds {
                bytes: config.journal.bytes,
                age_ms: config.journal.answer_hours.saturating_mul(3_600_000),
            },
            author: Author {
                device: config.device.clone(),
                ..Author::default()
            },
            queue: Queue::new(config.limits.queue),
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
            last_number: 0,
            journal_bytes,
            worker_pid: None,
            loaded: false,
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

    fn message(&mut self, message: &Incoming) {
        if self.draining {
            // Not acknowledged: the broker gives it to the next daemon.
            return;
        }
        if message.retain {
            tracing::warn!(
                "a retained message on {} is ignored: a request must not be retained",
                message.topic
            );
            self.ack(message.ack);
        } else if message.topic == self.topics.cancel() {
            self.cancel(&message.payload);
            self.ack(message.ack);
        } else {
            self.request(message);
        }
    }

    fn request(&mut self, message: &Incoming) {
        let envelope = Envelope {
            payload: &message.payload,
            response_topic: message.response_topic.as_deref(),
            correlation: message.correlation.as_deref(),
            content_type: message.content_type.as_deref(),
            expiry_s: message.expiry_s,
        };
        let parsed = request::parse(
            &envelope,
            &self.topics,
            &self.config.reply.prefixes,
            &self.config.limits,
        );
        let mut request = match parsed {
            Ok(request) => Box::new(request),
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
                    Some(OnCommit::Accepted { acks, .. }) => acks.extend(message.ack),
                    _ => self.ack(message.ack),
                }
                return;
            }
            Some(Stage::Done(_) | Stage::Delivered(_)) => {
                self.counters.duplicates += 1;
                self.ack(message.ack);
                // An answer that is not yet safe follows when it is.
                if !self.accepting.contains_key(&key) {
                    self.unpublished.push_back((key, request.reply.correlation));
                    self.publish_answers();
                }
                return;
            }
            None => {}
        }
        if let Some((code, why)) = self.cannot_take() {
            let answer = reply::error(&request.reply, &request.id, code, why);
            self.refuse(message.ack, answer);
            return;
        }
        self.accept(key, request, message.ack);
    }

    fn accept(&mut self, key: Key, request: Box<Request>, ack: Option<Ack>) {
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
    fn cannot_take(&mut self) -> Option<(ErrorCode, String)> {
        if let Some(why) = &self.unloadable {
            return Some((ErrorCode::ModelUnavailable, why.clone()));
        }
        if self.queue.len() + self.accepting.len() >= self.config.limits.queue {
            return Some((
                ErrorCode::QueueFull,
                format!("{} requests wait", self.queue.len()),
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
        let epoch = ack?.epoch();
        if self.recognised.0 != epoch {
            self.recognised = (epoch, HashSet::new());
        }
        let known = &self.recognised.1;
        let key = self.table.entries().find_map(|(key, entry)| {
            let same = match &entry.stage {
                Stage::Accepted(request) => request.fingerprint.as_deref() == Some(fingerprint),
                Stage::Done(answer) | Stage::Delivered(answer) => {
                    answer.fingerprint.as_deref() == Some(fingerprint)
                }
            };
            (same && !known.contains(key)).then(|| key.clone())
        })?;
        self.recognised.1.insert(key.clone());
        Some(key)
    }

    /// Answers at once, without a trace in the journal: the same message would be refused again.
    fn refuse(&mut self, ack: Option<Ack>, answer: StoredAnswer) {
        self.counters.errors += 1;
        let token = self.number();
        let correlation = answer.reply.correlation.clone();
        if self
            .link
            .publish(reply::message(&self.author, &answer, correlation, token))
        {
            self.on_delivery.insert(token, OnDelivery::Nothing);
            self.ack(ack);
        }
        // Without room it is not acknowledged, and comes again in the next connection.
    }

    fn cancel(&mut self, payload: &[u8]) {
        let text = String::from_utf8_lossy(payload);
        let id = serde_json::from_str::<serde_json::Value>(&text)
            .ok()
            .and_then(|value| value.get("id").and_then(|id| id.as_str()).map(ToOwned::to_owned))
            .unwrap_or_else(|| text.trim().to_owned());
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

    /// The journal has put a batch on the disk, or has not.
    pub fn committed(&mut self, commit: Committed) {
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
                            self.refuse(Some(ack), answer.clone())
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
                self.counters.accepted += 1;
                acks.into_iter().for_each(|ack| self.ack(Some(ack)));
                self.queue.push(
                    Waiting {
                        key,
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

    /// Gives the worker what it can take.
    fn dispatch(&mut self) {
        while self.loaded && self.hashed && !self.draining && self.running.len() < SLOTS {
            let waiting = match self.queue.pop(Instant::now()) {
                None => return,
                Some(Next::Expired(waiting)) => {
                    self.fail(
                        &waiting.key,
                        ErrorCode::Expired,
                        "the deadline passed before the work began",
                    );
                    continue;
                }
                Some(Next::Run(waiting)) => waiting,
            };
            let Some(Stage::Accepted(request)) = self.table.stage(&waiting.key) else {
                continue;
            };
            let request = request.clone();
            let job = self.number();
            let frame = ToWorker::Run {
                job,
                request: Box::new(self.job(&request)),
            };
            if !self.worker.send(frame) {
                self.queue.push(waiting, request.priority);
                return;
            }
            let running = Running {
                stream: Stream::of(&request),
                key: waiting.key,
                request,
                since: waiting.since,
                began: Instant::now(),
                cancelled: false,
            };
            self.running.insert(job, running);
        }
    }

    fn job(&self, request: &Request) -> Job {
        let defaults = &self.config.sampling;
        let sampling = &request.sampling;
        Job {
            messages: request.messages.clone(),
            max_tokens: request.max_tokens,
            stop: request.stop.clone(),
            sampling: sampler::Settings {
                temperature: sampling.temperature.unwrap_or(defaults.temperature),
                top_p: sampling.top_p.unwrap_or(defaults.top_p),
                top_k: sampling.top_k.unwrap_or(defaults.top_k),
                min_p: sampling.min_p.unwrap_or(defaults.min_p),
                seed: sampling.seed,
            },
        }
    }

    /// Something happened in the worker.
    pub fn worker(&mut self, event: WorkerEvent) {
        match event {
            WorkerEvent::Started(pid) => {
                self.worker_pid = Some(pid);
                self.announce();
            }
            WorkerEvent::Ended { status } => self.worker_ended(&status),
            WorkerEvent::Frame(frame) => self.frame(frame),
        }
    }

    fn frame(&mut self, frame: FromWorker) {
        match frame {
            FromWorker::Ready(info) => {
                tracing::info!(
                    "model {} is loaded: {} {}, context {}, {} threads, {} ms",
                    info.name,
                    info.architecture,
                    info.quantisation,
                    info.context,
                    info.threads,
                    info.load_ms
                );
                self.author.model = info;
                self.loaded = true;
                self.unloadable = None;
                self.publish_card();
                self.announce();
                self.dispatch();
            }
            FromWorker::Unloadable { message } => {
                if self.unloadable.as_ref() != Some(&message) {
                    tracing::error!("{message}");
                    self.unloadable = Some(message);
                }
                self.announce();
            }
            FromWorker::Delta { job, text } => {
                if let Some(stream) = self
                    .running
                    .get_mut(&job)
                    .and_then(|running| running.stream.as_mut())
                {
                    stream.push(&text);
                }
                self.chunks();
            }
            FromWorker::Done { job, finished } => {
                if let Some(running) = self.running.remove(&job) {
                    self.finish(running, &finished);
                }
                self.dispatch();
            }
            FromWorker::Failed { job, code, message } => {
                if let Some(running) = self.running.remove(&job) {
                    self.fail(&running.key, code, &message);
                }
                self.dispatch();
            }
            FromWorker::Heartbeat => {}
        }
    }

    fn worker_ended(&mut self, status: &str) {
        self.worker_pid = None;
        self.loaded = false;
        if self.unloadable.is_none() {
            self.counters.worker_ends += 1;
            tracing::warn!("the worker ended ({status}); starting another");
        }
        let lost: Vec<Running> = self.running.drain().map(|(_, running)| running).collect();
        for running in lost {
            if running.cancelled {
                self.fail(&running.key, ErrorCode::Cancelled, "cancelled");
                continue;
            }
            let attempts = self.attempts.entry(running.key.clone()).or_insert(0);
            *attempts += 1;
            if *attempts >= MOST_ATTEMPTS {
                let message = format!("the engine failed {attempts} times on this request ({status})");
                self.fail(&running.key, ErrorCode::Internal, &message);
                continue;
            }
            // Its work had begun in time: the deadline is met.
            let waiting = Waiting {
                key: running.key,
                since: running.since,
                deadline: None,
            };
            self.queue
                .push(waiting, running.request.priority.saturating_add(1000));
        }
        self.announce();
    }

    fn finish(&mut self, running: Running, finished: &Finished) {
        self.counters.answered += 1;
        self.counters.prompt_tokens += u64::from(finished.prompt_tokens);
        self.counters.completion_tokens += u64::from(finished.completion_tokens);
        if finished.predicted_ms > 0.0 {
            self.counters.tokens_per_second =
                f64::from(finished.completion_tokens) * 1000.0 / finished.predicted_ms;
        }
        let queue_ms = (running.began - running.since).as_secs_f64() * 1000.0;
        let mut answer = reply::completion(&self.author, &running.request, finished, queue_ms);
        answer.fingerprint.clone_from(&running.request.fingerprint);
        tracing::info!(
            id = running.request.id,
            prompt_tokens = finished.prompt_tokens,
            completion_tokens = finished.completion_tokens,
            ms = (finished.prompt_ms + finished.predicted_ms).round(),
            "answered"
        );
        self.done(running.key, answer);
    }

    fn fail(&mut self, key: &Key, code: ErrorCode, message: &str) {
        let Some(Stage::Accepted(request)) = self.table.stage(key) else {
            return;
        };
        self.counters.errors += 1;
        let mut answer = reply::error(&request.reply, &request.id, code, message);
        answer.fingerprint.clone_from(&request.fingerprint);
        tracing::info!(id = request.id, code = code.as_str(), "not answered: {message}");
        self.done(key.clone(), answer);
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
        self.publish_answers();
        self.dispatch();
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
        let payload = health::status(&self.config.device, self.state, self.unloadable.as_deref());
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

    fn ack(&self, ack: Option<Ack>) {
        if let Some(ack) = ack {
            self.link.ack(ack);
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
