//! How good a model is on rows: loss and perplexity of the answers, and exact match of its own greedy ones.

use std::collections::BTreeMap;

use candle_core::Result;
use serde::Serialize;
use serde_json::Value;

use crate::batch::Batch;
use crate::data::{Prompt, Sample};
use crate::model::{Mode, Model};
use crate::rollout::{Stop, greedy};

/// The most keys of JSON answers that are counted singly.
const MAX_FIELDS: usize = 32;

/// Sums over some rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    /// Rows.
    pub rows: usize,
    /// Σ −log p over the answers' tokens, in nats.
    pub loss_sum: f64,
    /// The number of those tokens.
    pub tokens: usize,
    /// Rows whose greedy answer is the expected one.
    pub exact: usize,
    /// Rows that were answered.
    pub answered: usize,
    /// Answered rows whose expected answer is a JSON object or list.
    pub json: usize,
    /// Of those, rows whose greedy answer is JSON too.
    pub valid_json: usize,
    /// By the keys of expected JSON objects: how often the answer has the same value there, of how many.
    pub fields: BTreeMap<String, (usize, usize)>,
}

/// A score as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Rows that were scored.
    pub rows: usize,
    /// Nats a token; null without tokens.
    pub loss: Option<f64>,
    /// e to the loss.
    pub perplexity: Option<f64>,
    /// The share of rows whose greedy answer is the expected one; null without answers.
    pub exact_match: Option<f64>,
    /// Rows whose greedy answer is the expected one.
    pub exact: usize,
    /// Rows that were answered.
    pub answered: usize,
    /// Tokens that the loss is over.
    pub tokens: usize,
    /// The share of answers that are JSON, of those that should be; null where none should.
    pub valid_json: Option<f64>,
    /// The share of answers with the expected value, by key of the expected JSON objects.
    pub fields: BTreeMap<String, f64>,
}

fn share(part: usize, of: usize) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

impl Score {
    /// Counts a greedy answer.
    pub fn answer(&mut self, answer: &Answer) {
        self.answered += 1;
        self.exact += usize::from(answer.exact);
        let Some(expected) = structure(&answer.expected) else {
            return;
        };
        let found = structure(&answer.answer);
        self.json += 1;
        self.valid_json += usize::from(found.is_some());
        for (key, value) in expected.as_object().into_iter().flatten() {
            let same = found.as_ref().and_then(|found| found.get(key)) == Some(value);
            self.field(key, usize::from(same), 1);
        }
    }

    fn field(&mut self, key: &str, same: usize, of: usize) {
        if !self.fields.contains_key(key) && self.fields.len() == MAX_FIELDS {
            return;
        }
        let field = self.fields.entry(key.to_owned()).or_default();
        *field = (field.0 + same, field.1 + of);
    }

    /// Adds the sums of other rows.
    pub fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.loss_sum += other.loss_sum;
        self.tokens += other.tokens;
        self.exact += other.exact;
        self.answered += other.answered;
        self.json += other.json;
        self.valid_json += other.valid_json;
        for (key, (same, of)) in &other.fields {
            self.field(key, *same, *of);
        }
    }

    /// The figures of these sums.
    pub fn figures(&self) -> Figures {
        let loss = (self.tokens > 0).then(|| self.loss_sum / self.tokens as f64);
        let fields = self.fields.iter();
        Figures {
            rows: self.rows,
            loss,
            perplexity: loss.map(f64::exp),
            exact_match: share(self.exact, self.answered),
            exact: self.exact,
            answered: self.answered,
            tokens: self.tokens,
            valid_json: share(self.valid_json, self.json),
            fields: fields
                .filter_map(|(key, (same, of))| Some((key.clone(), share(*same, *of)?)))
                .collect(),
        }
    }
}

/// A JSON object or list; a lone number or word is an answer like any other.
fn structure(text: &str) -> Option<Value> {
    let value: Value = serde_json::from_str(text).ok()?;
    (value.is_object() || value.is_array()).then_some(value)
}

/// The sum of −log p over the labels of one batch, in nats.
pub fn loss_sum(model: &Model, samples: &[&Sample]) -> Result<f64> {
    let batch = Batch::new(
        samples
            .iter()
            .map(|sample| (sample.ids.as_slice(), sample.labels.as_slice())),
    );
    Ok(f64::from(
        model.loss_sum(&batch, Mode::INFERENCE, 256)?.to_scalar::<f32>()?,
    ))
}

