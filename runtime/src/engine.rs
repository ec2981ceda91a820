//! The engine: what runs inside the worker process.
//!
//! In: [`ToWorker`] frames, one JSON object a line, on standard input. Out: [`FromWorker`] frames on standard
//! output. Every frame about a request carries its job number, because several are under way at a time. The worker
//! ends when its input ends. A failed assertion inside ggml aborts a process and an out-of-memory kill ends
//! one: that is why this is a process of its own (docs/decisions/0002).
//!
//! Inside, data flows from [`prompt`] (messages become tokens) through the [`scheduler`] (every step of the model
//! serves all requests under way, out of one [`pool`] of context) to [`pipit_sampler`], [`constraint`] and [`output`].

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::thermal::Step;
use crate::wire::{ErrorCode, Message};

pub mod constraint;
pub mod context;
pub mod interrupt;
pub mod llama;
pub mod output;
pub mod pace;
pub mod pool;
pub mod prefix;
pub mod prompt;
pub mod scheduler;
pub mod slot;
mod work;

pub use work::run;

/// What the worker is started with, as the first line of its input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The GGUF file.
    pub model: PathBuf,
    /// Context in tokens, shared by all requests; one request gets at most what the model was trained for.
    pub n_ctx: u32,
    /// Requests under way at a time.
    pub slots: u32,
    /// Threads; 0 is one for each fast physical core.
    pub threads: u32,
    /// Type of the keys in the KV cache, as llama.cpp spells it.
    pub cache_type_k: String,
    /// Type of the values in the KV cache.
    pub cache_type_v: String,
    /// Most tokens of prefill in one step.
    pub prefill_chunk: u32,
    /// Milliseconds that a step of prefill should take at most.
    pub prefill_ms: u32,
    /// LoRA adapters by name.
    pub adapters: BTreeMap<String, PathBuf>,
    /// Bytes of memory for beginnings of prompts that nobody computes with at the moment.
    pub prefix_bytes: u64,
    /// Where they live through a restart.
    pub prefix_disk: Option<prefix::disk::Place>,
}

impl Settings {
    /// For one sequence at a time, with nothing kept: to measure a model.
    pub fn alone(model: PathBuf, n_ctx: u32, threads: u32, cache_type: &str) -> Self {
        Self {
            model,
            n_ctx,
            slots: 1,
            threads,
            cache_type_k: cache_type.to_owned(),
            cache_type_v: cache_type.to_owned(),
            prefill_chunk: llama::N_BATCH,
            prefill_ms: u32::MAX,
            adapters: BTreeMap::new(),
            prefix_bytes: 0,
            prefix_disk: None,
        }
    }
}

/// One request, ready to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// The conversation.
    pub messages: Vec<Message>,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// How to choose tokens.
    pub sampling: pipit_sampler::Settings,
    /// JSON schema of the answer.
    pub schema: Option<Value>,
    /// LoRA adapter.
    pub adapter: Option<String>,
    /// Whether the text is wanted piece by piece.
    pub stream: bool,
    /// Milliseconds from now by which the work must have begun.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// From the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum ToWorker {
    /// Load the model.
    Load(Settings),
    /// The model file's SHA-256, in hexadecimal digits: what is kept on the disk belongs to it.
    Identity {
        /// The digits.
        sha256: String,
    },
    /// Answer a request.
    Run {
        /// Its number.
        job: u64,
        /// The request.
        #[serde(flatten)]
        request: Box<Job>,
    },
    /// The machine gets hot, or cool again.
    Ease {
        /// What to do.
        step: Step,
    },
    /// Stop working on a request; its end is reported as cancelled.
    Cancel {
        /// Its number.
        job: u64,
    },
}

/// What was loaded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// `general.name`, else the file's name.
    pub name: String,
    /// `general.architecture`
    pub architecture: String,
    /// Spelled as llama.cpp spells it, from `general.file_type`.
    pub quantisation: String,
    /// Bytes of the weights.
    pub bytes: u64,
    /// Number of weights.
    pub parameters: u64,
    /// Context in tokens.
    pub context: u32,
    /// Context the model was trained for.
    pub context_trained: u32,
    /// Whether the file holds a chat template; without one the messages are joined as they are.
    pub chat_template: bool,
    /// Requests under way at a time.
    pub slots: u32,
    /// Names of the LoRA adapters that were loaded.
    pub adapters: Vec<String>,
    /// Threads in use.
    pub threads: u32,
    /// Milliseconds that loading took.
    pub load_ms: u64,
}

/// How a request ended well.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    /// The whole text.
    pub text: String,
    /// `stop` or `length`.
    pub finish_reason: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Those of them that were computed before, for another request.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Milliseconds of prefill.
    pub prompt_ms: f64,
    /// Milliseconds of decode.
    pub predicted_ms: f64,
}

/// To the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum FromWorker {
    /// The model is loaded.
    Ready(ModelInfo),
    /// The model cannot be loaded; the worker ends.
    Unloadable {
        /// Why.
        message: String,
    },
    /// Text to append.
    Delta {
        /// Whose.
        job: u64,
        /// The text.
        text: String,
    },
    /// The end of a request.
    Done {
        /// Whose.
        job: u64,
        /// How.
        #[serde(flatten)]
        finished: Finished,
    },
    /// The bad end of a request.
    Failed {
        /// Whose.
        job: u64,
        /// For programs.
        code: ErrorCode,
        /// For people.
        message: String,
    },
    /// Still alive.
    Heartbeat,
}

/// Why a request came to a bad end.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The prompt does not fit.
    #[error("the prompt has {tokens} tokens, the context {context}")]
    TooLarge {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens of the context.
        context: u32,
    },
    /// The chat template refused the conversation.
    #[error("the model's chat template refused the messages: {0}")]
    Template(String),
    /// The schema cannot be obeyed.
    #[error("`response_format`: {0}")]
    Schema(String),
    /// The adapter was not loaded.
    #[error("the adapter `{0}` could not be loaded; hint: the device's log says why")]
    Adapter(String),
    /// It had to wait too long.
    #[error("the deadline passed before the work began")]
    Expired,
    /// The client does not want it any more.
    #[error("cancelled")]
    Cancelled,
    /// llama.cpp failed.
    #[error("{0}")]
    Llama(String),
}

impl JobError {
    /// What the client is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::TooLarge { .. } => ErrorCode::TooLarge,
            Self::Template(_) | Self::Schema(_) => ErrorCode::InvalidRequest,
            Self::Adapter(_) => ErrorCode::ModelUnavailable,
            Self::Expired => ErrorCode::Expired,
            Self::Cancelled => ErrorCode::Cancelled,
            Self::Llama(_) => ErrorCode::Internal,
        }
    }
}
