//! Pipit's runtime: a daemon that answers prompts over MQTT with a small language model, and its client.
//!
//! Data flows one way: [`config`] → [`mqtt`] → [`wire`] → [`journal`] → [`queue`] → [`engine`] (in a [`worker`]
//! process) → [`reply`]; beside them [`model`], the
//! [`store`] of installed ones, and [`health`]. [`daemon`] joins them, and
//! [`doctor`] looks at what they need: [`kernels`], [`cores`], the memory [`plan`].

pub mod bench;
pub mod board;
#[cfg(feature = "embedded-broker")]
pub mod broker;
pub mod clock;
pub mod config;
pub mod cores;
pub mod daemon;
pub mod doctor;
pub mod energy;
pub mod engine;
pub mod fault;
pub mod fleet;
pub mod health;
pub mod home_assistant;
#[cfg(feature = "http")]
pub mod http;
pub mod journal;
pub mod kernels;
pub mod model;
pub mod mqtt;
pub mod plan;
pub mod queue;
pub mod reply;
pub mod store;
pub mod task;
pub mod thermal;
pub mod transcript;
pub mod wire;
pub mod worker;
