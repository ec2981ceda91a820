//! The pool: requests that the broker gives to one of several devices.
//!
//! In: messages of the shared subscription, what the other members say. Out: requests that this device takes, and others
//! that it gives to a member with room. Brokers deal requests out in turn, without asking who has room; so every member
//! has a session of its own for the pool in which few requests may be unacknowledged (Receive Maximum: the places of its
//! queue, and a few more to give away), and one that has places free asks the one that holds the most.
//!
//! A request is acknowledged when it is in this device's journal, or when the broker has it for another member. Until
//! then it is the broker's, and nothing is lost with this device: `adoption` is how another member fetches it.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::{AHEAD, OnDelivery, Service};
use crate::config::Config;
use crate::fleet::Fleet;
use crate::journal::Key;
use crate::journal::table::Stage;
use crate::mqtt::{self, Door, Event, Incoming, Link, LinkError};
use crate::reply;
use crate::thermal::Step;
use crate::wire::pool::{Give, Member, PoolTopics};
use crate::wire::{Cancel, ErrorCode, Request};

mod adoption;
mod exchange;
mod membership;

use adoption::{Adopting, Estate};
use membership::Leaving;

/// A question for requests may be lost, at QoS 0: then the next one is due.
const ANSWER: Duration = Duration::from_millis(500);
/// Requests given away that are remembered, for the case that the broker sends one again.
const MOST_GIVEN: usize = 1024;

/// A request of the pool that this device has not taken.
#[derive(Debug)]
pub(super) struct Held {
    request: Box<Request>,
    message: Incoming,
    since: Instant,
}

impl Held {
    /// Milliseconds that are left of its deadline.
    fn left_ms(&self) -> Option<u64> {
        let waited = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        Some(self.request.deadline_ms?.saturating_sub(waited))
    }

    /// What it is known by when the broker sends it again, here or to another member.
    fn name(&self) -> String {
        adoption::name(&self.request.key(), self.request.fingerprint.as_deref())
    }
}

/// A question for requests.
struct Asked {
    member: String,
    since: Instant,
    /// How many are still to come.
    left: u64,
}

/// Everything about the pool that this device belongs to.
pub struct Pool {
    topics: PoolTopics,
    options: mqtt::Options,
    events: mpsc::Sender<(Door, Event)>,
    link: Link,
    connected: bool,
    /// Why it is not connected.
    reason: Option<String>,
    /// It has left.
    out: bool,
    fleet: Fleet,
    held: VecDeque<Held>,
    /// Names of requests that were given away.
    given: VecDeque<String>,
    /// Accepted here, and not answered yet.
    taken: HashSet<Key>,
    asked: Option<Asked>,
    said: Option<(Member, Instant)>,
    /// When the last message of the shared subscription came.
    heard: Instant,
    leaving: Option<Leaving>,
    adopting: Option<Adopting>,
    tried_to_adopt: Option<Instant>,
    /// What this device left when it was away.
    estate: Estate,
}

impl Pool {
    /// Joins the pool `name` of the configuration; events of its connections go to `events`.
    ///
    /// # Errors
    /// Those of [`Link::start`].
    pub fn join(
        config: &Config,
        name: &str,
        mut options: mqtt::Options,
        events: mpsc::Sender<(Door, Event)>,
    ) -> Result<Self, LinkError> {
        let topics = PoolTopics::new(&config.root, name, &config.device);
        let places = config.model.slots.saturating_add(AHEAD as u32);
        options.client_id = session(&options.client_id);
        options.door = Door::Pool;
        options.receive_maximum =
            u16::try_from(places.saturating_add(u32::from(config.pool.hold))).unwrap_or(u16::MAX);
        options.subscribe = vec![topics.share()];
        options.subscribe_retained = Vec::new();
        options.will = Some((topics.member(&config.device), membership::gone()));
        Ok(Self {
            link: open(options.clone(), events.clone())?,
            fleet: Fleet::new(&config.device),
            topics,
            options,
            events,
            connected: false,
            reason: None,
            out: false,
            held: VecDeque::new(),
            given: VecDeque::new(),
            taken: HashSet::new(),
            asked: None,
            said: None,
            heard: Instant::now(),
            leaving: None,
            adopting: None,
            tried_to_adopt: None,
            estate: Estate::default(),
        })
    }

