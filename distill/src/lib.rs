//! Fine-tuning of small language models.
//!
//! Data flows one way: rows → [`batch`] → [`model`] (with its adapter) → loss → gradients.

pub mod batch;
pub mod model;
pub mod random;
