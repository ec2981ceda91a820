//! What is kept of an answer: its metadata. The content is never read into anything that could be kept.
//!
//! In: topic, payload and MQTT 5 properties of one message. Out: a row, or nothing for what is no final answer. The fields
//! are those of docs/reference/answer.schema.json and error.schema.json; more of them may come and are passed over.

use serde::Deserialize;

/// One row of the table.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    /// Who asked: the reply topic up to the first level below its prefix.
    pub(crate) client: String,
    /// The whole reply topic.
    pub(crate) reply_topic: String,
    /// The request's id.
    pub(crate) request_id: Option<String>,
    /// When, in seconds since 1970, by the device's clock.
    pub(crate) answered_at: Option<i64>,
    /// Who answered.
    pub(crate) device: Option<String>,
    /// Name of the model.
    pub(crate) model: Option<String>,
    /// Its SHA-256.
    pub(crate) model_sha256: Option<String>,
    /// Code of an error.
    pub(crate) error: Option<String>,
    /// `stop` or `length`.
    pub(crate) finish_reason: Option<String>,
    /// Tokens.
    pub(crate) usage: Usage,
    /// Milliseconds.
    pub(crate) timings: Timings,
}

/// Tokens, and joules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Usage {
    /// Of the prompt.
    pub(crate) prompt_tokens: Option<i64>,
    /// Of the answer.
    pub(crate) completion_tokens: Option<i64>,
    /// More about the prompt's.
    pub(crate) prompt_tokens_details: PromptTokens,
    /// Drawn for this answer, where the board has a sensor.
    pub(crate) energy_j: Option<f64>,
}

/// Tokens of a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct PromptTokens {
    /// Computed before.
    pub(crate) cached_tokens: Option<i64>,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Timings {
    /// In the queue.
    pub(crate) queue_ms: Option<f64>,
    /// Prefill.
    pub(crate) prompt_ms: Option<f64>,
    /// Decode.
    pub(crate) predicted_ms: Option<f64>,
}

/// The JSON of a final answer or an error, without the fields that hold words.
#[derive(Deserialize)]
struct Body {
    id: String,
    object: Option<String>,
    created: Option<i64>,
    device: Option<String>,
    model: Option<String>,
    model_sha256: Option<String>,
    error: Option<ErrorBody>,
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Usage,
    #[serde(default)]
    timings: Timings,
}

#[derive(Deserialize)]
struct ErrorBody {
    code: String,
}

#[derive(Deserialize)]
struct Choice {
    finish_reason: Option<String>,
}

/// What came, as far as it matters here.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Message<'a> {
    pub(crate) topic: &'a str,
    pub(crate) payload: &'a [u8],
    pub(crate) correlation: Option<&'a [u8]>,
    pub(crate) properties: &'a [(String, String)],
}

impl Answer {
    /// The metadata of a message; `None` where it is no final answer.
    pub(crate) fn of(message: &Message<'_>, prefix_levels: usize) -> Option<Self> {
        let topic = message.topic;
        let row = Self {
            client: client(topic, prefix_levels),
            reply_topic: topic.to_owned(),
            ..Self::default()
        };
        match serde_json::from_slice::<Body>(message.payload) {
            Ok(body) if body.object.as_deref() == Some("chat.completion") || body.error.is_some() => {
                Some(Self {
                    request_id: Some(body.id),
                    answered_at: body.created,
                    device: body.device,
                    model: body.model,
                    model_sha256: body.model_sha256,
                    error: body.error.map(|error| error.code),
                    finish_reason: body.choices.into_iter().find_map(|choice| choice.finish_reason),
                    usage: body.usage,
                    timings: body.timings,
                    ..row
                })
            }
            // A chunk, or another object of somebody's.
            Ok(_) => None,
            // Plain text, or the JSON of a schema: only what MQTT 5 says beside it counts.
            Err(_) => {
                let property = |name: &str| {
                    let found = message.properties.iter().find(|(key, _)| key == name);
                    found.map(|(_, value)| value.clone())
                };
                property("ai_generated")?;
                Some(Self {
                    request_id: message.correlation.and_then(id),
                    model: property("model"),
                    model_sha256: property("model_sha256"),
                    error: property("error"),
                    ..row
                })
            }
        }
    }
}

/// Correlation Data that is an id, as the devices take it.
fn id(correlation: &[u8]) -> Option<String> {
    let id = std::str::from_utf8(correlation).ok()?;
    let good = (1..=64).contains(&id.len())
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    good.then(|| id.to_owned())
}

/// `reply/kitchen/17` is `reply/kitchen`; whoever named no reply topic is the device or pool: `pipit/v1/kitchen`.
fn client(topic: &str, prefix_levels: usize) -> String {
    if let Some((owner, _)) = topic.split_once("/res/") {
        return owner.to_owned();
    }
    let levels: Vec<&str> = topic.split('/').take(prefix_levels + 1).collect();
    levels.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(topic: &str, payload: &str) -> Option<Answer> {
        let message = Message {
            topic,
            payload: payload.as_bytes(),
            ..Message::default()
        };
        Answer::of(&message, 1)
    }

    #[test]
    fn metadata_and_no_content() {
        let answer = of(
            "reply/kitchen/17",
            r#"{"id": "a", "object": "chat.completion", "created": 5, "model": "m", "device": "d", "model_sha256": "00",
               "choices": [{"index": 0, "message": {"role": "assistant", "content": "secret"}, "finish_reason": "stop"}],
               "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
               "timings": {"queue_ms": 0.5}, "ai_generated": true}"#,
        )
        .unwrap();
        assert_eq!(
            (answer.client.as_str(), answer.request_id.as_deref()),
            ("reply/kitchen", Some("a"))
        );
        assert_eq!(
            (answer.usage.prompt_tokens, answer.usage.energy_j),
            (Some(3), None)
        );
        assert!(!format!("{answer:?}").contains("secret"));
    }

    #[test]
    fn errors_count_and_chunks_do_not() {
        let error = of(
            "pipit/v1/pool/house/res/a",
            r#"{"id": "a", "error": {"code": "expired", "message": "late"}}"#,
        );
        let error = error.unwrap();
        assert_eq!(
            (error.client.as_str(), error.error.as_deref()),
            ("pipit/v1/pool/house", Some("expired"))
        );
        assert_eq!(
            of(
                "reply/a",
                r#"{"id": "a", "object": "chat.completion.chunk", "choices": []}"#
            ),
            None
        );
        assert_eq!(of("reply/a", "just words"), None);
    }

    #[test]
    fn plain_text_is_known_by_its_properties() {
        let properties = [
            ("ai_generated".to_owned(), "true".to_owned()),
            ("model".to_owned(), "m".to_owned()),
        ];
        let message = Message {
            topic: "reply/me",
            payload: "The light is on.".as_bytes(),
            correlation: Some(b"a-1"),
            properties: &properties,
        };
        let answer = Answer::of(&message, 1).unwrap();
        assert_eq!(
            (answer.request_id.as_deref(), answer.model.as_deref()),
            (Some("a-1"), Some("m"))
        );
        assert_eq!(answer.client, "reply/me");
    }
}
