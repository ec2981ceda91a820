//! Checkpoints and LoRA adapters to quantised GGUF files, and back.
//!
//! The library half reads and writes the formats; `pipit-distill` uses [`checkpoint`], [`adapter`] and
//! [`output`] from it.

pub mod adapter;
pub mod checkpoint;
pub mod gguf;
pub mod output;
