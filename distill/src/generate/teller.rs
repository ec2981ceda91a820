//! Who answers: a checkpoint, a GGUF file in llama.cpp, or a server. The first two are given tokens by their own
//! tokenizer and template, a server makes its own.

use std::path::{Path, PathBuf};

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use pipit_convert::evaluate::EvaluateError;
use pipit_convert::llama_cpp;
use serde_json::Value;

use super::{GenerateError, Settings, before_answer};
use crate::adapter::Adapter;
use crate::data::{Content, Encoder, Row};
use crate::model::{Keep, Model};
use crate::rollout::{Decode, LlamaCpp, Rollout, RolloutOptions, Stop, Student, rollouts};
use crate::teacher::served::{Draw, Question, ServedOptions, ServedTeacher};
use crate::teacher::{Spec, TeacherError};

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// The text.
    pub text: String,
    /// Calls of tools.
    pub tool_calls: Option<Value>,
    /// Whether it ended by itself.
    pub finished: bool,
}

/// A teacher that is ready to answer.
#[derive(Debug)]
pub enum Open {
    /// In candle.
    Checkpoint(Box<Model>, Box<Encoder>),
    /// In llama.cpp.
    Gguf(Box<LlamaModel>, Box<Encoder>, PathBuf),
    /// Elsewhere.
    Served(Box<ServedTeacher>),
}

/// The answer to a row, or why there is none.
type Answer = Result<Told, String>;

/// Opens the teacher that the settings name.
pub fn open(settings: &Settings, served: ServedOptions) -> Result<Open, GenerateError> {
    match (Spec::parse(&settings.teacher), &settings.adapter) {
        (Spec::Checkpoint(path), adapter) => {
            let mut model = Model::open_as(&path, Keep::Frozen)?;
            if let Some(adapter) = adapter {
                Adapter::load(&mut model, adapter).map_err(TeacherError::from)?;
            }
            let encoder = Encoder::open(&path, model.config().vocab_size)?;
            Ok(Open::Checkpoint(Box::new(model), Box::new(encoder)))
        }
        (_, Some(adapter)) => Err(TeacherError::AdapterHere {
            adapter: adapter.clone(),
        }
        .into()),
        (Spec::Gguf(path), None) => {
            let model = llama_cpp::load(&path, &LlamaModelParams::default()).map_err(|source| {
                TeacherError::from(EvaluateError::LlamaCpp {
                    path: path.clone(),
                    source,
                })
            })?;
            let encoder = Encoder::open(&path, usize::try_from(model.n_vocab()).unwrap_or(0))?;
            Ok(Open::Gguf(Box::new(model), Box::new(encoder), path))
        }
        (Spec::Served(url), None) => {
            let teacher = ServedTeacher::connect(&url, served).map_err(TeacherError::from)?;
            Ok(Open::Served(Box::new(teacher)))
        }
    }
}

impl Open {
    /// `num_generations` answers to each row, those to one row one after another. `width` sequences are open at once.
    pub fn answers(
        &self,
        prompts: &Path,
        rows: &[&Row],
        settings: &Settings,
        width: usize,
    ) -> Result<Vec<Answer>, GenerateError> {
        match self {
            Self::Checkpoint(model, encoder) => {
                let decoder = Student::new(model)?;
                decoded(
                    decoder,
                    encoder,
                    model.longest(),
                    (prompts, rows),
                    settings,
                    width,
                )
            }
            Self::Gguf(model, encoder, path) => {
                let failed = |source| GenerateError::LlamaCpp {
                    path: path.clone(),
                    source,
                };
                let longest = longest(encoder, prompts, rows, settings)?.min(model.n_ctx_train() as usize);
                let width = width.max(settings.num_generations);
                let decoder = LlamaCpp::new(model, longest, width).map_err(failed)?;
                let decoder = Named(decoder, path);
                decoded(decoder, encoder, longest, (prompts, rows), settings, width)
            }
            Self::Served(teacher) => served(teacher, rows, settings),
        }
    }
}

/// The tokens that the longest prompt and its answer take.
fn longest(
    encoder: &Encoder,
    prompts: &Path,
    rows: &[&Row],
    settings: &Settings,
) -> Result<usize, GenerateError> {
    let mut longest = 0;
    for row in rows {
        let prompt = encoder.prompt(prompts, row)?;
        longest = longest.max(prompt.map_or(0, |prompt| prompt.ids.len()));
    }
    Ok(longest + settings.max_new_tokens)
}

/// llama.cpp whose errors say which file they are about.
struct Named<'m>(LlamaCpp<'m>, &'m Path);

