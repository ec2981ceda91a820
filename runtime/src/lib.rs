//! Pipit's runtime: a daemon that answers prompts over MQTT with a small language model, and its client.
//!
//! Data flows one way: [`config`] → [`mqtt`] → [`wire`] → [`journal`] → [`queue`] → [`engine`] (in a [`worker`]
//! process) → [`reply`]; beside them [`model`] and [`health`]. [`daemon`] joins them.

#[cfg(feature = "embedded-broker")]
pub mod broker;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod fault;
pub mod health;
pub mod journal;
pub mod model;
pub mod mqtt;
pub mod queue;
pub mod reply;
pub mod wire;
pub mod worker;
