//! What the end-to-end tests share: a real broker process, our built programs, the real model.
//!
//! In: the programs in cargo's target folder (`cargo build --workspace --bins`), mosquitto and its clients,
//! SmolLM2 or a random model that answers in milliseconds. Out: processes that the tests drive, and that end with the test whatever happens in it.

pub mod authority;
pub mod broker;
pub mod client;
pub mod database;
pub mod device;
pub mod example;
pub mod http;
pub mod model;
pub mod package;
pub mod process;
pub mod program;
