//! Fine-tuning of small language models.
//!
//! Data flows one way: [`data`] (through the [`template`]) → [`batch`] → [`model`] (with its [`adapter`]) →
//! loss → [`optimizer`], which [`trainer`] drives; [`rollout`] lets the model answer, [`evaluate`] measures it,
//! [`export`] writes it. Beside it: [`plan`] and [`memory`] say before what it takes, [`report`] shows it, and
//! [`card`] describes the result.

pub mod adapter;
pub mod batch;
pub mod card;
pub mod cli;
pub mod data;
pub mod evaluate;
pub mod export;
pub mod memory;
pub mod model;
pub mod optimizer;
pub mod plan;
pub mod random;
pub mod report;
pub mod rollout;
pub mod template;
pub mod trainer;
