//! Checkpoints and LoRA adapters to quantised GGUF files, and back.
//!
//! The library half reads and writes the formats; `pipit-distill` uses [`checkpoint`], [`adapter`],
//! [`front_matter`] and [`output`] from it. The data flows: checkpoint → adapter merge → architecture rules →
//! vocabulary → quantise → GGUF; [`import()`](import::import) goes the other way.

pub mod adapter;
pub mod arch;
pub mod card;
pub mod checkpoint;
pub mod checksum;
pub mod compare;
pub mod evaluate;
pub mod front_matter;
pub mod gguf;
pub mod imatrix;
pub mod import;
pub mod json;
pub mod llama_cpp;
pub mod merge;
pub mod model;
pub mod modelfile;
pub mod output;
mod pages;
pub mod progress;
pub mod quantize;
pub mod report;
pub mod vocab;
