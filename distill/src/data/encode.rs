//! Rows to tokens: the checkpoint's tokenizer and chat template, and labels on the answers only.

use std::ops::Range;
use std::path::{Path, PathBuf};

use pipit_convert::checkpoint::read_json_object;
use pipit_convert::import::GgufCheckpoint;
use rayon::prelude::*;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::{Content, DataError, DataReport, Row, Rows};
use crate::batch::IGNORED;
use crate::template::ChatTemplate;

/// A token sequence with labels, −100 where nothing is trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The line of the row, from 1.
    pub line: usize,
    /// The tokens.
    pub ids: Vec<u32>,
    /// As many labels.
    pub labels: Vec<i64>,
}

/// The tokens before a row's last answer, and the answer that is expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The text of the prompt's last user turn, or of the whole prompt.
    pub question: String,
    /// The expected answer.
    pub answer: String,
}

/// Tokenizer, chat template and end tokens of a checkpoint.
#[derive(Debug)]
pub struct Encoder {
    tokenizer: Tokenizer,
    tokenizer_path: PathBuf,
    template: Option<ChatTemplate>,
    eos: Vec<u32>,
}

/// Tokens, the ranges of the answers in them, and whether a border is not clean.
type Spans = (Vec<u32>, Vec<Range<usize>>, bool);

enum Encoded {
    Sample {
        sample: Sample,
        truncated: bool,
        uneven: bool,
    },
    EmptyAnswer,
    NothingToTrain,
}

impl Encoder {
    /// Reads the tokenizer, the chat template and the end tokens of a checkpoint folder or a GGUF file; checks the
    /// tokens against the embedding.
    pub fn open(model: &Path, vocab_size: usize) -> Result<Self, DataError> {
        if !model.is_file() {
            return Self::open_folder(model, vocab_size);
        }
        let write = |source| DataError::Scratch { source };
        let folder = tempfile::tempdir().map_err(write)?;
        GgufCheckpoint::open(model)?.write_files(folder.path())?;
        Self::open_folder(folder.path(), vocab_size)
    }

    fn open_folder(dir: &Path, vocab_size: usize) -> Result<Self, DataError> {
        let path = dir.join("tokenizer.json");
        let bad = |why: String| DataError::Tokenizer {
            path: path.clone(),
            why,
        };
        if !path.is_file() {
            return Err(bad("is missing".into()));
        }
        let mut tokenizer = Tokenizer::from_file(&path).map_err(|e| bad(e.to_string()))?;
        // A tokenizer.json may ask for padding and truncation, for other programs' sake.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| bad(e.to_string()))?;
        if let Some(token) = tokenizer
            .get_vocab(true)
            .into_values()
            .max()
            .filter(|id| *id as usize >= vocab_size)
        {
            return Err(DataError::Vocabulary {
                path,
                token,
                vocab_size,
            });
        }
        let mut eos = Vec::new();
        for file in ["generation_config.json", "config.json"] {
            let file = dir.join(file);
            if file.is_file() {
                let json = read_json_object(&file)?;
                let ids = match json.get("eos_token_id") {
                    Some(Value::Array(ids)) => ids.clone(),
                    Some(id) => vec![id.clone()],
                    None => vec![],
                };
                eos.extend(ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
            }
        }
        eos.dedup();
        if eos.is_empty() {
            return Err(DataError::NoEos {
                path: dir.to_path_buf(),
            });
        }
        Ok(Self {
            template: ChatTemplate::open(dir)?,
            tokenizer,
            tokenizer_path: path,
            eos,
        })
    }

    /// The tokens that end an answer; the first is written after texts.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The text of tokens, without special ones.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        self.tokenizer.decode(ids, true).map_err(|e| self.bad(&e))
    }

    fn bad(&self, why: &tokenizers::Error) -> DataError {
        DataError::Tokenizer {
            path: self.tokenizer_path.clone(),
            why: why.to_string(),
        }
    }

