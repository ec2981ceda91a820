//! The wire, version 1: what travels between a client and a device over MQTT.
//!
//! [`topics`] names the topics and decides where an answer may go. To the device: [`body`] is a request as a client
//! writes it, [`request`] turns the bytes of a message into a [`Request`] or a [`Rejection`], [`cancel`] takes a
//! request back. From the device: [`answer`] and [`device`] (status, card,
//! metrics). Between devices: [`pool`]. Nothing here knows an MQTT
//! client: bytes and strings come in, bytes and strings go out. Bytes from the network never panic.
//!
//! The JSON schemas in docs/reference are made of these types (`reference_tests.rs`).

pub mod answer;
pub mod body;
pub mod cancel;
pub mod command;
pub mod device;
pub mod pool;
pub mod request;
pub mod topics;

pub use answer::{Chunk, Completion, ErrorAnswer, ErrorCode, Timings, Usage};
pub use body::Body;
pub use cancel::Cancel;
pub use device::{Card, Metrics, State, Status};
pub use pool::PoolTopics;
pub use request::{Envelope, Limits, Message, Rejection, Reply, Request, Role, Rules, Sampling};
pub use topics::Topics;

#[cfg(test)]
mod reference_tests;
