//! vLLM: a completion of one token with `prompt_logprobs` scores all tokens of its prompt.
//!
//! Source: vllm/entrypoints/openai/completion/protocol.py (`CompletionResponseChoice.prompt_logprobs`) and
//! vllm/logprobs.py (`Logprob`). A place holds the k most probable tokens, and the prompt's own where it is not among
//! them; the first place is null. −∞ is written as −9999.

use serde_json::{Map, Value, json};

use super::{Place, SequenceScores, ServedError, ServedTeacher, labels, most_probable};
use crate::teacher::Asked;

pub(super) fn score(teacher: &ServedTeacher, asked: &Asked<'_>) -> Result<SequenceScores, ServedError> {
    let options = &teacher.options;
    // Temperature 1 and nothing else that changes the distribution: the probabilities are the model's own.
    let body = json!({"model": teacher.model, "prompt": asked.ids, "max_tokens": 1, "temperature": 1.0,
        "prompt_logprobs": options.top_k});
    let answer = teacher.client.post("/v1/completions", &body)?;
    places(asked, &answer, options.top_k, options.vocab_size).map_err(|why| teacher.client.bad(why))
}

/// The places of the labels in an answer, or what is wrong with it.
fn places(asked: &Asked<'_>, answer: &Value, k: usize, vocab_size: usize) -> Result<SequenceScores, String> {
    let places = answer["choices"][0]["prompt_logprobs"].as_array();
    let places = places.ok_or("has no prompt_logprobs: does the server know them?")?;
    if places.len() != asked.ids.len() {
        let (theirs, ours) = (places.len(), asked.ids.len());
        return Err(format!(
            "has prompt_logprobs of {theirs} tokens, and the prompt has {ours}"
        ));
    }
    let place = |(place, label): (usize, u32)| -> Result<Place, String> {
        let tokens = places[place]
            .as_object()
            .ok_or(format!("says nothing of token {place}"))?;
        let label = logprob(tokens, &label.to_string())
            .ok_or(format!("does not tell the probability of token {place}, {label}"))?;
        let tokens = tokens
            .keys()
            .filter_map(|id| Some((id.parse().ok()?, logprob(tokens, id)?)));
        Ok(Place {
            top: most_probable(tokens.collect(), k, vocab_size),
            label,
        })
    };
    labels(asked).map(place).collect()
}

fn logprob(tokens: &Map<String, Value>, id: &str) -> Option<f32> {
    let logprob = tokens.get(id)?["logprob"].as_f64()?;
    (logprob <= 1e-3).then_some(logprob as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer in the documented form, as vLLM would give it for the tokens 5 7 9 with prompt_logprobs 2.
    fn answer() -> Value {
        json!({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "teacher", "choices": [{
            "index": 0, "text": " x", "logprobs": null, "finish_reason": "length", "stop_reason": null,
            "prompt_logprobs": [null,
                {"7": {"logprob": -0.5, "rank": 1, "decoded_token": " a"}, "8": {"logprob": -1.5, "rank": 2, "decoded_token": " b"}},
                {"300": {"logprob": -0.25, "rank": 1, "decoded_token": "?"}, "3": {"logprob": -2.0, "rank": 2, "decoded_token": "!"},
                 "9": {"logprob": -9999.0, "rank": 700, "decoded_token": null}}]}],
            "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1}})
    }

    const ASKED: Asked<'static> = Asked {
        ids: &[5, 7, 9],
        labels: &[-100, 7, 9],
        route: None,
    };

    #[test]
    fn places_are_those_of_the_labels_and_hold_the_most_probable_tokens() {
        let scores = places(&ASKED, &answer(), 2, 100).unwrap();
        assert_eq!(scores[0].top, [(7, -0.5), (8, -1.5)]);
        assert_eq!(scores[0].label, -0.5);
        // A token that the student does not have is not among them; the label is, where others are missing.
        assert_eq!(scores[1].top, [(3, -2.0), (9, -9999.0)]);
        assert_eq!(scores[1].label, -9999.0);
        // The label beyond the top k is none of them.
        assert_eq!(
            places(&ASKED, &answer(), 2, 1000).unwrap()[1].top,
            [(300, -0.25), (3, -2.0)]
        );
    }

    #[test]
    fn answers_of_another_form_are_refused_by_name() {
        let refused = |change: fn(&mut Value)| {
            let mut answer = answer();
            change(&mut answer["choices"][0]["prompt_logprobs"]);
            places(&ASKED, &answer, 2, 100).unwrap_err()
        };
        assert!(refused(|value| *value = Value::Null).contains("no prompt_logprobs"));
        assert!(refused(|value| *value = json!([null])).contains("1 tokens"));
        assert!(refused(|value| value[1] = Value::Null).contains("nothing of token 1"));
        assert!(refused(|value| value[1] = json!({"8": {"logprob": -1.5}})).contains("token 1, 7"));
        assert!(refused(|value| value[2]["9"]["logprob"] = json!("NaN")).contains("token 2, 9"));
    }
}