/// A greedy answer beside the expected one.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    /// What was asked.
    pub question: String,
    /// The expected answer.
    pub expected: String,
    /// The model's answer.
    pub answer: String,
    /// Whether they are equal, as JSON where both are JSON.
    pub exact: bool,
}

/// The model's greedy answers. Prompts must have at least one token.
pub fn answers(
    model: &Model,
    prompts: &[Prompt],
    stop: &Stop<'_>,
    decode: impl Fn(&[u32]) -> std::result::Result<String, crate::data::DataError>,
) -> std::result::Result<Vec<Answer>, EvaluateError> {
    let ids: Vec<&[u32]> = prompts.iter().map(|prompt| prompt.ids.as_slice()).collect();
    let answers = greedy(model, &ids, stop)?;
    let pairs = prompts.iter().zip(answers);
    pairs
        .map(|(prompt, ids)| {
            let answer = decode(&ids)?;
            let exact = equal(&answer, &prompt.answer);
            Ok(Answer {
                question: prompt.question.clone(),
                expected: prompt.answer.clone(),
                answer,
                exact,
            })
        })
        .collect()
}

/// What can go wrong while answering.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// The arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// Tokens could not be turned into text.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
}

/// Equality of answers: as JSON values (order of keys and blanks do not count) when both parse, else as text
/// without the blanks around it.
pub fn equal(a: &str, b: &str) -> bool {
    match (serde_json::from_str::<Value>(a), serde_json::from_str::<Value>(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => a.trim() == b.trim(),
    }
}

/// Scores by the value of a column, and over all.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// Over all rows.
    pub all: Score,
    /// By the column's value, sorted.
    pub by: BTreeMap<String, Score>,
}

impl Table {
    /// Adds a row's score.
    pub fn add(&mut self, group: Option<&str>, score: &Score) {
        self.all.add(score);
        if let Some(group) = group {
            self.by.entry(group.to_owned()).or_default().add(score);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_compared_as_json() {
        assert!(equal(r#"{"a":1,"b":[2]}"#, r#" {"b": [2], "a": 1}"#));
        assert!(!equal(r#"{"a":1}"#, r#"{"a":2}"#));
        assert!(equal(" yes\n", "yes") && !equal("yes", "no"));
    }

    #[test]
    fn perplexity_is_over_tokens() {
        let mut score = Score {
            rows: 1,
            loss_sum: 2.0,
            tokens: 4,
            exact: 1,
            answered: 1,
            ..Score::default()
        };
        score.add(&Score {
            rows: 1,
            loss_sum: 4.0,
            tokens: 2,
            exact: 0,
            answered: 1,
            ..Score::default()
        });
        let figures = score.figures();
        assert_eq!((figures.loss, figures.exact_match), (Some(1.0), Some(0.5)));
        assert!((figures.perplexity.unwrap() - std::f64::consts::E).abs() < 1e-12);
        assert_eq!(Score::default().figures().loss, None);
    }

    #[test]
    fn answers_that_should_be_json_are_counted_by_key() {
        let mut score = Score::default();
        let expected = r#"{"intent":"on","slots":{"area":"hall"}}"#;
        for answer in [
            expected,
            r#"{"slots":{"area":"hall"},"intent":"off"}"#,
            r#"["on"]"#,
            "on",
        ] {
            score.answer(&Answer {
                question: String::new(),
                expected: expected.into(),
                answer: answer.into(),
                exact: equal(answer, expected),
            });
        }
        let mut sum = Score::default();
        sum.add(&score);
        let figures = sum.figures();
        assert_eq!(
            (figures.exact_match, figures.valid_json),
            (Some(0.25), Some(0.75))
        );
        assert_eq!((figures.fields["intent"], figures.fields["slots"]), (0.25, 0.5));
    }

    #[test]
    fn a_number_is_not_a_json_answer() {
        let mut score = Score::default();
        score.answer(&Answer {
            question: String::new(),
            expected: "42".into(),
            answer: "forty-two".into(),
            exact: false,
        });
        assert_eq!((score.figures().valid_json, score.fields.len()), (None, 0));
    }
}
