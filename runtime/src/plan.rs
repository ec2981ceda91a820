//! The memory plan: what a model takes, computed from its header before it is loaded.
//!
//! In: a [`Header`] and [`Settings`]. Out: a [`Plan`], one [`Row`] for each thing that takes memory, and an error with
//! that table where it is more than there is. A board without swap has no second chance: it would be slow for ever
//! (pages of the weights read again for every token) or lose its worker. docs/reference/memory.md holds the measured
//! error of the formulas, and each of them names what it was read from.

use std::fmt::Write as _;

use serde::Serialize;

use crate::config::Config;
use crate::engine::llama;
use crate::model::{GgmlType, Header};
use crate::{cores, kernels};

mod advice;
mod available;
mod context;
mod weights;

#[cfg(test)]
pub(crate) mod tests;

pub use available::{Available, available};
pub use weights::Repack;

/// The daemon beside the worker.
const DAEMON: u64 = 15 << 20;

/// What the memory depends on, besides the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Tokens of the context.
    pub n_ctx: u32,
    /// Requests under way at a time.
    pub slots: u32,
    /// Sequences that the context can tell apart.
    pub sequences: u32,
    /// Tokens computed in one go.
    pub n_ubatch: u32,
    /// Threads.
    pub threads: u32,
    /// Type of the keys in the KV cache.
    pub cache_type_k: GgmlType,
    /// Type of its values.
    pub cache_type_v: GgmlType,
    /// Bytes of kept beginnings of prompts.
    pub prefixes: u64,
    /// Bytes of the journal, which are in memory, too.
    pub journal: u64,
    /// Which weights ggml copies.
    pub repack: Repack,
}

impl Settings {
    /// Those of a configuration, with the kernels of this program.
    ///
    /// # Errors
    /// A type of the KV cache that llama.cpp does not have.
    pub fn of(config: &Config) -> Result<Self, PlanError> {
        let model = &config.model;
        let cache = |key: &'static str, name: &str| {
            GgmlType::of_cache(name).ok_or_else(|| PlanError::CacheType {
                key,
                name: name.to_owned(),
            })
        };
        Ok(Self {
            n_ctx: model.n_ctx,
            slots: model.slots,
            sequences: llama::sequences(model.slots),
            n_ubatch: 512,
            threads: if model.threads == 0 {
                cores::threads()
            } else {
                model.threads
            },
            cache_type_k: cache("model.cache_type_k", &model.cache_type_k)?,
            cache_type_v: cache("model.cache_type_v", &model.cache_type_v)?,
            prefixes: config.prefix.ram_bytes,
            journal: config.journal.bytes as u64,
            repack: Repack::of(kernels::built_in),
        })
    }
}

/// One thing that takes memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What.
    pub what: &'static str,
    /// Bytes.
    pub bytes: u64,
    /// How they were computed.
    pub how: String,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// What the worker takes.
    pub worker: Vec<Row>,
    /// What the daemon takes.
    pub daemon: Vec<Row>,
    /// Bytes of the file that are read once, when ggml copies weights: they count as resident until something else
    /// wants the memory, and are never read again.
    pub read_once: u64,
    /// What the plan does not know; it is a lower bound then.
    pub unknown: Vec<String>,
    #[serde(skip)]
    header: Header,
    #[serde(skip)]
    settings: Settings,
}

/// Why a model cannot be loaded with these settings.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// It takes more than there is.
    #[error(
        "the model does not fit: it takes {needs} and {available} is available ({by})\n{table}hint: {hint}"
    )]
    TooLarge {
        /// Bytes, for people.
        needs: String,
        /// Bytes, for people.
        available: String,
        /// What sets that limit.
        by: String,
        /// The plan.
        table: String,
        /// What would fit.
        hint: String,
    },
    /// A type that the KV cache cannot have.
    #[error(
        "{key}: `{name}` is no type of the KV cache; hint: f16 is usual, q8_0 takes half of it; also f32, bf16, q5_1, q5_0, q4_1, q4_0, iq4_nl"
    )]
    CacheType {
        /// The key with its section.
        key: &'static str,
        /// What it says.
        name: String,
    },
}

impl Plan {
    /// Computes it.
    pub fn of(header: &Header, settings: &Settings) -> Self {
        let mut worker = Vec::new();
        let weights = weights::weights(header, settings.repack);
        worker.push(Row {
            what: "weights",
            bytes: weights.mapped,
            how: format!(
                "{} tensors, read from the file as they are",
                header.tensors.len() - weights.copies
            ),
        });
        if weights.copied > 0 {
            worker.push(Row {
                what: "copied weights",
                bytes: weights.copied,
                how: format!(
                    "{} tensors, in the order that this CPU's kernels want",
                    weights.copies
                ),
            });
        }
        worker.extend(context::rows(header, settings));
        worker.push(Row {
            what: "kept beginnings",
            bytes: settings.prefixes,
            how: "[prefix] ram_bytes".to_owned(),
        });
        worker.retain(|row| row.bytes > 0);
        let mut unknown: Vec<String> = header.layers.unknown.iter().cloned().collect();
        if header.parts > 1 {
            unknown.push(format!(
                "the model is in {} files, and only the first was looked at",
                header.parts
            ));
        }
        let daemon = vec![
            Row {
                what: "daemon",
                bytes: DAEMON,
                how: "the most that it is meant to take, without the journal".to_owned(),
            },
            Row {
                what: "journal",
                bytes: settings.journal,
                how: "[journal] bytes".to_owned(),
            },
        ];
        Self {
            worker,
            daemon,
            read_once: weights.read_once,
            unknown,
            header: header.clone(),
            settings: settings.clone(),
        }
    }

    /// Bytes of the worker.
    pub fn worker_bytes(&self) -> u64 {
        sum(&self.worker)
    }

    /// Bytes of daemon and worker.
    pub fn bytes(&self) -> u64 {
        self.worker_bytes().saturating_add(sum(&self.daemon))
    }

    /// Refuses what does not fit. `None` is a system that does not say what is available.
    ///
    /// # Errors
    /// [`PlanError::TooLarge`], with the table and what would fit.
    pub fn check(&self, available: Option<&Available>) -> Result<(), PlanError> {
        let Some(available) = available.filter(|available| available.bytes < self.bytes()) else {
            return Ok(());
        };
        Err(PlanError::TooLarge {
            needs: mebibytes(self.bytes()),
            available: mebibytes(available.bytes),
            by: available.by.clone(),
            table: self.table(),
            hint: advice::advice(&self.header, &self.settings, available.bytes),
        })
    }

    /// A line for each row, and the sum.
    pub fn table(&self) -> String {
        let mut table = String::new();
        let mut line = |what: &str, bytes: u64, how: &str| {
            // Writing to a string cannot fail.
            let _ = writeln!(table, "  {what:<18}{:>12}  {how}", mebibytes(bytes));
        };
        for row in self.worker.iter().chain(&self.daemon) {
            line(row.what, row.bytes, &row.how);
        }
        let bound = if self.unknown.is_empty() { "" } else { "at least: " };
        line(
            "sum",
            self.bytes(),
            &format!("{bound}{}", self.unknown.join("; ")),
        );
        table
    }
}

fn sum(rows: &[Row]) -> u64 {
    rows.iter().fold(0, |sum, row| sum.saturating_add(row.bytes))
}

/// Bytes for people.
pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
