//! An MQTT client of the tests' own: thousands of requests in one process, where mosquitto's tools start one each.
//!
//! In: requests with an id, other messages. Out: final answers by id, and the last message of every other topic.
//! When its connection is lost it connects again with a clean session, subscribes, and sends once more every request
//! that is not answered, as `pipit ask` does: the id makes that safe. It does so, too, with a request that the broker
//! had nobody to give to (PUBACK with 0x10): a broker that forgot everything does not know the device before it is back.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{Packet, PubAckReason, PublishProperties, SubscribeFilter};
use rumqttc::{AsyncClient, Event, EventLoop, MqttOptions, PublishNotice, PublishOptions, PublishResult};
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::sync::Notify;

/// Connecting and subscribing, on a machine that has other things to do.
const START: Duration = Duration::from_secs(20);
/// A connection on which nothing has happened for so long is given up.
const SILENCE: Duration = Duration::from_secs(8);

/// A message to publish.
#[derive(Debug, Clone, Default)]
pub struct Outgoing {
    /// Topic.
    pub topic: String,
    /// Payload.
    pub payload: Vec<u8>,
    /// At QoS 0 instead of 1.
    pub at_most_once: bool,
    /// Retained by the broker.
    pub retain: bool,
    /// MQTT 5 Response Topic.
    pub response_topic: Option<String>,
    /// MQTT 5 Correlation Data.
    pub correlation: Option<Vec<u8>>,
    /// MQTT 5 Content Type.
    pub content_type: Option<String>,
}

/// A final answer: anything on a reply topic that is no chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its topic.
    pub topic: String,
    /// The request's id; of plain text, the topic.
    pub id: String,
    /// The code of an error.
    pub error: Option<String>,
    /// The whole payload: two runs of one request differ in the times that it holds.
    pub payload: Vec<u8>,
}

/// What a client has seen so far.
#[derive(Debug, Default)]
pub struct Seen {
    asked: Vec<Asked>,
    /// Final answers by id, in order of arrival.
    pub answers: BTreeMap<String, Vec<Answer>>,
    /// Ids of the final answers in order of arrival.
    pub order: Vec<String>,
    /// Chunks of streamed answers.
    pub chunks: usize,
    /// The last message on every topic that is no answer.
    pub last: BTreeMap<String, Vec<u8>>,
    /// Connections made.
    pub sessions: u64,
    /// Places in `asked` of requests that nobody heard.
    unheard: Vec<usize>,
    connected: bool,
}

#[derive(Debug)]
struct Asked {
    /// `None` is a message that nobody answers: it is sent once.
    id: Option<String>,
    message: Outgoing,
    sent: bool,
}

impl Seen {
    /// The last message on this topic as JSON; null when there is none.
    pub fn json(&self, topic: &str) -> Value {
        self.last
            .get(topic)
            .and_then(|payload| serde_json::from_slice(payload).ok())
            .unwrap_or_default()
    }

    /// Ids that were asked for and have no final answer yet.
    pub fn unanswered(&self) -> BTreeSet<&str> {
        let asked = self.asked.iter().filter_map(|asked| asked.id.as_deref());
        asked.filter(|id| !self.answers.contains_key(*id)).collect()
    }

    /// Messages that were not given to the broker yet.
    pub fn unsent(&self) -> usize {
        self.asked.iter().filter(|asked| !asked.sent).count()
    }

    fn take(&mut self, topic: String, payload: Vec<u8>) {
        let json: Option<Value> = serde_json::from_slice(&payload).ok();
        let is_answer = topic.contains("/res/") || topic.starts_with("reply/");
        if !is_answer {
            self.last.insert(topic, payload);
            return;
        }
        let json = json.unwrap_or_default();
        if json["object"] == "chat.completion.chunk" {
            self.chunks += 1;
            return;
        }
        let id = json["id"].as_str().unwrap_or(&topic).to_owned();
        self.order.push(id.clone());
        let answer = Answer {
            topic,
            id: id.clone(),
            error: json["error"]["code"].as_str().map(ToOwned::to_owned),
            payload,
        };
        self.answers.entry(id).or_default().push(answer);
    }

