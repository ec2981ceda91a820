//! Adoption: what the broker holds for a member that is gone is fetched by another one.
//!
//! In: members that are gone. Out: their sessions taken over, emptied and given up (MQTT 5, 3.1.4: a second connection with
//! the same client id ends the first). A member that comes back takes its session back in the same way, and whoever had it
//! gives up.
//!
//! What the broker had sent to the member before (DUP) is in doubt: the member may have it in its journal or may have handed
//! it on, and died before it could acknowledge it. So the names of such requests are retained before anything is done with
//! them. A living member that knows one says so. The member itself, when it is back, leaves alone what is named and not sent
//! to it again.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::membership::{QUIET, close};
use super::{Held, OnDelivery, Pool, Service, open, session};
use crate::daemon::client_id;
use crate::daemon::service::OnCommit;
use crate::journal::table::Stage;
use crate::journal::{Key, Record};
use crate::mqtt::{Door, Link, Outgoing};
use crate::queue::Waiting;
use crate::wire::Request;
use crate::wire::pool::Names;
use crate::wire::request::hex;

/// Between two attempts to take over a session.
const AGAIN: Duration = Duration::from_secs(10);
/// How long a device that is back waits for what the broker sends again and what others have retained.
const SETTLED: Duration = Duration::from_secs(2);

/// A session of a member that is gone.
pub(super) struct Adopting {
    member: String,
    pub(super) link: Link,
    /// Since when it is this device's.
    connected: Option<Instant>,
    /// What the broker had sent before, until it is known that nobody else has it.
    doubtful: Vec<Held>,
    names: Vec<String>,
    /// When all names were retained.
    asked: Option<Instant>,
}

/// What a device had taken from the pool and not answered when it ended.
#[derive(Default)]
pub(super) struct Estate {
    /// With name and priority.
    doubtful: Vec<(String, Waiting, i32)>,
    /// Names of what was fetched from its session.
    fetched: HashSet<String>,
    /// Since when both of its connections are there.
    connected: Option<Instant>,
}

/// A request's name among the members: 32 hexadecimal digits of its SHA-256.
pub(super) fn name(key: &Key, fingerprint: Option<&str>) -> String {
    let text = match fingerprint {
        Some(fingerprint) => fingerprint.to_owned(),
        None => format!("{} {}", key.0, key.1),
    };
    hex(&Sha256::digest(text)[..16])
}

impl Pool {
    /// A request of the pool that the journal says is not answered: the broker and the others know whether it is still ours.
    pub(in super::super) fn leave_in_doubt(&mut self, waiting: Waiting, request: &Request) {
        self.taken.insert(waiting.key.clone());
        let name = name(&waiting.key, request.fingerprint.as_deref());
        self.estate.doubtful.push((name, waiting, request.priority));
    }
}

impl Service {
    /// Takes over the session of a member that is gone, where that is this device's to do.
    pub(super) fn adopt(&mut self) {
        let Some(pool) = &mut self.pool else { return };
        let tried = pool.tried_to_adopt.is_some_and(|at| at.elapsed() < AGAIN);
        if tried || pool.adopting.is_some() || pool.leaving.is_some() || !pool.connected || !self.connected {
            return;
        }
        let Some(member) = pool.fleet.orphan().map(ToOwned::to_owned) else {
            return;
        };
        pool.tried_to_adopt = Some(Instant::now());
        let mut options = pool.options.clone();
        options.door = Door::Adopted;
        options.client_id = session(&client_id(&self.config.root, &member));
        options.will = None;
        options.unsubscribe = std::mem::take(&mut options.subscribe);
        match open(options, pool.events.clone()) {
            Ok(link) => {
                pool.adopting = Some(Adopting {
                    member,
                    link,
                    connected: None,
                    doubtful: Vec::new(),
                    names: Vec::new(),
                    asked: None,
                });
            }
            Err(error) => tracing::error!("pool: {error}"),
        }
    }

    /// The session is this device's.
    pub(super) fn adoption_begins(&mut self) {
        if let Some(pool) = &mut self.pool
            && let Some(adopting) = &mut pool.adopting
        {
            adopting.connected = Some(Instant::now());
            pool.heard = Instant::now();
            tracing::info!("pool: fetching what the broker holds for {}", adopting.member);
        }
    }

    /// One that the member may have begun, or handed on.
    pub(super) fn doubt(&mut self, held: Held) {
        let Some(pool) = &mut self.pool else { return };
        let Some(adopting) = &mut pool.adopting else {
            return;
        };
        adopting.names.push(held.name());
        adopting.doubtful.push(held);
        adopting.asked = None;
        let names = Names {
            by: self.config.device.clone(),
            names: adopting.names.clone(),
        };
        let topic = pool.topics.fetched(&adopting.member);
        let token = self.number();
        // The link keeps it; where it has no room, the session is fetched again after its end.
        if self.publish_names(topic, &names, Some(token), true) {
            self.on_delivery.insert(token, OnDelivery::Listed);
        }
    }

    fn publish_names(&self, topic: String, names: &Names, token: Option<u64>, retain: bool) -> bool {
        self.link.publish(Outgoing {
            topic,
            payload: serde_json::to_vec(names).unwrap_or_default(),
            retain,
            token,
            content_type: Some("application/json"),
            ..Outgoing::default()
        })
    }

