//! Commands: admin messages become orders, and their ends become answers.
//!
//! In: messages on `cmd/…`, reports of the installer. Out: orders, which are on the disk before the message is
//! acknowledged, and answers at QoS 1.

use serde_json::{Value, json};

use super::Service;
use crate::daemon::installer::{Order, Outcome, Report};
use crate::mqtt::{Incoming, Outgoing};
use crate::reply;
use crate::store::write_whole;
use crate::wire::command::{self, CommandAnswer, Drain, Envelope, Erase, ModelAction};
use crate::wire::request::generated_id;
use crate::wire::{ErrorCode, Reply};

impl Service {
    /// Takes a message on `cmd/{verb}`.
    pub(super) fn command(&mut self, message: &Incoming, verb: &str) {
        let made = generated_id();
        match verb {
            "model" => match command::parse::<ModelAction>(&message.payload, &made) {
                Ok((envelope, action)) => match self.command_reply(message, &envelope) {
                    Ok(reply) => self.order(
                        message,
                        Order {
                            action,
                            from: self.models.store.place().map(|place| place.active),
                            id: envelope.id,
                            reply,
                        },
                    ),
                    Err(why) => self.refuse_command(message, &envelope, &why),
                },
                Err((envelope, why)) => self.refuse_command(message, &envelope, &why),
            },
            "erase" => match command::parse::<Erase>(&message.payload, &made) {
                Ok((envelope, wanted)) => {
                    let reply = self.command_reply(message, &envelope);
                    match (reply, wanted.names_one()) {
                        (Ok(_), true) if self.erasing.is_some() => {
                            self.refuse_command(message, &envelope, "another erasure is under way");
                        }
                        (Ok(reply), true) => {
                            tracing::info!(id = envelope.id, "command: erase");
                            self.erase(envelope.id, reply, &wanted, message.ack);
                        }
                        (Ok(_), false) => {
                            let why = "either `client` or `request` says what is to be erased";
                            self.refuse_command(message, &envelope, why);
                        }
                        (Err(why), _) => self.refuse_command(message, &envelope, &why),
                    }
                }
                Err((envelope, why)) => self.refuse_command(message, &envelope, &why),
            },
            "drain" => match command::parse::<Drain>(&message.payload, &made) {
                Ok((envelope, drain)) => match self.command_reply(message, &envelope) {
                    Ok(reply) => self.drain_as_ordered(message, envelope, reply, drain),
                    Err(why) => self.refuse_command(message, &envelope, &why),
                },
                Err((envelope, why)) => self.refuse_command(message, &envelope, &why),
            },
            _ => {
                let envelope = Envelope {
                    id: made,
                    reply_to: None,
                };
                let why = format!("there is no command `{verb}`; there are: model, drain, erase");
                self.refuse_command(message, &envelope, &why);
            }
        }
    }

    /// Leaves the pool, which is answered when it is done, or joins it again.
    fn drain_as_ordered(&mut self, message: &Incoming, envelope: Envelope, reply: Reply, drain: Drain) {
        tracing::info!(id = envelope.id, "command: drain {drain:?}");
        if self.pool.is_none() {
            let why = "this device is in no pool; hint: [pool] name in its configuration";
            return self.refuse_command(message, &envelope, why);
        }
        match (drain.join, self.has_left_pool()) {
            // Acknowledged at once: what comes behind it must not wait until the device is out. One that ends before is in
            // the pool again when it is back.
            (false, false) => {
                self.leave_as_ordered(envelope.id, reply);
                return self.ack(message.ack);
            }
            (false, true) if !self.is_out_of_pool() => {
                return self.refuse_command(message, &envelope, "it is leaving the pool already");
            }
            (true, true) if !self.is_out_of_pool() => {
                return self.refuse_command(message, &envelope, "it is leaving the pool; hint: later");
            }
            (true, true) => self.come_back(),
            (true, false) | (false, true) => {}
        }
        let result = json!({"in_pool": drain.join});
        self.say(reply, Self::command_body(&envelope.id, "drain", result));
        self.ack(message.ack);
    }