impl Decode for Named<'_> {
    type Error = GenerateError;

    fn longest(&self) -> usize {
        self.0.longest()
    }
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }
    fn worth_opening(&self, width: usize) -> usize {
        self.0.worth_opening(width)
    }
    fn open(&mut self, prompts: &[&[u32]], copies: usize) -> Result<Vec<f32>, GenerateError> {
        let done = self.0.open(prompts, copies);
        done.map_err(|source| self.failed(source))
    }
    fn retain(&mut self, keep: &[bool]) -> Result<(), GenerateError> {
        let done = self.0.retain(keep);
        done.map_err(|source| self.failed(source))
    }
    fn next(&mut self, tokens: &[u32]) -> Result<Vec<f32>, GenerateError> {
        let done = self.0.next(tokens);
        done.map_err(|source| self.failed(source))
    }
}

impl Named<'_> {
    fn failed(&self, source: crate::rollout::DecodeError) -> GenerateError {
        GenerateError::LlamaCpp {
            path: self.1.to_path_buf(),
            source,
        }
    }
}

fn decoded<D: Decode>(
    mut decoder: D,
    encoder: &Encoder,
    longest: usize,
    (path, rows): (&Path, &[&Row]),
    settings: &Settings,
    width: usize,
) -> Result<Vec<Answer>, GenerateError>
where
    GenerateError: From<D::Error>,
{
    // The prompt of each row, or why it has none.
    let mut prompts: Vec<Result<Vec<u32>, String>> = Vec::with_capacity(rows.len());
    for row in rows {
        let ids = encoder
            .prompt(path, row)?
            .map(|prompt| prompt.ids)
            .unwrap_or_default();
        prompts.push(match ids.len() {
            0 => Err("an empty prompt".into()),
            tokens if tokens >= longest => Err(format!(
                "the prompt has {tokens} tokens, and the teacher takes {longest} with the answer"
            )),
            _ => Ok(ids),
        });
    }
    let asked = prompts
        .iter()
        .zip(rows)
        .filter_map(|(prompt, row)| Some((prompt.as_deref().ok()?, row.line)));
    let (ids, lines): (Vec<&[u32]>, Vec<usize>) = asked.unzip();
    let generations = settings.num_generations;
    let mut streams: Vec<_> = lines
        .iter()
        .flat_map(|line| (0..generations).map(|generation| settings.stream(*line, generation)))
        .collect();
    let options = RolloutOptions {
        draw: settings.draw(),
        num_generations: generations,
        width,
    };
    let stop = Stop {
        eos: encoder.eos(),
        max_new_tokens: settings.max_new_tokens,
    };
    let mut drawn = rollouts(&mut decoder, &ids, &options, &stop, &mut streams)?.into_iter();
    let mut answers = Vec::with_capacity(rows.len() * generations);
    for (prompt, row) in prompts.iter().zip(rows) {
        let goes_on = !matches!(row.content, Content::Messages(_));
        for _ in 0..generations {
            answers.push(match (prompt, prompt.as_ref().ok().and_then(|_| drawn.next())) {
                (Ok(prompt), Some(rollout)) => Ok(told(encoder, prompt, rollout, goes_on)?),
                (Ok(_), None) => Err("the teacher gave no answer".into()),
                (Err(why), _) => Err(why.clone()),
            });
        }
    }
    Ok(answers)
}

/// The text of an answer. One that goes on with a text is what it adds to that: some tokenizers write a blank between
/// tokens that neither of them has, and none at the beginning.
fn told(
    encoder: &Encoder,
    prompt: &[u32],
    mut rollout: Rollout,
    goes_on: bool,
) -> Result<Told, GenerateError> {
    let finished = rollout.ids.pop_if(|last| encoder.eos().contains(last)).is_some();
    let alone = encoder.decode(&rollout.ids)?;
    let text = match goes_on {
        false => alone,
        true => {
            let whole = encoder.decode(&[prompt, &rollout.ids].concat())?;
            let added = whole.strip_prefix(&encoder.decode(prompt)?).map(str::to_owned);
            added.unwrap_or(alone)
        }
    };
    Ok(Told {
        text,
        tool_calls: None,
        finished,
    })
}

fn served(teacher: &ServedTeacher, rows: &[&Row], settings: &Settings) -> Result<Vec<Answer>, GenerateError> {
    let mut questions = Vec::new();
    for row in rows {
        for generation in 0..settings.num_generations {
            let question = match &row.content {
                Content::Messages(messages) => Question::Chat {
                    messages: before_answer(messages),
                    tools: row.tools.as_ref(),
                },
                Content::Completion { prompt, .. } => Question::Text(prompt),
                Content::Text(text) => Question::Text(text),
            };
            questions.push((question, settings.stream(row.line, generation).u64()));
        }
    }
    let draw = Draw {
        temperature: settings.temperature,
        top_k: settings.top_k,
        top_p: settings.top_p,
        max_new_tokens: settings.max_new_tokens,
    };
    let answers = teacher.answers(&questions, draw).map_err(TeacherError::from)?;
    let told = |answer: crate::teacher::served::Answered| Told {
        text: answer.text,
        tool_calls: answer.tool_calls,
        finished: answer.finished,
    };
    Ok(answers.into_iter().map(|answer| answer.map(told)).collect())
}
