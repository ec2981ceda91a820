//! The wire, version 1: what travels between a client and a device over MQTT.
//!
//! [`topics`] names the topics and decides where an answer may go, [`request`] turns the bytes of a message
//! into a [`Request`] or a [`Rejection`], and [`answer`] holds what goes back. Nothing here knows an MQTT
//! client: bytes and strings come in, bytes and strings go out. Bytes from the network never panic.

pub mod answer;
pub mod request;
pub mod topics;

pub use answer::{Chunk, Completion, ErrorAnswer, ErrorCode, Timings, Usage};
pub use request::{Envelope, Limits, Message, Rejection, Reply, Request, Role, Sampling};
pub use topics::Topics;
