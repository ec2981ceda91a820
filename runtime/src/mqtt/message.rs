//! What goes over the link, in our own words: options, messages both ways, events.

use std::path::PathBuf;

/// Which of a daemon's connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Door {
    /// That of its own topics.
    #[default]
    Own,
    /// That of the pool which it belongs to.
    Pool,
    /// The session of a member that is gone.
    Adopted,
}

/// Where the broker is and how to greet it.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which connection this is.
    pub door: Door,
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// TLS; without it everyone on the way reads along.
    pub tls: Option<Tls>,
    /// User and password.
    pub login: Option<(String, String)>,
    /// MQTT client id; the same one must not be used twice at a broker.
    pub client_id: String,
    /// Seconds that the broker keeps the session of a client that is away; 0 is a clean session.
    pub session_expiry_s: u32,
    /// Seconds between two signs of life.
    pub keep_alive_s: u16,
    /// Largest MQTT packet that is taken.
    pub most_packet_bytes: u32,
    /// Messages at QoS 1 that the broker may have sent and that are not acknowledged: it holds back the rest.
    pub receive_maximum: u16,
    /// Topic filters to subscribe, at QoS 1.
    pub subscribe: Vec<String>,
    /// Topic filters of which what is retained is wanted, too.
    pub subscribe_retained: Vec<String>,
    /// Topic filters that the broker's session may still have, and that are to end.
    pub unsubscribe: Vec<String>,
    /// Published, retained, by the broker when this client is gone.
    pub will: Option<(String, Vec<u8>)>,
}

impl Options {
    pub(super) fn unsubscribe_all(&mut self) {
        self.unsubscribe.append(&mut self.subscribe);
        self.unsubscribe.append(&mut self.subscribe_retained);
    }
}

/// Whom to trust, and what to show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// PEM file with the authorities; the system's when there is none.
    pub ca: Option<PathBuf>,
    /// PEM of this client's certificate and of its key.
    pub client: Option<(Vec<u8>, Vec<u8>)>,
}

/// What goes wrong with the link before it starts.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The PEM file cannot be read.
    #[error("TLS authorities {path}: {source}; hint: --ca names a PEM file")]
    Ca {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// TLS cannot be set up.
    #[error("TLS: {0}; hint: --ca names a PEM file with the broker's authority")]
    Tls(String),
}

/// A message to publish.
#[derive(Clone, Debug, Default)]
pub struct Outgoing {
    /// Topic.
    pub topic: String,
    /// Payload.
    pub payload: Vec<u8>,
    /// Keep it at the broker.
    pub retain: bool,
    /// QoS 1 with this number, reported by [`Event::Delivered`]; `None` is QoS 0 and may be dropped.
    pub token: Option<u64>,
    /// At QoS 0 although it has a token: [`Event::Delivered`] then says that it was written to the connection.
    pub at_most_once: bool,
    /// MQTT 5 Correlation Data.
    pub correlation: Option<Vec<u8>>,
    /// MQTT 5 Response Topic.
    pub response_topic: Option<String>,
    /// MQTT 5 Content Type.
    pub content_type: Option<&'static str>,
    /// MQTT 5 Message Expiry Interval, seconds.
    pub expiry_s: Option<u32>,
    /// MQTT 5 User Properties.
    pub properties: Vec<(String, String)>,
}

/// A message that came.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// Topic.
    pub topic: String,
    /// Payload.
    pub payload: Vec<u8>,
    /// The broker kept it from before we subscribed.
    pub retain: bool,
    /// The broker may have sent it before.
    pub duplicate: bool,
    /// MQTT 5 Response Topic.
    pub response_topic: Option<String>,
    /// MQTT 5 Correlation Data.
    pub correlation: Option<Vec<u8>>,
    /// MQTT 5 Content Type.
    pub content_type: Option<String>,
    /// MQTT 5 Message Expiry Interval, seconds left.
    pub expiry_s: Option<u32>,
    /// To be acknowledged when the message is safe; `None` at QoS 0.
    pub ack: Option<Ack>,
}

/// The right to acknowledge one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ack {
    pub(super) door: Door,
    pub(super) epoch: u64,
    pub(super) number: u64,
}

impl Ack {
    /// By which door the message came.
    pub fn door(self) -> Door {
        self.door
    }

    /// By which connection of this door, counted from 1.
    pub fn epoch(self) -> u64 {
        self.epoch
    }
}

/// What happens on the link.
#[derive(Clone, Debug)]
pub enum Event {
    /// Connected and subscribed.
    Connected {
        /// Counts the connections.
        epoch: u64,
    },
    /// Not connected; the link tries again.
    Disconnected {
        /// Why.
        reason: String,
    },
    /// A message came.
    Message(Box<Incoming>),
    /// The broker has said what becomes of a message.
    Delivered {
        /// Its number.
        token: u64,
        /// What.
        delivery: Delivery,
    },
}

/// What becomes of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The broker has taken it.
    Taken,
    /// The broker has taken it, and nobody subscribes to its topic.
    Unheard,
    /// The broker refuses it, for good.
    Refused(String),
}
