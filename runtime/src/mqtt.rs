//! The link to the broker, and the only file that names an MQTT client (rumqttc-v5-next).
//!
//! In: [`Outgoing`] messages and acknowledgements through a bounded channel. Out: [`Event`]s. A session is one
//! TCP connection with an event loop of its own: after any error the event loop is thrown away and a new one is
//! made, so nothing hides in the client. What matters is kept here and in the journal: messages at QoS 1 stay in
//! the outbox until the broker's PUBACK and are published again in the next session.
//!
//! Traps that this file is built around:
//! - `poll()` runs in a task of its own, inside nothing but a timeout: it can hang for ever on a half-open link
//!   with outgoing data, and it is not known to be safe to cancel. When the timeout strikes, the event loop goes.
//! - Nothing that awaits a full channel of the client runs where `poll()` depends on it: publishing uses `try_`.
//! - The client's own size limit of 10 KiB would make a larger message come again and again: the Maximum Packet
//!   Size is always set, so that the broker itself drops what is larger.
//! - An acknowledgement names a packet id of one connection: it carries the connection's epoch, and the order of
//!   PUBACKs is the order of receipt (MQTT 5, 4.6).
//! - A client that resumes a session which only the broker remembers is refused or cannot publish at QoS 1, unless
//!   its session store holds something: `EmptySession` says that nothing is in flight, which is true.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{
    ConnectReturnCode, Packet, PubAckReason, Publish, PublishProperties, RetainForwardRule, SubscribeFilter,
    SubscribeReasonCode,
};
use rumqttc::{
    AsyncClient, EventLoop, PublishNotice, PublishNoticeError, PublishOptions, PublishResult, Transport,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::{clock, fault};

mod connect;
pub mod message;
mod session;

pub use message::{Ack, Delivery, Door, Event, Incoming, LinkError, Options, Outgoing, Tls};

/// Room of the client's own channel, and of ours.
const CHANNEL: usize = 256;
/// Room for what comes from the broker: few, because each may be as large as a packet may be.
const ARRIVALS: usize = 8;
/// Waits between two attempts to connect.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A connection that lasted this long was a good one: the next wait is a short one again.
const STABLE: Duration = Duration::from_secs(3);

enum Command {
    Publish(Outgoing),
    Ack(Ack),
    Unsubscribe,
    Close,
}

/// The sending half. When it is dropped, the link ends without a DISCONNECT, and the will is published.
#[derive(Clone, Debug)]
pub struct Link {
    commands: mpsc::Sender<Command>,
}

impl Link {
    /// Starts the link's task.
    ///
    /// # Errors
    /// Only what cannot become better by trying again.
    pub fn start(options: Options) -> Result<(Self, mpsc::Receiver<Event>), LinkError> {
        let transport = connect::transport(&options)?;
        let (commands, inbox) = mpsc::channel(CHANNEL);
        let (events, outbox) = mpsc::channel(ARRIVALS);
        let task = Task {
            options,
            transport,
            events,
            outbox: BTreeMap::new(),
            epoch: 0,
        };
        tokio::spawn(task.run(inbox));
        Ok((Self { commands }, outbox))
    }

    /// Whether its task still runs.
    pub fn is_alive(&self) -> bool {
        !self.commands.is_closed()
    }

    /// Publishes a message. False when there is no room: a message at QoS 0 is then dropped, one at QoS 1 must
    /// be given again later.
    pub fn publish(&self, message: Outgoing) -> bool {
        // Acknowledgements and final answers always find room: what may be lost stays out of their half.
        if message.token.is_none() && self.commands.capacity() < CHANNEL / 2 {
            return false;
        }
        self.commands.try_send(Command::Publish(message)).is_ok()
    }

    /// Acknowledges a message. False when there is no room: it must be given again, because the ones after it wait.
    pub fn ack(&self, ack: Ack) -> bool {
        self.commands.try_send(Command::Ack(ack)).is_ok()
    }

    /// Ends all subscriptions, in this connection and those to come; what the broker has queued already still comes.
    /// False when there is no room.
    pub fn unsubscribe(&self) -> bool {
        self.commands.try_send(Command::Unsubscribe).is_ok()
    }

    /// Ends the link with a DISCONNECT; the will is not published.
    pub async fn close(&self) {
        let _ = self.commands.send(Command::Close).await;
        let _ = tokio::time::timeout(Duration::from_secs(2), self.commands.closed()).await;
    }
}

struct Task {
    options: Options,
    transport: Transport,
    events: mpsc::Sender<Event>,
    /// At QoS 1, not yet taken by the broker.
    outbox: BTreeMap<u64, Outgoing>,
    epoch: u64,
}

/// Why a session ended.
enum End {
    /// Try again.
    Lost(String),
    /// Nobody needs the link any more.
    Closed,
}

/// One connection.
struct Session {
    client: AsyncClient,
    polled: mpsc::Receiver<Result<rumqttc::Event, String>>,
    /// Tasks that wait for a PUBACK or a SUBACK.
    notices: JoinSet<Notice>,
    /// Messages in order of receipt, and whether they may be acknowledged.
    unacked: VecDeque<(u64, Publish, bool)>,
    received: u64,
    ready: bool,
    /// Tokens that found no room in the client's channel.
    waiting: VecDeque<u64>,
}

enum Notice {
    Published {
        token: u64,
        result: Result<PublishResult, PublishNoticeError>,
    },
    Subscribed(Result<(), String>),
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut wait = FIRST_WAIT;
        loop {
            self.epoch += 1;
            let before = tokio::time::Instant::now();
            match self.session(&mut inbox).await {
                End::Closed => return,
                End::Lost(reason) => {
                    if self.events.send(Event::Disconnected { reason }).await.is_err() {
                        return;
                    }
                }
            }
            if before.elapsed() > STABLE {
                wait = FIRST_WAIT;
            }
            // Half of it by chance, so that a fleet does not come back all at once.
            let pause = wait / 2 + wait.mul_f64(f64::from(clock::chance()) / f64::from(u32::MAX) / 2.0);
            wait = (wait * 2).min(LONGEST_WAIT);
            if !self.pause(pause, &mut inbox).await {
                return;
            }
        }
    }

    /// Waits, and goes on taking commands; false when the link is to end.
    async fn pause(&mut self, pause: Duration, inbox: &mut mpsc::Receiver<Command>) -> bool {
        let until = tokio::time::sleep(pause);
        tokio::pin!(until);
        loop {
            tokio::select! {
                () = &mut until => return true,
                command = inbox.recv() => match command {
                    Some(Command::Publish(message)) => self.keep(message),
                    Some(Command::Ack(_)) => {}
                    Some(Command::Unsubscribe) => self.options.unsubscribe_all(),
                    Some(Command::Close) | None => return false,
                },
            }
        }
    }

    fn keep(&mut self, message: Outgoing) {
        if let Some(token) = message.token {
            self.outbox.insert(token, message);
        }
    }

    async fn session(&mut self, inbox: &mut mpsc::Receiver<Command>) -> End {
        let (client, event_loop) =
            match AsyncClient::builder(connect::mqtt_options(&self.options, self.transport.clone()))
                .capacity(CHANNEL)
                .try_build()
            {
                Ok(built) => built,
                Err(error) => return End::Lost(error.to_string()),
            };
        let (events, polled) = mpsc::channel(ARRIVALS);
        // A quiet link answers a ping in each keep-alive interval.
        let patience =
            Duration::from_secs(u64::from(self.options.keep_alive_s)).mul_f64(1.5) + Duration::from_secs(2);
        let poller = tokio::spawn(poll(event_loop, patience, events));
        let mut session = Session {
            client,
            polled,
            notices: JoinSet::new(),
            unacked: VecDeque::new(),
            received: 0,
            ready: false,
            waiting: VecDeque::new(),
        };
        let end = self.serve(&mut session, inbox).await;
        poller.abort();
        end
    }

    async fn serve(&mut self, session: &mut Session, inbox: &mut mpsc::Receiver<Command>) -> End {
        let mut retry = tokio::time::interval(Duration::from_millis(20));
        retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let behind = !session.waiting.is_empty()
                || session
                    .unacked
                    .front()
                    .is_some_and(|(_, _, acknowledged)| *acknowledged);
            tokio::select! {
                event = session.polled.recv() => match event {
                    Some(Ok(event)) => {
                        if let Err(end) = self.polled(session, event).await {
                            return end;
                        }
                    }
                    Some(Err(reason)) => return End::Lost(reason),
                    None => return End::Lost("the connection's task ended".to_owned()),
                },
                command = inbox.recv() => match command {
                    Some(Command::Publish(message)) => match message.token {
                        Some(token) => {
                            self.outbox.insert(token, message);
                            if session.ready {
                                session.waiting.push_back(token);
                            }
                        }
                        None if session.ready => { self.try_publish(session, message); }
                        None => {}
                    },
                    Some(Command::Ack(ack)) => {
                        if ack.epoch == self.epoch
                            && let Some(entry) =
                                session.unacked.iter_mut().find(|(number, ..)| *number == ack.number)
                        {
                            entry.2 = true;
                        }
                    }
                    Some(Command::Unsubscribe) => {
                        self.options.unsubscribe_all();
                        if session.ready && let Err(end) = self.unsubscribe(session).await {
                            return end;
                        }
                    }
                    Some(Command::Close) => return self.disconnect(session).await,
                    None => return End::Closed,
                },
                Some(notice) = session.notices.join_next() => {
                    if let Ok(notice) = notice
                        && let Err(end) = self.noticed(session, notice).await
                    {
                        return end;
                    }
                }
                _ = retry.tick(), if behind => {}
            }
            self.flush(session);
        }
    }

    async fn polled(&mut self, session: &mut Session, event: rumqttc::Event) -> Result<(), End> {
        match event {
            rumqttc::Event::Incoming(Packet::ConnAck(connack)) => {
                if connack.code != ConnectReturnCode::Success {
                    return Err(End::Lost(format!("the broker refuses: {:?}", connack.code)));
                }
                self.subscribe(session).await?;
            }
            rumqttc::Event::Incoming(Packet::Publish(publish)) => {
                let incoming = session.receive(&publish, self.options.door, self.epoch);
                self.event(Event::Message(Box::new(incoming))).await?;
            }
            rumqttc::Event::Incoming(Packet::Disconnect(disconnect)) => {
                return Err(End::Lost(format!(
                    "the broker disconnects: {:?}",
                    disconnect.reason_code
                )));
            }
            // Both are on the wire now.
            rumqttc::Event::Outgoing(rumqttc::Outgoing::PubAck(_)) => fault::passed(fault::Point::AfterAck),
            rumqttc::Event::Outgoing(rumqttc::Outgoing::Publish(packet))
                if packet != 0 && self.outbox.values().any(|message| !message.retain) =>
            {
                fault::passed(fault::Point::AfterFinal);
            }
            _ => {}
        }
        Ok(())
    }

    /// Always, with each connection: the broker may have forgotten us, or hold the filters of an older configuration.
    async fn subscribe(&mut self, session: &mut Session) -> Result<(), End> {
        if !self.options.unsubscribe.is_empty() {
            self.unsubscribe(session).await?;
        }
        let filter = |path: &String, rule| SubscribeFilter {
            path: path.clone(),
            qos: QoS::AtLeastOnce,
            // What we say on our own topics is for the broker: an empty message that removes a retained one.
            // A shared subscription must not ask for it (MQTT 5, 3.8.3.1).
            nolocal: !path.starts_with("$share/"),
            preserve_retain: false,
            retain_forward_rule: rule,
        };
        let (plain, retained) = (&self.options.subscribe, &self.options.subscribe_retained);
        let filters: Vec<SubscribeFilter> = plain
            .iter()
            .map(|path| filter(path, RetainForwardRule::Never))
            .chain(
                retained
                    .iter()
                    .map(|path| filter(path, RetainForwardRule::OnEverySubscribe)),
            )
            .collect();
        if filters.is_empty() {
            return self.noticed(session, Notice::Subscribed(Ok(()))).await;
        }
        let notice = session
            .client
            .subscribe_many_tracked(filters)
            .await
            .map_err(|error| End::Lost(error.to_string()))?;
        session.notices.spawn(async move {
            let result = match notice.wait_async().await {
                Ok(suback) => suback
                    .return_codes
                    .iter()
                    .find(|code| !matches!(code, SubscribeReasonCode::Success(_)))
                    .map_or(Ok(()), |code| {
                        Err(format!("the broker refuses a subscription: {code:?}"))
                    }),
                Err(error) => Err(error.to_string()),
            };
            Notice::Subscribed(result)
        });
        Ok(())
    }

    async fn unsubscribe(&self, session: &Session) -> Result<(), End> {
        let filters = self.options.unsubscribe.clone();
        session
            .client
            .unsubscribe_many(filters)
            .await
            .map_err(|error| End::Lost(error.to_string()))
    }

    async fn noticed(&mut self, session: &mut Session, notice: Notice) -> Result<(), End> {
        match notice {
            Notice::Subscribed(Ok(())) => {
                session.ready = true;
                session.waiting = self.outbox.keys().copied().collect();
                self.event(Event::Connected { epoch: self.epoch }).await
            }
            Notice::Subscribed(Err(reason)) => Err(End::Lost(reason)),
            Notice::Published { token, result } => {
                let delivery = match result {
                    Ok(PublishResult::Qos1(puback)) => match puback.reason {
                        PubAckReason::Success => Delivery::Taken,
                        PubAckReason::NoMatchingSubscribers => Delivery::Unheard,
                        // Over a quota: later, in this or the next session.
                        PubAckReason::QuotaExceeded => {
                            session.waiting.push_back(token);
                            return Ok(());
                        }
                        reason => Delivery::Refused(format!("{reason:?}")),
                    },
                    Ok(_) => Delivery::Taken,
                    Err(PublishNoticeError::RetainNotSupported) => {
                        Delivery::Refused("no retained messages".to_owned())
                    }
                    // The connection went: it is published again in the next one.
                    Err(_) => return Ok(()),
                };
                self.outbox.remove(&token);
                self.event(Event::Delivered { token, delivery }).await
            }
        }
    }

    async fn event(&self, event: Event) -> Result<(), End> {
        self.events.send(event).await.map_err(|_| End::Closed)
    }

    /// Sends what the client's channel has room for.
    fn flush(&mut self, session: &mut Session) {
        while let Some((_, publish, true)) = session.unacked.front() {
            if session.client.try_ack(publish).is_err() {
                break;
            }
            session.unacked.pop_front();
        }
        while let Some(token) = session.waiting.front().copied() {
            if let Some(message) = self.outbox.get(&token).cloned()
                && !self.try_publish(session, message)
            {
                break;
            }
            session.waiting.pop_front();
        }
    }

    /// False when the client's channel is full.
    fn try_publish(&self, session: &mut Session, message: Outgoing) -> bool {
        let qos = match message.token {
            Some(_) if !message.at_most_once => QoS::AtLeastOnce,
            _ => QoS::AtMostOnce,
        };
        let properties = PublishProperties {
            payload_format_indicator: Some(1),
            message_expiry_interval: message.expiry_s,
            correlation_data: message.correlation.map(Into::into),
            response_topic: message.response_topic,
            content_type: message.content_type.map(ToOwned::to_owned),
            user_properties: message.properties,
            ..PublishProperties::default()
        };
        let options = PublishOptions::new(qos)
            .retain(message.retain)
            .properties(properties);
        match message.token {
            None => session
                .client
                .try_publish(message.topic, message.payload, options)
                .is_ok(),
            Some(token) => match session
                .client
                .try_publish_tracked(message.topic, message.payload, options)
            {
                Ok(notice) => {
                    session.notices.spawn(published(token, notice));
                    true
                }
                Err(rumqttc::ClientError::RequestChannelFull(_)) => false,
                Err(error) => {
                    tracing::warn!("a message cannot be published: {error}");
                    true
                }
            },
        }
    }

    async fn disconnect(&mut self, session: &mut Session) -> End {
        self.flush(session);
        let _ = session
            .client
            .disconnect_with_timeout(Duration::from_secs(1))
            .await;
        // Until the event loop says that it is done.
        let done = async { while let Some(Ok(_)) = session.polled.recv().await {} };
        let _ = tokio::time::timeout(Duration::from_millis(1500), done).await;
        End::Closed
    }
}