    /// The tokens of a text, with the special ones that the tokenizer adds.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>, DataError> {
        self.ids(text, true)
    }

    /// The tokens of a text, with those that the tokenizer puts around it where they are asked for.
    pub fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, DataError> {
        let encoding = self
            .tokenizer
            .encode(text, add_special_tokens)
            .map_err(|e| self.bad(&e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// All rows of a file as samples of at most `max_length` tokens, and what became of the others.
    pub fn samples(
        &self,
        path: &Path,
        rows: &Rows,
        max_length: usize,
    ) -> Result<(Vec<Sample>, DataReport), DataError> {
        let mut report = DataReport {
            rows: rows.rows.len(),
            beyond_limit: rows.beyond_limit,
            ..DataReport::default()
        };
        let rows = &rows.rows;
        let encoded: Vec<_> = rows
            .par_iter()
            .map(|row| row.as_ref().ok().map(|row| self.encode(path, row, max_length)))
            .collect();
        let mut samples = Vec::new();
        for (row, encoded) in rows.iter().zip(encoded) {
            let (row, encoded) = match (row, encoded) {
                (Ok(row), Some(encoded)) => (row, encoded?),
                (Err(broken), _) => {
                    report.broken.push(broken.clone());
                    continue;
                }
                (Ok(_), None) => continue,
            };
            match encoded {
                Encoded::EmptyAnswer => report.empty_answers.push(row.line),
                Encoded::NothingToTrain => report.without_trained_token.push(row.line),
                Encoded::Sample {
                    sample,
                    truncated,
                    uneven,
                } => {
                    if truncated {
                        report.truncated.push(row.line);
                    }
                    if uneven {
                        report.uneven_boundary.push(row.line);
                    }
                    samples.push(sample);
                }
            }
        }
        report.count(&samples);
        if samples.is_empty() {
            let why = report
                .warnings()
                .into_iter()
                .next()
                .unwrap_or_else(|| "it is empty".into());
            return Err(DataError::Nothing {
                path: path.to_path_buf(),
                why,
            });
        }
        Ok((samples, report))
    }

    fn encode(&self, path: &Path, row: &Row, max_length: usize) -> Result<Encoded, DataError> {
        // `spans` are the token ranges of the answers.
        let (mut ids, spans, uneven) = match &row.content {
            Content::Messages(messages) => {
                let last = messages
                    .iter()
                    .rev()
                    .find(|message| message["role"] == "assistant");
                let calls =
                    last.is_some_and(|m| m["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty()));
                let text = last.and_then(|m| m["content"].as_str()).unwrap_or_default();
                if text.trim().is_empty() && !calls {
                    return Ok(Encoded::EmptyAnswer);
                }
                self.conversation(path, row, messages)?
            }
            Content::Completion { completion, .. } if completion.trim().is_empty() => {
                return Ok(Encoded::EmptyAnswer);
            }
            Content::Completion { prompt, completion } => {
                let before = self.ids(prompt, true)?;
                let mut ids = self.ids(&format!("{prompt}{completion}"), true)?;
                let (from, uneven) = boundary(&before, &ids);
                self.end(&mut ids);
                let to = ids.len();
                (ids, std::iter::once(from..to).collect(), uneven)
            }
            Content::Text(text) if text.trim().is_empty() => return Ok(Encoded::EmptyAnswer),
            Content::Text(text) => {
                let mut ids = self.ids(text, true)?;
                self.end(&mut ids);
                let to = ids.len();
                (ids, std::iter::once(0..to).collect(), false)
            }
        };
        let mut labels = vec![IGNORED; ids.len()];
        for span in spans {
            for i in span {
                labels[i] = i64::from(ids[i]);
            }
        }
        let truncated = ids.len() > max_length;
        ids.truncate(max_length);
        labels.truncate(max_length);
        // The first token of a sequence is predicted from nothing.
        if labels.iter().skip(1).all(|label| *label == IGNORED) {
            return Ok(Encoded::NothingToTrain);
        }
        Ok(Encoded::Sample {
            sample: Sample {
                line: row.line,
                ids,
                labels,
            },
            truncated,
            uneven,
        })
    }

    /// Appends the end token, unless the tokenizer has done so.
    fn end(&self, ids: &mut Vec<u32>) {
        if ids.last().is_none_or(|last| !self.eos.contains(last)) {
            ids.extend(self.eos.first());
        }
    }

    fn template(&self, path: &Path, line: usize) -> Result<&ChatTemplate, DataError> {
        self.template.as_ref().ok_or_else(|| DataError::NoTemplate {
            path: path.to_path_buf(),
            line,
        })
    }

    /// The tokens of a conversation, and the ranges of the assistant's turns, each with its end token.
    fn conversation(&self, path: &Path, row: &Row, messages: &[Value]) -> Result<Spans, DataError> {
        let template = self.template(path, row.line)?;
        let refused = |why: String| DataError::Refused {
            path: path.to_path_buf(),
            line: row.line,
            why,
        };
        let render = |upto: usize, answer_follows: bool| {
            template
                .render(&messages[..upto], row.tools.as_ref(), answer_follows)
                .map_err(|e| refused(e.to_string()))
        };
        let whole = render(messages.len(), false)?;
        let ids = self.ids(&whole, false)?;
        let (mut spans, mut uneven) = (Vec::new(), false);
        for (i, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            let (before, after) = (render(i, true)?, render(i + 1, false)?);
            if !after.starts_with(&before) || !whole.starts_with(&after) {
                return Err(refused(format!(
                    "message {}: the text before it changes with what follows, so the answer cannot be told apart",
                    i + 1
                )));
            }
            let (from, uneven_from) = boundary(&self.ids(&before, false)?, &ids);
            let (to, uneven_to) = match after.len() == whole.len() {
                true => (ids.len(), false),
                false => boundary(&self.ids(&after, false)?, &ids),
            };
            uneven |= uneven_from || uneven_to;
            // What the template writes after the end token (a line break) is not the model's to say.
            let end = ids[from..to].iter().rposition(|id| self.eos.contains(id));
            spans.push(from..end.map_or(to, |end| from + end + 1));
        }
        Ok((ids, spans, uneven))
    }

    /// The prompt of a row's last answer, and that answer; none for a row that is one text.
    pub fn prompt(&self, path: &Path, row: &Row) -> Result<Option<Prompt>, DataError> {
        match &row.content {
            Content::Text(_) => Ok(None),
            Content::Completion { prompt, completion } => Ok(Some(Prompt {
                ids: self.ids(prompt, true)?,
                question: prompt.clone(),
                answer: completion.clone(),
            })),
            Content::Messages(messages) => {
                let Some(last) = messages
                    .iter()
                    .rposition(|message| message["role"] == "assistant")
                else {
                    return Ok(None);
                };
                let refused = |e: DataError| DataError::Refused {
                    path: path.to_path_buf(),
                    line: row.line,
                    why: e.to_string(),
                };
                let render = |upto: usize, answer_follows: bool| {
                    let template = self.template(path, row.line)?;
                    template
                        .render(&messages[..upto], row.tools.as_ref(), answer_follows)
                        .map_err(refused)
                };
                let text = render(last, true)?;
                let content = |message: &Value| message["content"].as_str().map(str::to_owned);
                let question = messages[..last]
                    .iter()
                    .rev()
                    .find(|message| message["role"] == "user");
                // A call of tools is compared as the template writes it.
                let answer = match content(&messages[last]) {
                    Some(answer) => answer,
                    None => {
                        let whole = render(last + 1, false)?;
                        let ids = self.ids(whole.strip_prefix(&text).unwrap_or(&whole), false)?;
                        self.decode(&ids)?
                    }
                };
                Ok(Some(Prompt {
                    ids: self.ids(&text, false)?,
                    question: question.and_then(content).unwrap_or_default(),
                    answer,
                }))
            }
        }
    }
}

/// Where `ids` goes on after `before`, and whether the border is not clean: a token straddles it.
fn boundary(before: &[u32], ids: &[u32]) -> (usize, bool) {
    let common = before.iter().zip(ids).take_while(|(a, b)| a == b).count();
    (common, common < before.len())
}
