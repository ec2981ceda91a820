//! Fine-tuning of small language models.
//!
//! Data flows one way: rows → [`batch`] → [`model`] (with its [`adapter`]) → loss → [`optimizer`].

pub mod adapter;
pub mod batch;
pub mod model;
pub mod optimizer;
pub mod random;