    /// The next message to send in a session that has come to `cursor`, with its place.
    fn next(&mut self, cursor: &mut usize) -> Option<(usize, Outgoing)> {
        loop {
            let place = self.unheard.pop().unwrap_or_else(|| {
                *cursor += 1;
                *cursor - 1
            });
            let Some(asked) = self.asked.get_mut(place) else {
                *cursor -= 1;
                return None;
            };
            match &asked.id {
                Some(id) if !self.answers.contains_key(id) => {
                    asked.sent = true;
                    return Some((place, asked.message.clone()));
                }
                None if !asked.sent => {
                    asked.sent = true;
                    return Some((place, std::mem::take(&mut asked.message)));
                }
                _ => {}
            }
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Seen>,
    changed: Condvar,
    /// There is something to send.
    more: Notify,
    /// The subscription is confirmed.
    subscribed: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Seen) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }
}

/// A connected client; it is gone when this is dropped.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
    name: String,
}

impl Client {
    /// Connects to a broker on this machine and subscribes at QoS 1; returns once the broker has confirmed it.
    ///
    /// # Errors
    /// When it cannot.
    pub fn connect(port: u16, name: &str, filters: &[&str]) -> Result<Self> {
        Self::start(port, name, filters, false)
    }

    /// A client that subscribes and then never reads from its connection again.
    ///
    /// # Errors
    /// When it cannot connect.
    pub fn deaf(port: u16, name: &str, filters: &[&str]) -> Result<Self> {
        Self::start(port, name, filters, true)
    }

    fn start(port: u16, name: &str, filters: &[&str], deaf: bool) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let filters: Vec<String> = filters.iter().map(ToString::to_string).collect();
        let task = runtime()?.spawn(run(Arc::clone(&shared), port, name.to_owned(), filters, deaf));
        let client = Self {
            shared,
            task,
            name: name.to_owned(),
        };
        client.wait(START, "a connection", |seen| seen.connected)?;
        Ok(client)
    }

    /// Sends a request and sends it again in every new connection until it has a final answer.
    pub fn ask(&self, id: &str, message: Outgoing) {
        self.push(Some(id.to_owned()), message);
    }

    /// Publishes a message once.
    pub fn send(&self, message: Outgoing) {
        self.push(None, message);
    }

    fn push(&self, id: Option<String>, message: Outgoing) {
        self.shared.lock().asked.push(Asked {
            id,
            message,
            sent: false,
        });
        self.shared.more.notify_one();
    }

    /// A look at what it has seen.
    pub fn see<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(&self.shared.lock())
    }

    /// Waits until `done` is true of what it has seen.
    ///
    /// # Errors
    /// When `limit` passes first.
    pub fn wait(&self, limit: Duration, what: &str, mut done: impl FnMut(&Seen) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut seen = self.shared.lock();
        while !done(&seen) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let mut missing = String::new();
                for id in seen.unanswered().into_iter().take(5) {
                    let _ = write!(missing, " {id}");
                }
                bail!(
                    "{}: {what}: not within {limit:?}; {} unanswered:{missing}; {} connections",
                    self.name,
                    seen.unanswered().len(),
                    seen.sessions
                );
            }
            seen = self
                .shared
                .changed
                .wait_timeout(seen, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// The promise: everything that was asked has a final answer, and no id has two that differ. The same one may
    /// come again, because it is published at QoS 1. Returns how many came again.
    ///
    /// # Errors
    /// When the promise is broken, with where.
    pub fn check_promise(&self) -> Result<usize> {
        self.see(|seen| {
            if let Some(id) = seen.unanswered().first() {
                bail!("{id} has no final answer");
            }
            let mut again = 0;
            for (id, answers) in &seen.answers {
                again += answers.len() - 1;
                if let Some(other) = answers.iter().find(|answer| **answer != answers[0]) {
                    bail!(
                        "{id} has two final answers: {} and {}",
                        String::from_utf8_lossy(&answers[0].payload),
                        String::from_utf8_lossy(&other.payload)
                    );
                }
            }
            Ok(again)
        })
    }

    /// Waits until everything that was asked has a final answer.
    ///
    /// # Errors
    /// When `limit` passes first, with what is missing.
    pub fn wait_answered(&self, limit: Duration) -> Result<()> {
        self.wait(limit, "final answers", |seen| seen.unanswered().is_empty())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One runtime for all clients of a test.
fn runtime() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<std::io::Result<Runtime>> = OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
        })
        .as_ref()
        .ok()
        .context("the async runtime cannot be started")
}