impl Session {
    fn receive(&mut self, publish: &Publish, door: Door, epoch: u64) -> Incoming {
        let properties = publish.properties.clone().unwrap_or_default();
        let ack = (publish.qos != QoS::AtMostOnce).then(|| {
            self.received += 1;
            Ack {
                door,
                epoch,
                number: self.received,
            }
        });
        let incoming = Incoming {
            topic: String::from_utf8_lossy(&publish.topic).into_owned(),
            payload: publish.payload.to_vec(),
            retain: publish.retain,
            duplicate: publish.dup,
            response_topic: properties.response_topic,
            correlation: properties.correlation_data.map(|data| data.to_vec()),
            content_type: properties.content_type,
            expiry_s: properties.message_expiry_interval,
            ack,
        };
        if let Some(ack) = ack {
            // Only its packet id is needed to acknowledge it; a slice of the rest would keep the whole read buffer.
            let publish = Publish {
                topic: Vec::new().into(),
                payload: Vec::new().into(),
                properties: None,
                ..*publish
            };
            self.unacked.push_back((ack.number, publish, false));
        }
        incoming
    }
}

async fn published(token: u64, notice: PublishNotice) -> Notice {
    Notice::Published {
        token,
        result: notice.wait_async().await,
    }
}

/// Polls until the first error, or until nothing has happened for too long.
async fn poll(
    mut event_loop: EventLoop,
    patience: Duration,
    events: mpsc::Sender<Result<rumqttc::Event, String>>,
) {
    loop {
        let event = match tokio::time::timeout(patience, event_loop.poll()).await {
            Ok(Ok(event)) => Ok(event),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("nothing from the broker for {} s", patience.as_secs())),
        };
        let last = event.is_err();
        if events.send(event).await.is_err() || last {
            return;
        }
    }
}
