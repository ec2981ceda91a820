//! The service: every request's way from the link to its answer.
//!
//! In: what happens on link, journal and worker. Out: messages, records, frames. Nothing here waits, so nothing
//! here can be stuck. A request goes through these steps, and a crash between any two of them loses nothing:
//!
//! ```text
//! receive → check → known? → accept (record, fdatasync) → PUBACK → queue → run → done (record, fdatasync)
//!         → publish (QoS 1) → PUBACK of the broker → delivered (record)
//! ```

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::clock::{elapsed_ms, unix_ms};
use crate::config::Config;
use crate::energy::Meter;
use crate::fault;
use crate::health::{self, Counters, State};
use crate::journal::table::{Bounds, Stage, Table};
use crate::journal::writer::{Committed, Writer};
use crate::journal::{Key, Record, StoredAnswer};
use crate::mqtt::{Ack, Door, Event as LinkEvent, Link, Outgoing};
use crate::queue::{Queue, Waiting};
use crate::reply::{self, Author, Stream};
use crate::task::Task;
use crate::thermal::Thermal;
use crate::transcript::Transcript;
use crate::wire::{ErrorCode, Request, Topics, topics};
use crate::worker::Worker;

mod acks;
mod answers;
mod commands;
pub mod door;
mod erase;
mod home_assistant;
mod intake;
pub mod models;
pub mod pool;
mod presence;
mod work;

use door::Askers;
use home_assistant::Shown;
use models::Models;
use pool::{Held, Pool};

/// Requests that the worker has besides those under way, so that it goes on without a pause, and sees which of them
/// begin alike.
const AHEAD: usize = 2;
/// Final answers that may wait for the broker's PUBACK at a time; the others wait in the table.
const WINDOW: usize = 32;
/// Refusals that may wait for a PUBACK. What they refuse is acknowledged when the link has them, and not before: so
/// the broker holds a flood back, and it takes no memory here.
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
    /// `None` while the worker has it and no slot for it.
    began: Option<Instant>,
    stream: Option<Stream>,
    cancelled: bool,
    /// It was ended because it took too long.
    late: bool,
    /// Its share of what was drawn since it began; `None` where nobody knows.
    energy_j: Option<f64>,
}

/// What a commit of the journal is waited for.
enum OnCommit {
    Accepted {
        key: Key,
        acks: Vec<Ack>,
    },
    Done {
        key: Key,
        correlation: Option<Vec<u8>>,
    },
    /// The journal was written anew for an erasure.
    Erased,
    Nothing,
}

/// A final answer that the link has not taken yet.
struct Unpublished {
    key: Key,
    /// The Correlation Data to echo.
    correlation: Option<Vec<u8>>,
    /// The request that came again and asks for it; acknowledged when the link has the answer.
    ack: Option<Ack>,
}

/// What a PUBACK of the broker means.
enum OnDelivery {
    Answer(Key),
    /// A request of the pool that was given to another member.
    Handed(Box<Held>),
    /// The names of what was fetched from a member's session.
    Listed,
    /// Something was taken back from Home Assistant, under this topic.
    Hidden(String),
    /// The broker retains nothing on a topic any more, for an erasure.
    Emptied,
    Nothing,
}