async fn run(shared: Arc<Shared>, port: u16, name: String, filters: Vec<String>, deaf: bool) {
    loop {
        let mut options = MqttOptions::new(&name, ("127.0.0.1", port));
        options
            .set_keep_alive(if deaf { 3600 } else { 5 })
            .set_clean_start(true)
            .set_max_packet_size(Some(4 * 1024 * 1024));
        let (client, event_loop) = AsyncClient::builder(options).capacity(256).build();
        let mut sender = tokio::spawn(send(client, Arc::clone(&shared), filters.clone()));
        tokio::select! {
            () = receive(event_loop, &shared, deaf) => {}
            _ = &mut sender => {}
        }
        sender.abort();
        shared.change(|seen| seen.connected = false);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Subscribes, then sends what is to be sent. Apart from [`receive`]: whoever polls must not wait for room.
async fn send(client: AsyncClient, shared: Arc<Shared>, filters: Vec<String>) {
    let filters = filters
        .into_iter()
        .map(|filter| SubscribeFilter::new(filter, QoS::AtLeastOnce));
    let Ok(notice) = client
        .subscribe_many_tracked(filters.collect::<Vec<SubscribeFilter>>())
        .await
    else {
        return;
    };
    if notice.wait_async().await.is_err() {
        return;
    }
    shared.change(|seen| {
        seen.connected = true;
        seen.sessions += 1;
        seen.unheard.clear();
    });
    shared.subscribed.notify_one();
    let mut cursor = 0;
    loop {
        let next = shared.change(|seen| seen.next(&mut cursor));
        let Some((place, message)) = next else {
            shared.more.notified().await;
            continue;
        };
        let qos = if message.at_most_once {
            QoS::AtMostOnce
        } else {
            QoS::AtLeastOnce
        };
        let properties = PublishProperties {
            response_topic: message.response_topic,
            correlation_data: message.correlation.map(Into::into),
            content_type: message.content_type,
            ..PublishProperties::default()
        };
        let options = PublishOptions::new(qos)
            .retain(message.retain)
            .properties(properties);
        let Ok(notice) = client
            .publish_tracked(message.topic, message.payload, options)
            .await
        else {
            return;
        };
        if !message.at_most_once {
            tokio::spawn(heard(notice, place, Arc::clone(&shared)));
        }
    }
}

/// Waits for the PUBACK; a request that nobody heard is sent again, a little later.
async fn heard(notice: PublishNotice, place: usize, shared: Arc<Shared>) {
    if let Ok(PublishResult::Qos1(puback)) = notice.wait_async().await
        && puback.reason == PubAckReason::NoMatchingSubscribers
    {
        tokio::time::sleep(Duration::from_millis(100)).await;
        shared.change(|seen| {
            if seen.asked[place].id.is_some() {
                seen.unheard.push(place);
            }
        });
        shared.more.notify_one();
    }
}

/// Takes in messages until the connection is lost.
async fn receive(mut event_loop: EventLoop, shared: &Shared, deaf: bool) {
    loop {
        let event = tokio::select! {
            event = tokio::time::timeout(SILENCE, event_loop.poll()) => event,
            () = shared.subscribed.notified(), if deaf => return std::future::pending().await,
        };
        match event {
            Ok(Ok(Event::Incoming(Packet::Publish(publish)))) => {
                let topic = String::from_utf8_lossy(&publish.topic).into_owned();
                shared.change(|seen| seen.take(topic, publish.payload.to_vec()));
            }
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