    /// The broker has retained names.
    pub(in super::super) fn listed(&mut self) {
        let more = self
            .on_delivery
            .values()
            .any(|what| matches!(what, OnDelivery::Listed));
        if let Some(adopting) = self.pool.as_mut().and_then(|pool| pool.adopting.as_mut())
            && !more
        {
            adopting.asked = Some(Instant::now());
        }
    }

    /// Requests were fetched from the session of a member.
    pub(super) fn hear_fetched(&mut self, member: &str, payload: &[u8]) {
        let Ok(Names { by, names }) = serde_json::from_slice(payload) else {
            return;
        };
        let Some(pool) = &mut self.pool else { return };
        if member == self.config.device {
            pool.estate.fetched.extend(names);
            return;
        }
        if by == self.config.device {
            return;
        }
        let topic = pool.topics.known(&by);
        let wanted: HashSet<String> = names.into_iter().collect();
        let known = self.table.entries().map(|(key, entry)| match &entry.stage {
            Stage::Accepted(request) => name(key, request.fingerprint.as_deref()),
            Stage::Done(answer) | Stage::Delivered(answer) => name(key, answer.fingerprint.as_deref()),
        });
        let names: Vec<String> = known.filter(|name| wanted.contains(name)).collect();
        if !names.is_empty() {
            let by = self.config.device.clone();
            let token = self.number();
            self.publish_names(topic, &Names { by, names }, Some(token), false);
        }
    }

    /// Another member knows some of what this one has fetched.
    pub(super) fn hear_known(&mut self, payload: &[u8]) {
        let Ok(Names { names, .. }) = serde_json::from_slice(payload) else {
            return;
        };
        let Some(adopting) = self.pool.as_mut().and_then(|pool| pool.adopting.as_mut()) else {
            return;
        };
        let (known, rest): (Vec<Held>, Vec<Held>) = std::mem::take(&mut adopting.doubtful)
            .into_iter()
            .partition(|held| names.contains(&held.name()));
        adopting.doubtful = rest;
        known.iter().for_each(|held| self.ack(held.message.ack));
    }

    /// Takes what nobody else has, and gives the session up when the broker has nothing more for it.
    pub(super) fn adopted(&mut self) {
        let owes = self.owes_adopted();
        let Some(pool) = &mut self.pool else { return };
        let Some(adopting) = &mut pool.adopting else {
            return;
        };
        if adopting.asked.is_some_and(|at| at.elapsed() > QUIET) {
            pool.held.extend(adopting.doubtful.drain(..));
        }
        let quiet = adopting.connected.is_some_and(|at| at.elapsed() > QUIET) && pool.heard.elapsed() > QUIET;
        if !quiet || owes || !adopting.doubtful.is_empty() || pool.held.iter().any(is_adopted) {
            return;
        }
        let member = adopting.member.clone();
        tracing::info!("pool: the broker holds nothing more for {member}");
        close(&adopting.link);
        (pool.adopting, pool.tried_to_adopt) = (None, None);
        pool.fleet.hear(&member, b"");
        self.say_member(&member, Vec::new());
    }

    /// Whether something of the session is not acknowledged yet.
    fn owes_adopted(&self) -> bool {
        let accepting = self.on_commit.values().any(|what| match what {
            OnCommit::Accepted { acks, .. } => acks.iter().any(|ack| ack.door() == Door::Adopted),
            _ => false,
        });
        let waits = self.acks.iter().any(|ack| ack.door() == Door::Adopted);
        accepting || waits || self.is_handing(is_adopted)
    }

    /// Whether a request that the broker sends again is one of those that the journal has: then it is to be run here.
    pub(super) fn is_still_ours(&mut self, held: &Held) -> bool {
        let Some(pool) = &mut self.pool else { return false };
        let name = held.name();
        let place = pool.estate.doubtful.iter().position(|(other, ..)| *other == name);
        let Some(place) = place else { return false };
        let (_, waiting, priority) = pool.estate.doubtful.swap_remove(place);
        self.queue.push(waiting, priority);
        self.ack(held.message.ack);
        true
    }

    /// Decides on what the journal has of the pool, once the broker and the others have said what they know.
    pub(super) fn settle_estate(&mut self) {
        let Some(pool) = &mut self.pool else { return };
        let estate = &mut pool.estate;
        match (self.connected && pool.connected, estate.connected) {
            (false, _) => estate.connected = None,
            (true, None) => estate.connected = Some(Instant::now()),
            (true, Some(since)) if since.elapsed() > SETTLED => {
                let fetched = std::mem::take(&mut estate.fetched);
                let doubtful = std::mem::take(&mut estate.doubtful);
                let mut erased = Vec::new();
                for (name, waiting, priority) in doubtful {
                    match fetched.contains(&name) {
                        true => erased.push(Record::Erased { key: waiting.key }),
                        false => self.queue.push(waiting, priority),
                    }
                }
                if !erased.is_empty() {
                    tracing::info!("pool: {} requests were answered by others", erased.len());
                    erased.iter().for_each(|record| self.table.apply(record.clone()));
                    let ticket = self.record(erased, false);
                    self.on_commit.insert(ticket, OnCommit::Nothing);
                }
                if !fetched.is_empty()
                    && let Some(pool) = &self.pool
                {
                    self.retain(pool.topics.fetched(&self.config.device), Vec::new());
                }
            }
            (true, Some(_)) => {}
        }
    }
}

fn is_adopted(held: &Held) -> bool {
    held.message.ack.is_some_and(|ack| ack.door() == Door::Adopted)
}