    /// Where the answer to a command goes: the same rule as for a request.
    fn command_reply(&self, message: &Incoming, envelope: &Envelope) -> Result<Reply, String> {
        let wanted = message.response_topic.as_ref().or(envelope.reply_to.as_ref());
        if let Some(topic) = wanted {
            self.topics
                .check_reply(topic, &self.config.reply.prefixes)
                .map_err(ToOwned::to_owned)?;
        }
        Ok(Reply {
            topic: wanted
                .cloned()
                .unwrap_or_else(|| self.topics.answer(&envelope.id)),
            correlation: message.correlation.clone(),
            plain: false,
        })
    }

    fn refuse_command(&mut self, message: &Incoming, envelope: &Envelope, why: &str) {
        let reply = self.command_reply(message, envelope).unwrap_or_else(|_| Reply {
            topic: self.topics.answer(&envelope.id),
            correlation: message.correlation.clone(),
            plain: false,
        });
        let answer = reply::error(&reply, &envelope.id, ErrorCode::InvalidRequest, why);
        self.refuse(message.ack, answer);
    }

    fn order(&mut self, message: &Incoming, order: Order) {
        tracing::info!(id = order.id, "command: model {:?}", order.action);
        let refuse = |service: &mut Self, why: &str, code| {
            let answer = reply::error(&order.reply, &order.id, code, why);
            service.refuse(message.ack, answer);
        };
        if self.models.named_by_config() && !matches!(order.action, ModelAction::List {}) {
            let why = "the configuration names the model file: [model] path; hint: without it the installed model is served";
            return refuse(self, why, ErrorCode::InvalidRequest);
        }
        if let Some(other) = &self.models.order {
            let same = *other == order;
            return match same {
                // It came again.
                true => self.ack(message.ack),
                false => refuse(self, "another command is under way", ErrorCode::QueueFull),
            };
        }
        let store = self.models.store.clone();
        let written = store.make().and_then(|()| {
            write_whole(
                &store.wanted_path(),
                &serde_json::to_vec(&order).unwrap_or_default(),
            )
        });
        if let Err(error) = written {
            return refuse(self, &error.to_string(), ErrorCode::Internal);
        }
        self.ack(message.ack);
        self.begin(order);
    }

    fn begin(&mut self, order: Order) {
        self.models.order = Some(order.clone());
        self.models.installer.begin(&self.config, order);
    }

    /// Takes up an order that was not done when the daemon ended.
    pub(super) fn resume_order(&mut self) {
        let wanted = std::fs::read(self.models.store.wanted_path()).ok();
        if let Some(order) = wanted.and_then(|bytes| serde_json::from_slice::<Order>(&bytes).ok()) {
            tracing::info!(id = order.id, "going on with a command of before");
            self.begin(order);
        }
    }

    /// An order has ended.
    pub fn reported(&mut self, report: Report) {
        let Report { order, outcome } = report;
        self.models.order = None;
        let _ = std::fs::remove_file(self.models.store.wanted_path());
        let (body, failed) = match outcome {
            Outcome::Done(result) => (Self::command_body(&order.id, "model", result), None),
            Outcome::Refused(why) => (String::new(), Some((ErrorCode::InvalidRequest, why))),
            Outcome::Failed(why) => (String::new(), Some((ErrorCode::Internal, why))),
        };
        let payload = match failed {
            None => body,
            Some((code, why)) => {
                tracing::error!(id = order.id, "model command: {why}");
                reply::error(&order.reply, &order.id, code, why).body
            }
        };
        self.say(order.reply, payload);
        self.look_at_store();
        // There may be another model to choose from.
        self.show_to_home_assistant();
    }

    /// Publishes an answer to a command; the link keeps it until the broker has it.
    pub(super) fn say(&mut self, reply: Reply, payload: String) {
        let token = self.number();
        self.link.publish(Outgoing {
            topic: reply.topic,
            payload: payload.into_bytes(),
            token: Some(token),
            correlation: reply.correlation,
            content_type: Some("application/json"),
            ..Outgoing::default()
        });
    }

    pub(super) fn command_body(id: &str, command: &str, result: Value) -> String {
        serde_json::to_string(&CommandAnswer {
            id: id.to_owned(),
            command: command.to_owned(),
            result,
        })
        .unwrap_or_default()
    }
}
