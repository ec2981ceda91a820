//! llama-server: it tells the distribution of tokens that it generates, not of those of a prompt. So a text is asked
//! about token by token: a completion of one token after each prefix, whose `n_probs` are the model's own, before all
//! sampling. The label is made the token that is drawn, by a bias that counts in sampling only, because the drawn
//! token's probability is told too. The server keeps the prefix in the slot's cache, so that each request computes one
//! token; a text of n labels costs n requests, and as much time as to generate it.
//!
//! Source: llama.cpp tools/server/server-context.cpp (`populate_token_probs`), server-task.cpp
//! (`completion_token_output`), README.md (`POST /completion`).

use serde_json::{Value, json};

use super::{Place, SequenceScores, ServedError, ServedTeacher, labels, most_probable};
use crate::teacher::Asked;

/// What is added to the logit of a label: more than any logit is apart from another.
const BIAS: f32 = 10_000.0;
/// log p where the server has 0 in f32: the smallest number above 0 has this logarithm.
const LEAST: f32 = -103.3;

pub(super) fn score(
    teacher: &ServedTeacher,
    asked: &Asked<'_>,
    worker: usize,
) -> Result<SequenceScores, ServedError> {
    let (k, vocab_size) = (teacher.options.top_k, teacher.options.vocab_size);
    let place = |(place, label): (usize, u32)| -> Result<Place, ServedError> {
        // A worker keeps to its slot, whose cache holds the text before.
        let body = json!({"prompt": asked.ids[..place], "n_predict": 1, "n_probs": k.max(1), "cache_prompt": true,
            "id_slot": worker, "temperature": 0.0, "samplers": ["temperature"], "logit_bias": [[label, BIAS]],
            "response_fields": ["completion_probabilities"]});
        let answer = teacher.client.post("/completion", &body)?;
        of_answer(&answer, label, k, vocab_size).map_err(|why| teacher.client.bad(why))
    };
    labels(asked).map(place).collect()
}

/// What an answer says of its one token, or what is wrong with it.
fn of_answer(answer: &Value, label: u32, k: usize, vocab_size: usize) -> Result<Place, String> {
    let drawn = &answer["completion_probabilities"][0];
    if drawn["id"].as_u64() != Some(u64::from(label)) {
        return Err(format!("is not about token {label}: {}", shortened(drawn)));
    }
    let logprob = |token: &Value| {
        token["logprob"]
            .as_f64()
            .filter(|x| *x <= 1e-3)
            .map(|x| (x as f32).max(LEAST))
    };
    let tokens = drawn["top_logprobs"].as_array().into_iter().flatten();
    let tokens = tokens.map(|token| Some((u32::try_from(token["id"].as_u64()?).ok()?, logprob(token)?)));
    let tokens: Option<Vec<_>> = tokens.collect();
    match (tokens, logprob(drawn)) {
        (Some(tokens), Some(label)) => Ok(Place {
            top: most_probable(tokens, k, vocab_size),
            label,
        }),
        _ => Err(format!("has no log-probabilities: {}", shortened(drawn))),
    }
}

fn shortened(value: &Value) -> String {
    value.to_string().chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What llama-server answered for a prompt of SmolLM2, but for the fields that are not read.
    fn answer() -> Value {
        json!({"content": " the", "completion_probabilities": [{"id": 260, "token": " the", "bytes": [32, 116, 104, 101],
            "logprob": -1.75, "top_logprobs": [
                {"id": 253, "token": " a", "bytes": [32, 97], "logprob": -0.5},
                {"id": 260, "token": " the", "bytes": [32, 116, 104, 101], "logprob": -1.75},
                {"id": 49152, "token": "", "bytes": [], "logprob": -3.402_823_466_385_288_6e38}]}]})
    }

    #[test]
    fn the_drawn_token_is_the_label_and_its_probability_the_models_own() {
        let place = of_answer(&answer(), 260, 3, 49_152).unwrap();
        assert_eq!(place.top, [(253, -0.5), (260, -1.75)]);
        assert_eq!(place.label, -1.75);
        assert_eq!(
            of_answer(&answer(), 260, 3, 50_000).unwrap().top[2],
            (49_152, LEAST)
        );
    }

    #[test]
    fn answers_of_another_form_are_refused_by_name() {
        let text = of_answer(&answer(), 7, 3, 100).unwrap_err();
        assert!(text.contains("token 7"), "{text}");
        let mut other = answer();
        other["completion_probabilities"][0]["top_logprobs"][0]["logprob"] = json!(null);
        assert!(
            of_answer(&other, 260, 3, 100)
                .unwrap_err()
                .contains("no log-probabilities")
        );
        assert!(of_answer(&json!({"error": "x"}), 260, 3, 100).is_err());
    }
}
