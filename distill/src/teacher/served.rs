//! A teacher behind a server that speaks OpenAI's API: vLLM, which scores a whole text in one request, or llama-server,
//! which is asked token by token.

mod answer;
mod http;
mod llama_server;
mod vllm;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

pub use answer::{Answered, Draw, Question};
use http::Client;
use serde_json::{Value, json};

use super::{Asked, Scores, Teacher, TeacherError, TopK, label_places};

/// How a server is asked.
#[derive(Debug, Clone)]
pub struct ServedOptions {
    /// The most probable tokens that it tells of every place; 0 for the labels' own probability only.
    pub top_k: usize,
    /// The student's tokens: others count to the tail.
    pub vocab_size: usize,
    /// The model's name, where the server has more than one.
    pub model: Option<String>,
    /// Requests that are under way at once, at most.
    pub concurrency: usize,
    /// The time that one request may take.
    pub timeout: Duration,
    /// How often a request is sent before it is given up, where a failure may pass.
    pub attempts: usize,
    /// What the server wants to see as `Authorization: Bearer …`.
    pub api_key: Option<String>,
}

impl Default for ServedOptions {
    fn default() -> Self {
        Self {
            top_k: 20,
            vocab_size: usize::MAX,
            model: None,
            concurrency: 8,
            timeout: Duration::from_secs(300),
            attempts: 5,
            api_key: None,
        }
    }
}

/// What can go wrong with a server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServedError {
    /// The address is none.
    #[error("{url} is no address of a server\nhint: http://HOST:PORT, or https://HOST")]
    Url {
        /// What was given.
        url: String,
    },
    /// It does not answer, or says that it cannot now, as often as it was asked.
    #[error("{url}: {why}; asked {attempts} times\nhint: is the server up, and is its address right?")]
    Unreachable {
        /// The address.
        url: String,
        /// What happened last.
        why: String,
        /// How often it was asked.
        attempts: usize,
    },
    /// It refuses the request.
    #[error("{url} answers {status}: {why}{}", hint(.why))]
    Refused {
        /// The address.
        url: String,
        /// The status of the answer.
        status: u16,
        /// What it says.
        why: String,
    },
    /// Its answer is not of the form that is documented.
    #[error("{url}: the answer {why}")]
    Answer {
        /// The address.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// The server is another program.
    #[error(
        "{url} is a server of {owner:?}, and only those of vLLM and llama.cpp tell how probable a given text is\nhint: pipit-distill generate takes its answers, which every server gives"
    )]
    Kind {
        /// The address.
        url: String,
        /// What it says of itself.
        owner: String,
    },
    /// The server has other models.
    #[error("{url} has no model {model:?}\nhint: it has {known}")]
    Model {
        /// The address.
        url: String,
        /// The name that was asked for.
        model: String,
        /// The names that it has.
        known: String,
    },
}

fn hint(why: &str) -> &'static str {
    match why.contains("prompt logprobs") || why.contains("prompt_logprobs") || why.contains("max_logprobs") {
        true => "\nhint: vLLM gives as many as it was started for: --max-logprobs N, 20 by default",
        false => "",
    }
}

/// Which server it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Vllm,
    LlamaServer,
    Other,
}

/// A server that answers and, if it can, scores.
#[derive(Debug)]
pub struct ServedTeacher {
    client: Client,
    options: ServedOptions,
    kind: Kind,
    owner: String,
    model: String,
    /// The most tokens of a sequence, where the server tells.
    longest: Option<usize>,
    /// How many requests llama-server works on at once.
    slots: usize,
}

/// What one sequence gets.
type SequenceScores = Vec<Place>;

/// What a server says of one place: tokens and their log p, the most probable first, and log p of the label.
#[derive(Debug, Clone, PartialEq)]
struct Place {
    top: Vec<(u32, f32)>,
    label: f32,
}

impl ServedTeacher {
    /// Asks the server what it is and which models it has.
    pub fn connect(url: &str, options: ServedOptions) -> Result<Self, ServedError> {
        let client = Client::new(url, &options)?;
        let models = client.get("/v1/models")?;
        let listed: Vec<&Value> = models["data"].as_array().into_iter().flatten().collect();
        let name = |model: &Value| model["id"].as_str().unwrap_or_default().to_owned();
        let chosen = match &options.model {
            Some(wanted) => listed.iter().find(|model| name(model) == *wanted),
            None => listed.first(),
        };
        let chosen = *chosen.ok_or_else(|| ServedError::Model {
            url: client.url().to_owned(),
            model: options.model.clone().unwrap_or_default(),
            known: listed
                .iter()
                .map(|model| name(model))
                .collect::<Vec<_>>()
                .join(", "),
        })?;
        let owner = chosen["owned_by"].as_str().unwrap_or_default().to_owned();
        let size = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        let mut teacher = Self {
            kind: match owner.as_str() {
                "vllm" => Kind::Vllm,
                "llamacpp" => Kind::LlamaServer,
                _ => Kind::Other,
            },
            model: name(chosen),
            longest: size(&chosen["max_model_len"]).or_else(|| size(&chosen["meta"]["n_ctx"])),
            owner,
            options,
            client,
            slots: 1,
        };
        if teacher.kind == Kind::LlamaServer {
            let props = teacher.client.get("/props")?;
            teacher.slots = size(&props["total_slots"]).unwrap_or(1).max(1);
            teacher.longest = teacher
                .longest
                .or_else(|| size(&props["default_generation_settings"]["n_ctx"]));
        }
        Ok(teacher)
    }

