//! Fine-tuning of small language models.
//!
//! Data flows one way: [`data`] (through the [`template`]) → [`batch`] → [`model`] (with its [`adapter`]) →
//! loss → [`optimizer`], which [`trainer`] drives; [`rollout`] lets the model answer, [`evaluate`] measures it,
//! [`export`] writes it.

pub mod adapter;
pub mod batch;
pub mod cli;
pub mod data;
pub mod evaluate;
pub mod export;
pub mod model;
pub mod optimizer;
pub mod random;
pub mod rollout;
pub mod template;
pub mod trainer;
