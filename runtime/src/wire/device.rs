//! What a device says about itself: status, card and metrics. `health` fills them in.
//!
//! Sizes are in bytes, times in the unit of the name. What cannot be measured on a board is absent, never guessed.

use serde::{Deserialize, Serialize};

use super::Limits;
use crate::thermal::Step;

/// State of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Connected, and no model in memory: the worker has not begun yet, or the model was unloaded because nobody
    /// asked for a while. A request is taken, and loads it.
    Online,
    /// The worker loads the model; requests are taken and wait.
    Loading,
    /// Requests are answered.
    Ready,
    /// No model can be loaded; requests are refused.
    Degraded,
    /// Gone; also the will.
    Offline,
}

/// The status topic: retained, and the will.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Status {
    /// State of the device.
    pub state: State,
    /// Its name.
    pub device: String,
    /// Version of the program.
    pub version: String,
    /// Why it is degraded or offline.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}

/// The card topic: what the device is and serves; retained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Card {
    /// Version of the wire: 1.
    pub wire: u32,
    /// Name of the device.
    pub device: String,
    /// Versions of its programs.
    pub versions: Versions,
    /// The model that answers.
    pub model: ModelCard,
    /// Names of the LoRA adapters that a request may ask for.
    pub adapters: Vec<String>,
    /// Caps on a request.
    pub limits: Limits,
    /// Topics under which an answer may go, besides the device's own `res/`.
    pub reply_prefixes: Vec<String>,
    /// The pool that it belongs to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pool: Option<String>,
    /// The machine.
    pub board: Board,
}

/// Versions of programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Versions {
    /// The daemon.
    pub pipit: String,
}

/// A model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ModelCard {
    /// Its id among the installed models; absent for a file that the configuration names.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// `general.name` of the GGUF file, else the file's name.
    pub name: String,
    /// `general.architecture`
    pub architecture: String,
    /// Spelled as llama.cpp spells it.
    pub quantisation: String,
    /// SHA-256 of the file, 64 hexadecimal digits; empty until it is known.
    pub sha256: String,
    /// Bytes of the weights.
    pub bytes: u64,
    /// Number of weights.
    pub parameters: u64,
    /// Tokens of a conversation, prompt and answer.
    pub context: u32,
    /// Tokens that the model was trained for.
    pub context_trained: u32,
    /// Whether the file holds a chat template.
    pub chat_template: bool,
    /// Requests under way at a time; they share the context.
    pub slots: u32,
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Board {
    /// Architecture of the processor, as Rust names it: `aarch64`, `x86_64`.
    pub arch: String,
    /// Operating system: `linux`.
    pub os: String,
    /// Name of the board, from the device tree.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
    /// Processors that the daemon may use.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cpus: Option<u64>,
    /// Memory of the machine.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub memory_bytes: Option<u64>,
    /// The sensor by which energy is measured; what it does not see is not in any figure.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub energy_sensor: Option<String>,
}

/// The metrics topic: counters since the start, and what is measured now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Metrics {
    /// Seconds since the daemon began.
    pub uptime_s: u64,
    /// Requests that wait.
    pub waiting: u64,
    /// Requests that the worker has.
    pub running: u64,
    /// Requests taken.
    pub accepted: u64,
    /// Answers that are no errors.
    pub answered: u64,
    /// Answers that are errors.
    pub errors: u64,
    /// Requests that came again.
    pub duplicates: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Those of them that were computed before, for another request.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Decode speed of the last answer.
    pub tokens_per_second: f64,
    /// Workers that ended by themselves.
    pub worker_ends: u64,
    /// The journal's file.
    pub journal_bytes: u64,
    /// Resident memory of the daemon.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub daemon_resident_bytes: Option<u64>,
    /// Resident memory of the worker, the mapped part of the model among it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub worker_resident_bytes: Option<u64>,
    /// The hottest thermal zone, degrees Celsius.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub temperature_c: Option<f64>,
    /// What is done against heat: `cool` is nothing; absent where no sensor measures it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub thermal: Option<Step>,
    /// What the board draws now, in watts, where a sensor measures it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub power_w: Option<f64>,
    /// Joules that it drew since the start, with and without work.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub energy_j: Option<f64>,
    /// Joules for each token generated since the start: those of the answers alone.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub joules_per_token: Option<f64>,
}