    /// The connection of a door; `None` when there is none any more.
    pub(super) fn link(&self, door: Door) -> Option<&Link> {
        match door {
            Door::Own => None,
            Door::Pool => Some(&self.link),
            Door::Adopted => self.adopting.as_ref().map(|adopting| &adopting.link),
        }
    }

    /// Whether a topic is one of the pool's.
    pub(super) fn has(&self, topic: &str) -> bool {
        self.topics.has(topic)
    }
}

/// The client id of a device's session for its pool: no device can be called so.
fn session(client_id: &str) -> String {
    format!("{client_id}:pool")
}

fn open(options: mqtt::Options, events: mpsc::Sender<(Door, Event)>) -> Result<Link, LinkError> {
    let door = options.door;
    let (link, mut own) = Link::start(options)?;
    tokio::spawn(async move {
        while let Some(event) = own.recv().await {
            if events.send((door, event)).await.is_err() {
                return;
            }
        }
    });
    Ok(link)
}

impl Service {
    /// Belongs to this pool from now on.
    pub fn join(&mut self, pool: Option<Pool>) {
        self.pool = pool;
    }

    /// Something happened on a connection of the pool.
    pub fn pool(&mut self, door: Door, event: Event) {
        let Some(pool) = &mut self.pool else { return };
        match event {
            Event::Connected { epoch } => {
                self.recognised.insert(door, (epoch, HashSet::new()));
                self.pool_connected(door);
            }
            Event::Disconnected { reason } => {
                // Once for each reason, and a session that its owner has taken back is no trouble.
                if door == Door::Pool && pool.reason.as_ref() != Some(&reason) {
                    tracing::warn!("no connection for the pool: {reason}; trying again");
                    pool.reason = Some(reason);
                }
                // What was not acknowledged comes again, here or to whoever fetches it.
                let come_again = |held: &Held| held.message.ack.is_some_and(|ack| ack.door() == door);
                pool.held.retain(|held| !come_again(held));
                self.forget_unacknowledged(door);
                self.pool_disconnected(door);
            }
            Event::Message(message) => {
                pool.heard = Instant::now();
                self.dealt(*message);
            }
            // Nothing is published there.
            Event::Delivered { .. } => {}
        }
    }

    /// A message on one of the pool's topics that came by the device's own connection.
    pub(super) fn pool_message(&mut self, message: &Incoming) {
        let Some(pool) = &mut self.pool else { return };
        if let Some(member) = pool.topics.member_of(&message.topic) {
            pool.fleet.hear(member, &message.payload);
            // It has given what it had.
            let is_empty = !pool.fleet.holds(member);
            pool.asked = pool
                .asked
                .take()
                .filter(|asked| asked.member != member || !is_empty);
            if member == self.config.device && message.payload == membership::gone() {
                // Our will of before.
                pool.said = None;
            }
            return self.ack(message.ack);
        }
        let device = self.config.device.clone();
        if let Some(member) = pool.topics.fetched_of(&message.topic) {
            let member = member.to_owned();
            self.hear_fetched(&member, &message.payload);
            self.ack(message.ack);
        } else if message.topic == pool.topics.known(&device) {
            self.hear_known(&message.payload);
            self.ack(message.ack);
        } else if message.topic == pool.topics.give(&device) {
            if let Ok(give) = serde_json::from_slice::<Give>(&message.payload) {
                self.give(&give);
            }
            self.ack(message.ack);
        } else if message.topic == pool.topics.shared().cancel() {
            self.cancel(&message.payload);
            self.cancel_held(&message.payload);
            self.ack(message.ack);
        } else if !self.draining {
            if let Some(asked) = &mut pool.asked {
                asked.left = asked.left.saturating_sub(1);
            }
            pool.asked = pool.asked.take().filter(|asked| asked.left > 0);
            if let Some(held) = self.read_held(message.clone())
                && let Some(held) = self.take_held(held)
            {
                self.hold(held);
            }
        }
    }

    /// The broker has dealt this device a request.
    fn dealt(&mut self, message: Incoming) {
        if message.retain {
            tracing::warn!(
                "a retained message on {} is ignored: a request must not be retained",
                message.topic
            );
            return self.ack(message.ack);
        }
        let Some(held) = self.read_held(message) else {
            return;
        };
        if held.message.duplicate {
            if self.was_given(&held) || self.is_still_ours(&held) {
                return;
            }
            if held.message.ack.is_some_and(|ack| ack.door() == Door::Adopted) {
                return self.doubt(held);
            }
        }
        self.hold(held);
        if self.pool.as_ref().is_some_and(|pool| pool.leaving.is_some()) {
            self.give_back();
        }
    }

