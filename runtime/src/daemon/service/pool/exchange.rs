//! Exchange: who has room asks whoever holds the most, and gets it.
//!
//! In: places that are free, questions of others. Out: requests published again, for one member or for the pool. A request
//! that is handed on stays the broker's until the broker has the copy.

use std::time::Instant;

use super::{ANSWER, Asked, Held, MOST_GIVEN, OnDelivery, Service};
use crate::mqtt::{Delivery, Outgoing};
use crate::wire::ErrorCode;
use crate::wire::pool::Give;
use crate::wire::topics::valid_id;

impl Service {
    /// Asks the member that holds the most for as many as there is room for.
    pub(super) fn ask_for_more(&mut self) {
        let places = self.places() as u64;
        let Some(pool) = &mut self.pool else { return };
        let waits = pool
            .asked
            .as_ref()
            .is_some_and(|asked| asked.since.elapsed() < ANSWER);
        if places == 0 || waits || !self.connected || pool.out || pool.leaving.is_some() {
            return;
        }
        let Some(member) = pool.fleet.richest().map(ToOwned::to_owned) else {
            return;
        };
        let give = Give {
            device: self.config.device.clone(),
            places,
        };
        pool.fleet.gave(&member, places);
        let topic = pool.topics.give(&member);
        pool.asked = Some(Asked {
            member,
            since: Instant::now(),
            left: places,
        });
        self.link.publish(Outgoing {
            topic,
            payload: serde_json::to_vec(&give).unwrap_or_default(),
            content_type: Some("application/json"),
            ..Outgoing::default()
        });
    }

    /// Gives a member what it has room for.
    pub(super) fn give(&mut self, give: &Give) {
        if !valid_id(&give.device) {
            return;
        }
        for _ in 0..give.places {
            let Some(pool) = &mut self.pool else { return };
            let Some(held) = pool.held.pop_front() else {
                // So that it asks somebody else.
                pool.said = None;
                return;
            };
            let topic = pool.topics.take(&give.device);
            if !self.hand(held, topic) {
                return;
            }
        }
    }

    /// Publishes a held request again, for another member. It stays the broker's until the broker has the copy.
    fn hand(&mut self, held: Held, topic: String) -> bool {
        let left_ms = held.left_ms();
        if left_ms == Some(0) {
            self.refuse_held(
                &held,
                ErrorCode::Expired,
                "the deadline passed before the work began",
            );
            return true;
        }
        let token = self.last_number + 1;
        let content_type = match held.message.content_type.as_deref() {
            Some(kind) if kind.starts_with("application/json") => Some("application/json"),
            Some(kind) if kind.starts_with("text/plain") => Some("text/plain"),
            _ => None,
        };
        let given = self.link.publish(Outgoing {
            topic,
            payload: held.message.payload.clone(),
            token: Some(token),
            correlation: held.message.correlation.clone(),
            response_topic: held.message.response_topic.clone(),
            content_type,
            expiry_s: left_ms.map(|ms| u32::try_from(ms.div_ceil(1000)).unwrap_or(u32::MAX)),
            ..Outgoing::default()
        });
        let Some(pool) = &mut self.pool else { return false };
        if !given {
            pool.held.push_front(held);
            return false;
        }
        self.last_number = token;
        pool.given.push_back(held.name());
        if pool.given.len() > MOST_GIVEN {
            pool.given.pop_front();
        }
        self.on_delivery.insert(token, OnDelivery::Handed(Box::new(held)));
        true
    }

    /// The broker has said what becomes of a request that was handed on.
    pub(in super::super) fn handed(&mut self, held: Held, delivery: &Delivery) {
        match delivery {
            Delivery::Taken => self.ack(held.message.ack),
            // The other one is away, or nobody is in the pool any more.
            Delivery::Unheard | Delivery::Refused(_) => {
                let Some(pool) = &mut self.pool else { return };
                let name = held.name();
                pool.given.retain(|other| *other != name);
                let alone = pool.leaving.is_some();
                if !alone {
                    pool.held.push_front(held);
                } else if let Some(held) = self.take_held(held) {
                    self.hold(held);
                }
            }
        }
    }

    /// Whether a request that the broker sends again was given away already; then it needs no more care than that.
    pub(super) fn was_given(&mut self, held: &Held) -> bool {
        let name = held.name();
        let Some(pool) = &self.pool else { return false };
        if !pool.given.contains(&name) {
            return false;
        }
        let on_its_way = self.on_delivery.values_mut().find_map(|what| match what {
            OnDelivery::Handed(other) if other.name() == name => Some(other),
            _ => None,
        });
        match on_its_way {
            Some(other) => other.message.ack = held.message.ack,
            None => self.ack(held.message.ack),
        }
        true
    }

    /// Gives what it has not taken back to the pool, while it leaves. Where nobody else is in, it takes it after all.
    pub(super) fn give_back(&mut self) {
        loop {
            let Some(pool) = &mut self.pool else { return };
            let Some(leaving) = &mut pool.leaving else { return };
            if pool.out || !self.connected {
                return;
            }
            let Some(held) = pool.held.pop_front() else { return };
            if pool.fleet.has_others() {
                leaving.given_back += 1;
                let topic = pool.topics.shared().request();
                if !self.hand(held, topic) {
                    return;
                }
            } else if let Some(held) = self.take_held(held) {
                return self.hold(held);
            }
        }
    }

    /// Whether one is on its way to another member.
    pub(super) fn is_handing(&self, which: impl Fn(&Held) -> bool) -> bool {
        self.on_delivery
            .values()
            .any(|what| matches!(what, OnDelivery::Handed(held) if which(held)))
    }
}
