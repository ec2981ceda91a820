//! How good a model is on rows: loss and perplexity of the answers, and exact match of its own greedy ones.

use std::collections::BTreeMap;

use candle_core::Result;
use serde::Serialize;
use serde_json::Value;

use crate::batch::Batch;
use crate::data::{Prompt, Sample};
use crate::model::{Mode, Model};
use crate::rollout::{Stop, greedy};

/// Sums over some rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
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
}

/// A score as it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
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
}

impl Score {
    /// Adds the sums of other rows.
    pub fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.loss_sum += other.loss_sum;
        self.tokens += other.tokens;
        self.exact += other.exact;
        self.answered += other.answered;
    }

    /// The figures of these sums.
    pub fn figures(&self) -> Figures {
        let loss = (self.tokens > 0).then(|| self.loss_sum / self.tokens as f64);
        Figures {
            rows: self.rows,
            loss,
            perplexity: loss.map(f64::exp),
            exact_match: (self.answered > 0).then(|| self.exact as f64 / self.answered as f64),
            exact: self.exact,
            answered: self.answered,
            tokens: self.tokens,
        }
    }
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
        };
        score.add(&Score {
            rows: 1,
            loss_sum: 4.0,
            tokens: 2,
            exact: 0,
            answered: 1,
        });
        let figures = score.figures();
        assert_eq!((figures.loss, figures.exact_match), (Some(1.0), Some(0.5)));
        assert!((figures.perplexity.unwrap() - std::f64::consts::E).abs() < 1e-12);
        assert_eq!(Score::default().figures().loss, None);
    }
}
