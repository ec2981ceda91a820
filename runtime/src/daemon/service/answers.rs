//! Answers: what is final goes to the journal, then to the link, until the broker has it.
//!
//! In: stored answers, refusals, PUBACKs of the broker. Out: records, messages. An answer is published when it is on
//! the disk, never before; a refusal leaves no trace there.

use super::{OnCommit, OnDelivery, REFUSALS, Service, Unpublished, WINDOW};
use crate::clock::unix_ms;
use crate::fault;
use crate::journal::table::Stage;
use crate::journal::{Key, Record, StoredAnswer};
use crate::mqtt::{Ack, Delivery};
use crate::reply;
use crate::wire::topics;

impl Service {
    /// Writes the answer down; it is published when it is safe.
    pub(super) fn done(&mut self, key: Key, answer: StoredAnswer) {
        fault::passed(fault::Point::AfterRun);
        self.attempts.remove(&key);
        let correlation = answer.reply.correlation.clone();
        let record = Record::Done {
            at: unix_ms(),
            key: key.clone(),
            answer: Box::new(answer),
        };
        self.table.apply(record.clone());
        self.write_down(record, key, correlation);
    }

    fn write_down(&mut self, record: Record, key: Key, correlation: Option<Vec<u8>>) {
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

    /// Tries again to write down the answers that the disk had no room for.
    pub(super) fn write_again(&mut self) {
        for (key, correlation) in std::mem::take(&mut self.unwritten) {
            if let Some(Stage::Done(answer)) = self.table.stage(&key) {
                let record = Record::Done {
                    at: unix_ms(),
                    key: key.clone(),
                    answer: answer.clone(),
                };
                self.write_down(record, key, correlation);
            }
        }
    }

    /// Gives a final answer that is safe to whoever waits for it, at the door or at the broker.
    pub(super) fn hand_over(&mut self, answer: Unpublished) {
        if topics::is_at_door(&answer.key.0) {
            self.answer_askers(answer.key);
        } else {
            self.unpublished.push_back(answer);
            self.publish_answers();
        }
    }

    /// Gives final answers to the link, as many as the window allows.
    pub(super) fn publish_answers(&mut self) {
        while self.connected && self.on_delivery.len() < WINDOW {
            let Some(next) = self.unpublished.pop_front() else {
                return;
            };
            let (Some(Stage::Done(answer)) | Some(Stage::Delivered(answer))) = self.table.stage(&next.key)
            else {
                self.ack(next.ack);
                continue;
            };
            let token = self.last_number + 1;
            if !self.link.publish(reply::message(
                &self.author,
                answer,
                next.correlation.clone(),
                token,
            )) {
                self.unpublished.push_front(next);
                return;
            }
            self.last_number = token;
            self.on_delivery.insert(token, OnDelivery::Answer(next.key));
            self.ack(next.ack);
        }
    }

    pub(super) fn delivered(&mut self, token: u64, delivery: &Delivery) {
        if self.refusing.remove(&token) {
            self.publish_refusals();
            return;
        }
        let key = match self.on_delivery.remove(&token) {
            Some(OnDelivery::Answer(key)) => key,
            Some(OnDelivery::Handed(held)) => return self.handed(*held, delivery),
            Some(OnDelivery::Listed) => return self.listed(),
            Some(OnDelivery::Hidden(topic)) => return self.hidden(&topic, delivery),
            Some(OnDelivery::Emptied) => return self.emptied(token, delivery),
            Some(OnDelivery::Nothing) | None => return,
        };
        if let Delivery::Refused(reason) = delivery {
            tracing::warn!(id = key.1, "the broker refuses the answer on {}: {reason}", key.0);
        }
        fault::passed(fault::Point::BeforeMark);
        self.mark_delivered(key);
        self.publish_answers();
    }

    pub(super) fn mark_delivered(&mut self, key: Key) {
        if matches!(self.table.stage(&key), Some(Stage::Done(_))) {
            let record = Record::Delivered { key };
            self.table.apply(record.clone());
            // A power cut before the next sync publishes the answer a second time; nothing is lost.
            let ticket = self.record(vec![record], false);
            self.on_commit.insert(ticket, OnCommit::Nothing);
        }
    }

    /// Answers at once, without a trace in the journal: the same message would be refused again. It is acknowledged
    /// when the link has the refusal, so that nobody waits for an answer that was dropped.
    pub(super) fn refuse(&mut self, ack: Option<Ack>, answer: StoredAnswer) {
        self.counters.errors += 1;
        if topics::is_at_door(&answer.reply.topic) {
            self.askers.refuse(&answer);
            return;
        }
        // At QoS 0 nothing holds a flood back.
        if ack.is_some() || self.refusals.len() < REFUSALS {
            self.refusals.push_back((ack, answer));
            self.publish_refusals();
        }
    }

    /// Gives refusals to the link: so many at QoS 1, and as many more at QoS 0, which need not wait for the broker.
    pub(super) fn publish_refusals(&mut self) {
        while self.refusing.len() < 2 * REFUSALS {
            let Some((ack, answer)) = self.refusals.pop_front() else {
                return;
            };
            let token = self.number();
            let correlation = answer.reply.correlation.clone();
            let mut message = reply::message(&self.author, &answer, correlation, token);
            // In a flood their PUBACKs are far behind the flood itself.
            message.at_most_once = self.refusing.len() >= REFUSALS;
            if !self.link.publish(message) {
                self.refusals.push_front((ack, answer));
                return;
            }
            self.refusing.insert(token);
            self.ack(ack);
        }
    }
}