    fn hold(&mut self, held: Held) {
        if let Some(pool) = &mut self.pool {
            pool.held.push_back(held);
        }
    }

    /// Reads a request of the pool; one that cannot be is refused.
    fn read_held(&mut self, message: Incoming) -> Option<Held> {
        let topics = self.pool.as_ref()?.topics.shared();
        match self.parse(&message, topics) {
            Ok(request) => Some(Held {
                request: Box::new(Request {
                    from_pool: true,
                    ..request
                }),
                message,
                since: Instant::now(),
            }),
            Err(rejection) => {
                self.parsed(Err(rejection), &message);
                None
            }
        }
    }

    /// How many requests of the pool this device has room for: none when it could not run them soon.
    fn places(&self) -> usize {
        let able = (self.loaded && self.hashed || self.asleep) && !self.is_broken();
        if !able || self.draining || self.models.hold() || self.erasing.is_some() {
            return 0;
        }
        let busy = self.queue.len() + self.accepting.len() + self.running.len();
        (self.config.model.slots as usize + AHEAD).saturating_sub(busy)
    }

    /// Whether it can answer nothing at all for a while.
    fn is_broken(&self) -> bool {
        self.unloadable.is_some() || self.thermal.step() == Some(Step::Refuse)
    }

    /// Takes as many requests of the pool as there is room for, and asks for more.
    pub fn fill_from_pool(&mut self) {
        while self.places() > 0 {
            let Some(held) = self.pool.as_mut().and_then(|pool| pool.held.pop_front()) else {
                break;
            };
            if let Some(held) = self.take_held(held) {
                if let Some(pool) = &mut self.pool {
                    pool.held.push_front(held);
                }
                break;
            }
        }
        self.ask_for_more();
        self.say_membership();
    }

    /// Takes one into the journal; gives it back when that cannot be now.
    fn take_held(&mut self, mut held: Held) -> Option<Held> {
        let key = held.request.key();
        if self.table.stage(&key).is_none() && self.cannot_take(&key).is_some() {
            return Some(held);
        }
        held.request.deadline_ms = held.left_ms();
        self.parsed(Ok(*held.request), &held.message);
        if let (Some(pool), Some(Stage::Accepted(_))) = (&mut self.pool, self.table.stage(&key)) {
            pool.taken.insert(key);
        }
        None
    }

    fn cancel_held(&mut self, payload: &[u8]) {
        let Some(Cancel { id }) = Cancel::parse(payload) else {
            return;
        };
        self.refuse_all_held(ErrorCode::Cancelled, "cancelled", |held| held.request.id == id);
    }

    /// Forgets held requests that are to be erased; how many.
    pub(super) fn erase_held(&mut self, is_wanted: impl Fn(&Key) -> bool) -> u64 {
        let Some(pool) = &mut self.pool else { return 0 };
        let (gone, kept) = std::mem::take(&mut pool.held)
            .into_iter()
            .partition(|held| is_wanted(&held.request.key()));
        pool.held = kept;
        let gone: VecDeque<Held> = gone;
        gone.iter().for_each(|held| self.ack(held.message.ack));
        gone.len() as u64
    }

    fn expire_held(&mut self) {
        let why = "the deadline passed before the work began";
        self.refuse_all_held(ErrorCode::Expired, why, |held| held.left_ms() == Some(0));
    }

    fn refuse_all_held(&mut self, code: ErrorCode, why: &str, which: impl Fn(&Held) -> bool) {
        let Some(pool) = &mut self.pool else { return };
        let (refused, kept) = std::mem::take(&mut pool.held).into_iter().partition(which);
        pool.held = kept;
        let refused: VecDeque<Held> = refused;
        for held in &refused {
            self.refuse_held(held, code, why);
        }
    }

    fn refuse_held(&mut self, held: &Held, code: ErrorCode, why: &str) {
        let answer = reply::error(&held.request.reply, &held.request.id, code, why);
        self.refuse(held.message.ack, answer);
    }
}
