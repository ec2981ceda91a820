//! A teacher's answers as rows to train on: sequence-level distillation.

mod journal;
mod teller;

use std::path::PathBuf;

pub use journal::Journal;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
pub use teller::{Open, Told, open};

use crate::data::{Content, DataError, Row};
use crate::model::ModelError;
use crate::random::Random;
use crate::rollout::Draw;

/// What decides the answers. Two runs with equal settings give the same file, if the teacher is the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// A checkpoint folder, a GGUF file, or a server's address.
    pub teacher: String,
    /// An adapter over the checkpoint.
    pub adapter: Option<PathBuf>,
    /// The model's name on the server.
    pub model: Option<String>,
    /// The sha256 of the file of prompts.
    pub prompts_sha256: String,
    /// So many rows of it at most.
    pub max_rows: Option<usize>,
    /// The temperature of the drawing; 0 takes the most probable token.
    pub temperature: f64,
    /// Of so many of the most probable tokens; 0 of all.
    pub top_k: usize,
    /// Of the most probable tokens that together have this probability.
    pub top_p: f64,
    /// The most tokens of an answer.
    pub max_new_tokens: usize,
    /// Answers to each prompt.
    pub num_generations: usize,
    /// What the drawing begins with.
    pub seed: u64,
    /// Whether answers that were cut are kept among the others.
    pub keep_cut: bool,
}

impl Settings {
    /// How tokens are drawn.
    pub fn draw(&self) -> Draw {
        Draw {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
        }
    }

    /// The random numbers of one answer: its own, so that a run that goes on draws what it would have drawn.
    pub fn stream(&self, line: usize, generation: usize) -> Random {
        Random::new(self.seed, &format!("generate {line} {generation}"))
    }
}

/// What can go wrong while a teacher answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The teacher cannot be opened, or its server fails.
    #[error(transparent)]
    Teacher(#[from] crate::teacher::TeacherError),
    /// The teacher's weights cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A prompt cannot be made.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// llama.cpp failed.
    #[error("{path}: {source}", path = .path.display())]
    LlamaCpp {
        /// The GGUF file.
        path: PathBuf,
        /// What it said.
        source: crate::rollout::DecodeError,
    },
    /// The file of an unfinished run cannot be read or written.
    #[error("{path}: {source}", path = .path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An unfinished run is of something else.
    #[error(
        "{path} was begun with other settings: `{key}` is {found} there and {wanted} here\nhint: the same arguments go on with it; to begin anew remove it, or name another file with -o", path = .path.display()
    )]
    Settings {
        /// The file.
        path: PathBuf,
        /// The setting.
        key: String,
        /// Its value there.
        found: String,
        /// Its value here.
        wanted: String,
    },
    /// A file in the place of an unfinished run is none.
    #[error("{path} is no unfinished run: {why}\nhint: remove it, or name another file with -o", path = .path.display())]
    NoJournal {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Another process works on the same file.
    #[error("{path}: another process writes these answers", path = .path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
}

/// What became of one answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A row to train on.
    Row(Map<String, Value>),
    /// No row, and why.
    Rejected {
        /// The reason.
        why: String,
        /// What was answered, where something was.
        #[serde(skip_serializing_if = "Option::is_none")]
        answer: Option<String>,
    },
}

/// An answer's place: the line of its prompt, and which of the answers to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The line in the file of prompts, from 1.
    pub line: usize,
    /// Which answer to this prompt, from 0.
    pub generation: usize,
}

/// A row with a teacher's answer: the columns that it had, and where the answer comes from.
pub fn answered(row: &Row, place: Place, teacher: &str, told: &Told) -> Map<String, Value> {
    let mut json = Map::new();
    match &row.content {
        Content::Messages(messages) => {
            let mut messages = before_answer(messages).to_vec();
            let mut answer = json!({"role": "assistant", "content": told.text});
            if let Some(calls) = &told.tool_calls {
                answer["tool_calls"] = calls.clone();
            }
            messages.push(answer);
            json.insert("messages".into(), json!(messages));
        }
        Content::Completion { prompt, .. } => {
            json.insert("prompt".into(), json!(prompt));
            json.insert("completion".into(), json!(told.text));
        }
        Content::Text(text) => {
            json.insert("text".into(), json!(text));
        }
    }
    if let Some(tools) = &row.tools {
        json.insert("tools".into(), tools.clone());
    }
    json.extend(row.columns.clone());
    let finish = if told.finished { "stop" } else { "length" };
    json.insert(
        "generated".into(),
        json!({"teacher": teacher, "line": place.line, "generation": place.generation, "finish_reason": finish}),
    );
    json
}

/// The turns before the last answer.
pub fn before_answer(messages: &[Value]) -> &[Value] {
    let last = messages
        .iter()
        .rposition(|message| message["role"] == "assistant");
    &messages[..last.unwrap_or(messages.len())]
}

/// What becomes of what a teacher told.
pub fn outcome(
    row: &Row,
    place: Place,
    teacher: &str,
    told: Result<Told, String>,
    keep_cut: bool,
) -> Outcome {
    let rejected = |why: &str, answer| Outcome::Rejected {
        why: why.to_owned(),
        answer,
    };
    match told {
        Err(why) => rejected(&why, None),
        Ok(told) if told.text.trim().is_empty() && told.tool_calls.is_none() => {
            rejected("an empty answer", None)
        }
        Ok(told) if !told.finished && !keep_cut => rejected("cut at --max-new-tokens", Some(told.text)),
        Ok(told) => Outcome::Row(answered(row, place, teacher, &told)),
    }
}