    /// The tokens of a text without those around it, where the server has a way to say: `/tokenize`.
    pub fn tokens(&self, text: &str) -> Result<Option<Vec<u32>>, ServedError> {
        let body = match self.kind {
            Kind::Vllm => json!({"model": self.model, "prompt": text, "add_special_tokens": false}),
            Kind::LlamaServer => json!({"content": text, "add_special": false, "parse_special": true}),
            Kind::Other => return Ok(None),
        };
        let answer = self.client.post("/tokenize", &body)?;
        let ids = answer["tokens"].as_array().into_iter().flatten();
        let ids: Option<Vec<u32>> = ids.map(|id| u32::try_from(id.as_u64()?).ok()).collect();
        ids.map(Some).ok_or_else(|| self.client.bad("has no tokens"))
    }

    /// Requests that make sense at once.
    fn workers(&self) -> usize {
        match self.kind {
            Kind::LlamaServer => self.options.concurrency.min(self.slots),
            Kind::Vllm | Kind::Other => self.options.concurrency,
        }
        .max(1)
    }

    fn score_one(&self, asked: &Asked<'_>, worker: usize) -> Result<SequenceScores, TeacherError> {
        // One token is generated after the text, or stands in for its last.
        let longest = self
            .longest
            .map_or(usize::MAX, |longest| longest.saturating_sub(1));
        asked.check_length(longest, || self.name())?;
        if labels(asked).next().is_none() {
            return Ok(Vec::new());
        }
        let scores = match self.kind {
            Kind::Vllm => vllm::score(self, asked),
            Kind::LlamaServer => llama_server::score(self, asked, worker),
            Kind::Other => Err(ServedError::Kind {
                url: self.client.url().to_owned(),
                owner: self.owner.clone(),
            }),
        };
        Ok(scores?)
    }
}

impl Teacher for ServedTeacher {
    fn name(&self) -> String {
        format!("{} at {}", self.model, self.client.url())
    }

    fn vocab_size(&self) -> usize {
        self.options.vocab_size
    }

    fn score(&mut self, sequences: &[Asked<'_>]) -> Result<Scores, TeacherError> {
        let this = &*self;
        let scores = in_parallel(sequences.len(), this.workers(), |i, worker| {
            this.score_one(&sequences[i], worker)
        })?;
        let places: Vec<Place> = scores.into_iter().flatten().collect();
        if self.options.top_k == 0 {
            return Ok(Scores::Label(places.iter().map(|place| place.label).collect()));
        }
        // Where a server tells fewer tokens of one place, or some that the student does not have, all places get as many.
        let k = places.iter().map(|place| place.top.len()).min().unwrap_or(0);
        if k == 0 && !places.is_empty() {
            return Err(self.client.bad("names no token that the student has").into());
        }
        let top = || places.iter().flat_map(|place| &place.top[..k]);
        Ok(Scores::Top(TopK {
            k,
            ids: top().map(|(id, _)| *id).collect(),
            logprobs: top().map(|(_, logprob)| *logprob).collect(),
        }))
    }
}

/// Tokens in the order of their probability, at most `k`, those only that the student has.
fn most_probable(mut tokens: Vec<(u32, f32)>, k: usize, vocab_size: usize) -> Vec<(u32, f32)> {
    tokens.retain(|(id, _)| (*id as usize) < vocab_size);
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    tokens.truncate(k);
    tokens
}

/// Does `count` jobs with so many threads, each of which has a number. The first error ends all that has not begun.
fn in_parallel<T: Send, E: Send>(
    count: usize,
    workers: usize,
    job: impl Fn(usize, usize) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let done: Mutex<Vec<(usize, Result<T, E>)>> = Mutex::default();
    std::thread::scope(|scope| {
        for worker in 0..workers.min(count) {
            let (next, failed, done, job) = (&next, &failed, &done, &job);
            scope.spawn(move || {
                while !failed.load(Ordering::Relaxed) {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count {
                        break;
                    }
                    let result = job(i, worker);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    done.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((i, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}

/// The places of a sequence that are asked about, with their labels.
fn labels<'a>(asked: &Asked<'a>) -> impl Iterator<Item = (usize, u32)> + use<'a> {
    let labels = asked.labels;
    label_places(labels).map(move |place| (place, u32::try_from(labels[place]).unwrap_or(0)))
}

/// The key that a server wants: what `PIPIT_TEACHER_API_KEY` says. It is no option, so that it stands in no list of
/// processes and in no configuration of a run.
pub fn api_key_from_environment() -> Option<String> {
    std::env::var("PIPIT_TEACHER_API_KEY")
        .ok()
        .filter(|key| !key.is_empty())
}
