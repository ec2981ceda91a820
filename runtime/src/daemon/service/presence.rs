//! What others see of the device: its state, its card, its figures.
//!
//! In: the state that the service is in. Out: retained messages on `status` and `card`, and `metrics`.

use std::time::{Duration, Instant};

use super::{OnDelivery, Service};
use crate::energy::Meter;
use crate::health::{self, State};
use crate::mqtt::Outgoing;
use crate::wire::{Card, Metrics, Status};

impl Service {
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

    /// Says what the device is doing, where that is new.
    pub(super) fn announce(&mut self) {
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
        let payload = health::payload(&self.status());
        if self.retain(self.topics.status(), payload) {
            self.announced = Some(self.state);
        }
    }

    /// What the device is doing.
    pub(super) fn status(&self) -> Status {
        let idle = self.asleep.then_some("the model is unloaded until somebody asks");
        let reason = self.unloadable.as_deref().or(idle);
        health::status(&self.config.device, self.state, reason)
    }

    /// What the device is and serves.
    pub(super) fn card(&self) -> Card {
        let sensor = self.meter.as_ref().map(Meter::name);
        health::card(&self.config, &self.author, self.models.served_id(), sensor)
    }

    /// Says what the device can.
    pub(super) fn publish_card(&mut self) {
        if self.connected {
            let payload = health::payload(&self.card());
            self.retain(self.topics.card(), payload);
            self.show_to_home_assistant();
        }
    }

    /// A retained message; false where the link has no room.
    pub(super) fn retain(&mut self, topic: String, payload: Vec<u8>) -> bool {
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

    /// Removes what the broker retains on a topic, by an empty message; its number, whose delivery means `then`. `None` when the
    /// link has no room.
    pub(super) fn remove_retained(&mut self, topic: String, then: OnDelivery) -> Option<u64> {
        let token = self.number();
        let given = self.link.publish(Outgoing {
            topic,
            retain: true,
            token: Some(token),
            ..Outgoing::default()
        });
        given.then(|| {
            self.on_delivery.insert(token, then);
            token
        })
    }

    /// Counters, and what is measured now.
    pub(super) fn metrics(&self) -> Metrics {
        health::metrics(
            &self.counters,
            self.started,
            self.queue.len(),
            self.running.len(),
            self.journal_bytes,
            self.worker_pid,
            self.thermal.step(),
        )
    }

    /// The figures, as often as the configuration says.
    pub(super) fn publish_metrics(&mut self) {
        let interval = Duration::from_secs(self.config.metrics.interval_s);
        if self.connected && !interval.is_zero() && self.last_metrics.elapsed() >= interval {
            self.last_metrics = Instant::now();
            let payload = health::payload(&self.metrics());
            let topic = self.topics.metrics();
            self.link.publish(Outgoing {
                topic,
                payload,
                content_type: Some("application/json"),
                ..Outgoing::default()
            });
        }
    }
}
