//! The engine: what runs inside the worker process.
//!
//! In: [`ToWorker`] frames, one JSON object a line, on standard input. Out: [`FromWorker`] frames on standard
//! output. Every frame about a request carries its job number, so that several can be under way. The worker
//! ends when its input ends. A failed assertion inside ggml aborts a process and an out-of-memory kill ends
//! one: that is why this is a process of its own (docs/decisions/0002).

use std::collections::VecDeque;
use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::kernels;
use crate::wire::{ErrorCode, Message};

pub mod llama;
pub mod output;
pub mod prompt;
pub mod sampler;

/// A sign of life at least this often, so that a hang is noticed.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Longest line that is read; the daemon's own limits are far below.
pub const MOST_FRAME_BYTES: usize = 16 * 1024 * 1024;

/// What the worker is started with, as the first line of its input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The GGUF file.
    pub model: PathBuf,
    /// Context in tokens; cut to what the model was trained for.
    pub n_ctx: u32,
    /// Threads; 0 is one for each physical core.
    pub threads: u32,
    /// Tokens of prefill between two looks at the input, where a cancel is heard.
    pub prefill_chunk: u32,
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
    pub sampling: sampler::Settings,
}

/// From the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum ToWorker {
    /// Load the model.
    Load(Settings),
    /// Answer a request.
    Run {
        /// Its number.
        job: u64,
        /// The request.
        #[serde(flatten)]
        request: Box<Job>,
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
    /// The client does not want it any more.
    #[error("cancelled")]
    Cancelled,
    /// llama.cpp failed.
    #[error("{0}")]
    Llama(String),
}

impl JobError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::TooLarge { .. } => ErrorCode::TooLarge,
            Self::Template(_) => ErrorCode::InvalidRequest,
            Self::Cancelled => ErrorCode::Cancelled,
            Self::Llama(_) => ErrorCode::Internal,
        }
    }
}

/// The worker's main function: loads, answers, ends with its input.
///
/// # Errors
/// A model that cannot be loaded, after it was reported.
pub fn run() -> anyhow::Result<()> {
    // Should the daemon die without closing the pipe (it holds the only write end, so it cannot), this ends us too.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // Before llama.cpp is touched: an illegal instruction says nothing.
    let lacking = kernels::lacking();
    if !lacking.is_empty() {
        let message = kernels::refusal(&lacking);
        send(&FromWorker::Unloadable {
            message: message.clone(),
        })?;
        anyhow::bail!(message);
    }
    let inbox = read_frames()?;
    let settings = match inbox.recv() {
        Ok(ToWorker::Load(settings)) => settings,
        Ok(_) => anyhow::bail!("the first frame must be `load`"),
        Err(_) => return Ok(()),
    };
    let mut engine = match llama::Llama::load(&settings) {
        Ok(engine) => engine,
        Err(error) => {
            send(&FromWorker::Unloadable {
                message: error.to_string(),
            })?;
            return Err(error.into());
        }
    };
    send(&FromWorker::Ready(engine.info().clone()))?;
    let mut waiting: VecDeque<(u64, Job)> = VecDeque::new();
    loop {
        while let Some((job, request)) = waiting.pop_front() {
            answer(&mut engine, job, &request, &inbox, &mut waiting)?;
        }
        match inbox.recv_timeout(HEARTBEAT) {
            Ok(frame) => {
                sort(frame, None, &mut waiting)?;
            }
            Err(RecvTimeoutError::Timeout) => send(&FromWorker::Heartbeat)?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// Puts a frame where it belongs; true when it cancels `running`.
fn sort(frame: ToWorker, running: Option<u64>, waiting: &mut VecDeque<(u64, Job)>) -> std::io::Result<bool> {
    match frame {
        ToWorker::Run { job, request } => waiting.push_back((job, *request)),
        ToWorker::Cancel { job } if running == Some(job) => return Ok(true),
        ToWorker::Cancel { job } => {
            if let Some(at) = waiting.iter().position(|(number, _)| *number == job) {
                waiting.remove(at);
                let error = JobError::Cancelled;
                send(&FromWorker::Failed {
                    job,
                    code: error.code(),
                    message: error.to_string(),
                })?;
            }
        }
        ToWorker::Load(_) => tracing::warn!("a second `load` is ignored: a model is changed by a new worker"),
    }
    Ok(false)
}

fn answer(
    engine: &mut llama::Llama,
    job: u64,
    request: &Job,
    inbox: &Receiver<ToWorker>,
    waiting: &mut VecDeque<(u64, Job)>,
) -> std::io::Result<()> {
    let mut broken = None;
    let result = engine.answer(request, &mut |text| {
        let step = (|| {
            if text.is_empty() {
                send(&FromWorker::Heartbeat)?;
            } else {
                send(&FromWorker::Delta {
                    job,
                    text: text.to_owned(),
                })?;
            }
            let mut cancelled = false;
            while let Ok(frame) = inbox.try_recv() {
                cancelled |= sort(frame, Some(job), waiting)?;
            }
            Ok(cancelled)
        })();
        match step {
            Ok(cancelled) => !cancelled,
            Err(error) => {
                broken = Some(error);
                false
            }
        }
    });
    if let Some(error) = broken {
        return Err(error);
    }
    send(&match result {
        Ok(finished) => FromWorker::Done { job, finished },
        Err(error) => FromWorker::Failed {
            job,
            code: error.code(),
            message: error.to_string(),
        },
    })
}

/// Writes one frame.
fn send(frame: &FromWorker) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(frame)?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}

/// Reads frames on a thread of its own; the end of the input ends the process, also in the middle of a decode.
fn read_frames() -> std::io::Result<Receiver<ToWorker>> {
    let (frames, inbox) = channel();
    std::thread::Builder::new()
        .name("frames".to_owned())
        .spawn(move || {
            for line in std::io::stdin().lock().lines() {
                let Ok(line) = line else { break };
                match serde_json::from_str(&line) {
                    Ok(frame) => {
                        if frames.send(frame).is_err() {
                            break;
                        }
                    }
                    Err(error) => tracing::error!("a frame that is not understood: {error}"),
                }
            }
            std::process::exit(0);
        })?;
    Ok(inbox)
}
