//! Home Assistant's discovery message: published when it is wanted, and taken back when it is not wanted any more.
//!
//! In: connections, loaded models, Home Assistant's birth message. Out: one retained message. Where it was published stands
//! in the state folder, so that a device which was told otherwise in the meantime removes it.

use std::path::{Path, PathBuf};

use super::{OnDelivery, Service};
use crate::health;
use crate::home_assistant::{self, Facts};
use crate::mqtt::{Delivery, Incoming};
use crate::store::write_whole;

/// Topics of discovery messages that the broker retains.
#[derive(Debug)]
pub(super) struct Shown {
    file: PathBuf,
    topics: Vec<String>,
}

impl Shown {
    /// What the state folder says.
    pub(super) fn of(state: &Path) -> Self {
        let file = state.join("home-assistant");
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        Self {
            topics: text.lines().map(ToOwned::to_owned).collect(),
            file,
        }
    }

    fn write(&self) {
        let written = match self.topics.is_empty() {
            true => std::fs::remove_file(&self.file),
            false => write_whole(&self.file, (self.topics.join("\n") + "\n").as_bytes())
                .map_err(std::io::Error::other),
        };
        if let Err(error) = written {
            tracing::warn!("{}: {error}", self.file.display());
        }
    }
}

impl Service {
    fn discovery_topic(&self) -> Option<String> {
        let wanted = self.config.home_assistant.discovery;
        wanted.then(|| home_assistant::topic(&self.config))
    }

    /// Whether a message is Home Assistant's birth; then it has been dealt with.
    pub(super) fn home_assistant_is_born(&mut self, message: &Incoming) -> bool {
        if self.discovery_topic().is_none() || message.topic != home_assistant::birth(&self.config) {
            return false;
        }
        if message.payload == b"online" {
            self.show_to_home_assistant();
        }
        self.ack(message.ack);
        true
    }

    /// Publishes the discovery message, where it is wanted.
    pub(super) fn show_to_home_assistant(&mut self) {
        let Some(topic) = self.discovery_topic().filter(|_| self.connected) else {
            return;
        };
        // Before it is published: what is retained is known, whatever happens.
        if !self.shown.topics.contains(&topic) {
            self.shown.topics.push(topic.clone());
            self.shown.write();
        }
        let models = match self.models.named_by_config() {
            true => Vec::new(),
            false => self.models.store.ids(),
        };
        let (card, metrics) = (self.card(), self.metrics());
        let facts = Facts {
            config: &self.config,
            board: &card.board,
            sensors: (metrics.temperature_c.is_some(), metrics.power_w.is_some()),
            models: &models,
        };
        let payload = health::payload(&home_assistant::discovery(&facts));
        self.retain(topic, payload);
    }

    /// Takes back what was published under other settings: an empty message removes the device.
    pub(super) fn hide_from_home_assistant(&mut self) {
        let wanted = self.discovery_topic();
        let old = self
            .shown
            .topics
            .iter()
            .filter(|topic| Some(*topic) != wanted.as_ref());
        for topic in old.cloned().collect::<Vec<_>>() {
            // Where the link has no room, it is taken back at the next connection.
            self.remove_retained(topic.clone(), OnDelivery::Hidden(topic));
        }
    }

    /// The broker has said what becomes of a removal.
    pub(super) fn hidden(&mut self, topic: &str, delivery: &Delivery) {
        match delivery {
            Delivery::Refused(why) => tracing::warn!("the broker refuses to remove {topic}: {why}"),
            Delivery::Taken | Delivery::Unheard => {
                tracing::info!("removed from Home Assistant: {topic}");
                self.shown.topics.retain(|other| other != topic);
                self.shown.write();
            }
        }
    }
}
