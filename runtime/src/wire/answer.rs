//! What a device sends back: answers, chunks of a streamed answer, errors.
//!
//! The objects are OpenAI's `chat.completion` and `chat.completion.chunk` with a few fields more: `ai_generated`
//! and `model_sha256` say that and by what the text was made, `timings` are spelled as llama-server spells them.
//! Source: OpenAI's chat completions reference; llama.cpp tools/server/README.md.

use serde::{Deserialize, Serialize};

/// Why a request has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request cannot be understood, or asks for something this device does not do.
    InvalidRequest,
    /// The request, or its prompt in tokens, is larger than the device takes.
    TooLarge,
    /// The device takes no more at the moment; try later.
    QueueFull,
    /// The deadline passed before the work began, or the work took longer than the device allows.
    Expired,
    /// A client cancelled it.
    Cancelled,
    /// No model can be loaded.
    ModelUnavailable,
    /// The device failed.
    Internal,
}

impl ErrorCode {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::TooLarge => "too_large",
            Self::QueueFull => "queue_full",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::ModelUnavailable => "model_unavailable",
            Self::Internal => "internal",
        }
    }
}

/// `{"id": …, "error": {"code": …, "message": …}}`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ErrorAnswer {
    /// The request's id.
    pub id: String,
    /// What went wrong.
    pub error: ErrorBody,
}

/// The inside of an [`ErrorAnswer`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ErrorBody {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl ErrorAnswer {
    /// An error for the request `id`.
    pub fn new(id: &str, code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            id: id.to_owned(),
            error: ErrorBody {
                code,
                message: message.into(),
            },
        }
    }
}

/// Tokens counted, and the energy that they took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Usage {
    /// Tokens of the rendered prompt.
    pub prompt_tokens: u32,
    /// Tokens generated, the end token not counted.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
    /// More about the prompt's.
    #[serde(default)]
    pub prompt_tokens_details: PromptTokens,
    /// Joules that the sensor (the card's `board.energy_sensor`) measured while this answer was made, its share of them where
    /// several were made at once; absent where there is no sensor.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub energy_j: Option<f64>,
    /// The same for each token generated.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub joules_per_token: Option<f64>,
}

/// Tokens of a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PromptTokens {
    /// Those that were computed before, for another request, and not again.
    pub cached_tokens: u32,
}

/// Time spent, in milliseconds and tokens a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Timings {
    /// From the receipt of the request to the start of its prefill.
    pub queue_ms: f64,
    /// Prefill.
    pub prompt_ms: f64,
    /// Prefill, tokens a second; those that were computed before do not count.
    pub prompt_per_second: f64,
    /// Decode.
    pub predicted_ms: f64,
    /// Decode, tokens a second.
    pub predicted_per_second: f64,
}

/// A message of the assistant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct AssistantMessage {
    /// Always `assistant`.
    #[cfg_attr(test, schemars(extend("const" = "assistant")))]
    pub role: String,
    /// The text.
    pub content: String,
}

/// One choice; there is always exactly one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Choice {
    /// Always 0.
    pub index: u32,
    /// The answer.
    pub message: AssistantMessage,
    /// `stop` (end token or stop string) or `length` (max_tokens or context).
    pub finish_reason: String,
}

/// A whole answer: the final QoS 1 message of every request that succeeded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Completion {
    /// The request's id.
    pub id: String,
    /// `chat.completion`
    #[cfg_attr(test, schemars(extend("const" = "chat.completion")))]
    pub object: String,
    /// Unix time, seconds.
    pub created: u64,
    /// Name of the model.
    pub model: String,
    /// One choice.
    pub choices: Vec<Choice>,
    /// Tokens counted.
    pub usage: Usage,
    /// Time spent.
    pub timings: Timings,
    /// Always true: a machine wrote this (Regulation (EU) 2024/1689, article 50).
    pub ai_generated: bool,
    /// SHA-256 of the GGUF file.
    pub model_sha256: String,
    /// The device that answered.
    pub device: String,
}

impl Completion {
    /// The text of the answer.
    pub fn text(&self) -> &str {
        self.choices
            .first()
            .map_or("", |choice| choice.message.content.as_str())
    }
}

/// Text added by one chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Delta {
    /// `assistant`, in the first chunk only.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub role: Option<String>,
    /// Text to append.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub content: Option<String>,
}

/// The choice of a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ChunkChoice {
    /// Always 0.
    pub index: u32,
    /// Text added.
    pub delta: Delta,
    /// Always null: the whole answer that follows says how it ended.
    pub finish_reason: Option<String>,
}

/// A piece of a streamed answer, at QoS 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Chunk {
    /// The request's id.
    pub id: String,
    /// `chat.completion.chunk`
    #[cfg_attr(test, schemars(extend("const" = "chat.completion.chunk")))]
    pub object: String,
    /// Counts from 0. A gap means lost chunks; 0 again means that the work began anew.
    pub seq: u32,
    /// Name of the model.
    pub model: String,
    /// One choice.
    pub choices: Vec<ChunkChoice>,
    /// Always true.
    pub ai_generated: bool,
}

/// Anything that arrives on a reply topic, as a client sees it.
#[derive(Clone, Debug, PartialEq)]
pub enum Received {
    /// A piece.
    Chunk(Chunk),
    /// The final answer.
    Completion(Box<Completion>),
    /// The final answer, an error.
    Error(ErrorAnswer),
}

impl Received {
    /// Reads a JSON message from a reply topic.
    ///
    /// # Errors
    /// The JSON error when it is none of the three.
    pub fn parse(payload: &[u8]) -> Result<Self, serde_json::Error> {
        let value: serde_json::Value = serde_json::from_slice(payload)?;
        if value.get("error").is_some() {
            return Ok(Self::Error(serde_json::from_value(value)?));
        }
        if value.get("object").and_then(|object| object.as_str()) == Some("chat.completion.chunk") {
            return Ok(Self::Chunk(serde_json::from_value(value)?));
        }
        Ok(Self::Completion(serde_json::from_value(value)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_on_the_wire() {
        for code in [
            ErrorCode::InvalidRequest,
            ErrorCode::TooLarge,
            ErrorCode::QueueFull,
            ErrorCode::Expired,
            ErrorCode::Cancelled,
            ErrorCode::ModelUnavailable,
            ErrorCode::Internal,
        ] {
            let json = serde_json::to_string(&ErrorAnswer::new("a", code, "m")).unwrap();
            assert_eq!(
                json,
                format!(
                    r#"{{"id":"a","error":{{"code":"{}","message":"m"}}}}"#,
                    code.as_str()
                )
            );
            assert!(matches!(Received::parse(json.as_bytes()), Ok(Received::Error(_))));
        }
    }
}