/// All state of the daemon.
pub struct Service {
    config: Config,
    /// Names of the LoRA adapters.
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
    unpublished: VecDeque<Unpublished>,
    /// Final answers that the disk had no room for, with the Correlation Data to echo. They are published when they
    /// are written: one that went out before could be followed by another one after a restart.
    unwritten: Vec<(Key, Option<Vec<u8>>)>,
    /// Whether the last write of the journal failed.
    unwritable: bool,
    /// Refusals that the link has not taken yet, and what is acknowledged then.
    refusals: VecDeque<(Option<Ack>, StoredAnswer)>,
    /// Refusals that wait for their PUBACK.
    refusing: HashSet<u64>,
    /// Entries that a redelivered message without an id was recognised as, by door, in this epoch.
    recognised: HashMap<Door, (u64, HashSet<Key>)>,
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
    thermal: Thermal,
    /// When the worker last said anything.
    heard: Instant,
    models: Models,
    state_folder: PathBuf,
    transcript: Transcript,
    tasks: BTreeMap<String, Task>,
    erasing: Option<erase::Erasing>,
    pool: Option<Pool>,
    askers: Askers,
    shown: Shown,
    meter: Option<Meter>,
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
        (models, adapters, tasks): (Models, Vec<String>, BTreeMap<String, Task>),
    ) -> Self {
        Self {
            adapters,
            transcript: Transcript::of(models.state(), config.content.hours),
            state_folder: models.state().to_owned(),
            erasing: None,
            pool: None,
            askers: Askers::default(),
            shown: Shown::of(models.state()),
            meter: None,
            models,
            tasks,
            topics: Topics::new(&config.root, &config.device),
            bounds: Bounds {
                bytes: config.journal.bytes,
                age_ms: config.journal.answer_hours.saturating_mul(3_600_000),
            },
            author: Author {
                device: config.device.clone(),
                disclosure: config.reply.disclosure.clone(),
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
            unwritten: Vec::new(),
            unwritable: false,
            refusals: VecDeque::new(),
            refusing: HashSet::new(),
            recognised: HashMap::new(),
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
            thermal: Thermal::default(),
            heard: Instant::now(),
            config,
        }
    }

    /// Measures energy from now on.
    pub fn measure_with(&mut self, meter: Option<Meter>) {
        self.meter = meter;
    }

    /// Takes up what the journal says is still owed.
    pub fn replay(&mut self) {
        self.resume_order();
        self.close_old_door();
        let now_ms = unix_ms();
        let now = Instant::now();
        for (key, entry) in self.table.entries() {
            match &entry.stage {
                Stage::Accepted(request) => {
                    let passed = elapsed_ms(entry.at, now_ms);
                    let deadline = request.deadline_ms.map(|most| {
                        now + Duration::from_millis(most.saturating_sub(passed).min(u64::from(u32::MAX)))
                    });
                    let waiting = Waiting {
                        key: key.clone(),
                        client: self.topics.client(&key.0, &self.config.reply.prefixes),
                        since: now,
                        deadline,
                    };
                    match &mut self.pool {
                        Some(pool) if request.from_pool => pool.leave_in_doubt(waiting, request),
                        _ => self.queue.push(waiting, request.priority),
                    }
                }
                Stage::Done(answer) => {
                    self.unpublished.push_back(Unpublished {
                        key: key.clone(),
                        correlation: answer.reply.correlation.clone(),
                        ack: None,
                    });
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
                self.recognised.insert(Door::Own, (epoch, HashSet::new()));
                self.announced = None;
                self.announce();
                self.hide_from_home_assistant();
                match self.loaded {
                    true => self.publish_card(),
                    false => self.show_to_home_assistant(),
                }
                self.publish_answers();
            }
            LinkEvent::Disconnected { reason } => {
                self.connected = false;
                // They come again.
                self.refusals.retain(|(ack, _)| ack.is_some());
                self.forget_unacknowledged(Door::Own);
                // Once for each reason: a broker may be away for days.
                if self.link_reason.as_ref() != Some(&reason) {
                    tracing::warn!("no connection to the broker: {reason}; trying again");
                    self.link_reason = Some(reason);
                }
            }
            LinkEvent::Message(message) => self.message(&message),
            LinkEvent::Delivered { token, delivery } => self.delivered(token, &delivery),
        }
    }

    /// The journal has put a batch on the disk, or has not.
    pub fn committed(&mut self, commit: &Committed) {
        self.journal_bytes = commit.file_bytes;
        let Some(what) = self.on_commit.remove(&commit.ticket) else {
            return;
        };
        // Once, and not for every request: a disk may be full for days.
        match &commit.error {
            Some(error) if !self.unwritable => tracing::error!("{error}"),
            None if self.unwritable => tracing::info!("the journal can be written again"),
            _ => {}
        }
        self.unwritable = commit.error.is_some();
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
                    // At QoS 0 there is nothing to acknowledge, and still something to say.
                    let mut acks = acks.into_iter();
                    self.refuse(acks.next(), answer);
                    acks.for_each(|ack| self.ack(Some(ack)));
                    return;
                }
                fault::passed(fault::Point::AfterJournal);
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
                if commit.error.is_some() {
                    self.unwritten.push((key, correlation));
                    return;
                }
                self.accepting.remove(&key);
                self.hand_over(Unpublished {
                    key,
                    correlation,
                    ack: None,
                });
            }
            OnCommit::Erased => self.journal_erased(commit.error.as_ref()),
            OnCommit::Nothing => {}
        }
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
            let Some(stream) = running.stream.as_mut() else {
                continue;
            };
            if let Some(chunk) = stream.take(&self.author, now) {
                match topics::is_at_door(&running.key.0) {
                    true => self.askers.chunk(&running.key, &chunk),
                    // Lost when there is no room: the final answer has it all.
                    false => _ = self.link.publish(stream.message(&chunk)),
                }
                fault::passed(fault::Point::MidStream);
            }
        }
    }

    /// The hash of the model that the daemon began with is known.
    pub fn hashed(&mut self, sha256: String) {
        if self.hashed {
            // Another one is served in the meantime.
            return;
        }
        if self.damaged(&sha256) {
            return;
        }
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
        self.write_again();
        self.publish_answers();
        self.publish_refusals();
        self.dispatch();
        self.end_late_work();
        self.look_after_askers();
        self.go_on_erasing();
        self.transcript.expire(unix_ms());
        self.look_after_models();
        self.look_after_pool();
        self.sleep_when_idle();
        if self.thermal.look(Path::new("/"), Instant::now()) {
            tracing::warn!("heat: {:?}", self.thermal.step().unwrap_or_default());
            self.ease();
        }
        self.measure_energy();
        self.evict();
        if self.journal_bytes > COMPACT_BYTES && self.journal_bytes > 3 * self.table.bytes() as u64 {
            self.writer.compact(self.table.records());
            // Known exactly after the next commit.
            self.journal_bytes = 0;
        }
        self.publish_metrics();
    }

    fn evict(&mut self) {
        let erased = self.table.evict(self.bounds, unix_ms());
        if !erased.is_empty() {
            let ticket = self.record(erased, false);
            self.on_commit.insert(ticket, OnCommit::Nothing);
        }
    }

    /// Whether link and worker are looked after, and the worker has said something while it has work: then systemd's
    /// watchdog is fed. Each ends what hangs by itself, sooner; this is for the case that it does not.
    pub fn is_alive(&self) -> bool {
        let patience = Duration::from_secs(self.config.model.hang_s.saturating_mul(2).saturating_add(60));
        let heard = self.running.is_empty() || self.heard.elapsed() < patience;
        self.link.is_alive() && self.worker.is_alive() && heard
    }

    /// Takes no more requests and begins no more work, unless the pool is owed some.
    pub fn drain(&mut self) {
        self.draining = true;
        self.leave_to_stop();
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
            && self.on_commit.is_empty()
            && (!self.connected || self.on_delivery.is_empty() && self.refusing.is_empty())
            && self.is_done_with_pool()
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
            pool,
            mut last_number,
            ..
        } = self;
        if let Some(pool) = &pool {
            last_number += 1;
            Self::gone_from_pool(pool, &config.device, &link, last_number).await;
        }
        if connected {
            last_number += 1;
            link.publish(Outgoing {
                topic: topics.status(),
                payload: health::payload(&health::status(&config.device, State::Offline, Some("stopped"))),
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
