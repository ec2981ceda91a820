//! A request: the bytes of one MQTT message become a [`Request`] or a [`Rejection`].
//!
//! In: payload and MQTT 5 properties ([`Envelope`]). Out: a checked request that says where its answer goes.
//! A payload is JSON when it begins with `{` or its Content Type says so, otherwise plain text: one user
//! message, and the answer comes back as plain text. JSON is OpenAI's chat-completions body; a field that this
//! device does not know or cannot do is refused by name, never ignored.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::answer::ErrorCode;
use super::topics::{Topics, valid_id};

mod fields;
mod format;
mod ids;

use fields::{
    adapter, check_depth, cut, drop_foreign, flag, float, integer, messages, repeat_penalty, stop, take,
};
pub(crate) use ids::generated_id;
pub use ids::hex;
use ids::{correlation_id, fingerprint};

/// Largest `max_tokens` and `deadline_ms` (49 days) that a request may name.
const MOST: i64 = u32::MAX as i64;

/// Caps on a request; what is larger is `too_large` or `invalid_request`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of a payload.
    pub request_bytes: usize,
    /// Nesting of the JSON.
    pub depth: usize,
    /// Messages in a conversation.
    pub messages: usize,
    /// Stop strings.
    pub stop_strings: usize,
    /// Bytes of each stop string.
    pub stop_bytes: usize,
    /// Bytes of a JSON schema.
    pub schema_bytes: usize,
    /// Largest `max_tokens`, and its default; more is cut to this.
    pub max_tokens: u32,
    /// Seconds that the engine may work on a request; 0 is no end.
    pub seconds: u64,
    /// Requests that wait.
    pub queue: usize,
    /// Requests of one client that wait.
    pub client_queue: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_bytes: 256 * 1024,
            depth: 16,
            messages: 128,
            stop_strings: 8,
            stop_bytes: 64,
            schema_bytes: 16 * 1024,
            max_tokens: 512,
            seconds: 1800,
            queue: 1024,
            client_queue: 256,
        }
    }
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What they say.
    pub content: String,
}

/// How to choose tokens. `None` is the device's default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus, 0 to 1.
    pub top_p: Option<f32>,
    /// Best k; 0 is all.
    pub top_k: Option<i32>,
    /// Least share of the best token's probability, 0 to 1.
    pub min_p: Option<f32>,
    /// Divides the logits of tokens seen before; 1 is off. llama.cpp's `repeat_penalty`.
    #[serde(default)]
    pub repeat_penalty: Option<f32>,
    /// Subtracted once for each time that a token was seen; 0 is off.
    #[serde(default)]
    pub frequency_penalty: Option<f32>,
    /// Subtracted from tokens seen at all; 0 is off.
    #[serde(default)]
    pub presence_penalty: Option<f32>,
    /// How many of the last tokens count as seen; 0 is none, -1 all. llama.cpp's `repeat_last_n`.
    #[serde(default)]
    pub repeat_last_n: Option<i32>,
    /// The same seed gives the same answer. Set at acceptance when the client gave none, so that a second run
    /// after a crash says the same.
    pub seed: u32,
}

/// Where an answer goes and how it looks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Topic.
    pub topic: String,
    /// Correlation Data, echoed untouched.
    pub correlation: Option<Vec<u8>>,
    /// Plain text instead of JSON.
    pub plain: bool,
}

/// A request that has passed every check that needs no model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// `[A-Za-z0-9_.-]{1,64}`
    pub id: String,
    /// For a request that carried no id of its own: a hash of what it carried, so that a redelivery of the very
    /// same MQTT message (DUP set) is recognised.
    pub fingerprint: Option<String>,
    /// Where the answer goes.
    pub reply: Reply,
    /// The conversation, at least one message.
    pub messages: Vec<Message>,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// JSON schema that the answer obeys; `{"type": "object"}` for any JSON object.
    #[serde(default)]
    pub schema: Option<Value>,
    /// Name of a LoRA adapter of this device.
    #[serde(default)]
    pub adapter: Option<String>,
    /// Send chunks before the final answer.
    pub stream: bool,
    /// Milliseconds after receipt by which the work must have begun.
    pub deadline_ms: Option<u64>,
    /// Higher goes first; 0 by default, -100 to 100.
    pub priority: i32,
    /// It was sent to the pool, and not to this device.
    #[serde(default)]
    pub from_pool: bool,
}

impl Request {
    /// What makes a request the same request: the reply topic stands for the client, because MQTT does not say
    /// who published a message.
    pub fn key(&self) -> (String, String) {
        (self.reply.topic.clone(), self.id.clone())
    }
}

/// A request that is refused at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The request's id, or one made for it.
    pub id: String,
    /// Where to say so. Never a topic that the rule of [`Topics::check_reply`] forbids.
    pub reply: Reply,
    /// Why, for programs.
    pub code: ErrorCode,
    /// Why, for people.
    pub message: String,
}

/// A message as it came.
#[derive(Clone, Copy, Debug, Default)]
pub struct Envelope<'a> {
    /// Payload.
    pub payload: &'a [u8],
    /// MQTT 5 Response Topic.
    pub response_topic: Option<&'a str>,
    /// MQTT 5 Correlation Data.
    pub correlation: Option<&'a [u8]>,
    /// MQTT 5 Content Type.
    pub content_type: Option<&'a str>,
    /// MQTT 5 Message Expiry Interval: seconds left, as the broker sent it.
    pub expiry_s: Option<u32>,
}

/// What one device allows.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// Its topics.
    pub topics: &'a Topics,
    /// Topics under which an answer may go, besides its own `res/`.
    pub prefixes: &'a [String],
    /// Caps on a request.
    pub limits: &'a Limits,
    /// Names of its LoRA adapters.
    pub adapters: &'a [String],
}

/// Longest Correlation Data that is accepted.
const CORRELATION_BYTES: usize = 1024;

/// Why a request is refused, before it is known where to say so.
type Refusal = (ErrorCode, String);

fn invalid(message: impl Into<String>) -> Refusal {
    (ErrorCode::InvalidRequest, message.into())
}

/// Checks a message against the wire and the limits.
///
/// # Errors
/// A [`Rejection`] to be published; its topic is safe to publish to.
pub fn parse(envelope: &Envelope<'_>, rules: &Rules<'_>) -> Result<Request, Box<Rejection>> {
    let mut draft = Draft::new(envelope, rules.topics);
    match draft.fill(envelope, rules) {
        Ok(()) => Ok(draft.request),
        Err((code, message)) => {
            let Request { id, reply, .. } = draft.request;
            Err(Box::new(Rejection {
                id,
                reply,
                code,
                message,
            }))
        }
    }
}

/// A request in the making: whatever is known already is what a rejection is sent to.
struct Draft {
    request: Request,
}

impl Draft {
    fn new(envelope: &Envelope<'_>, topics: &Topics) -> Self {
        let id = envelope.correlation.map_or_else(generated_id, correlation_id);
        let reply = Reply {
            topic: topics.answer(&id),
            correlation: envelope
                .correlation
                .filter(|data| data.len() <= CORRELATION_BYTES)
                .map(<[u8]>::to_vec),
            plain: false,
        };
        Self {
            request: Request {
                id,
                fingerprint: None,
                reply,
                messages: Vec::new(),
                sampling: Sampling::default(),
                max_tokens: 0,
                stop: Vec::new(),
                schema: None,
                adapter: None,
                stream: false,
                deadline_ms: envelope.expiry_s.map(|seconds| u64::from(seconds) * 1000),
                priority: 0,
                from_pool: false,
            },
        }
    }

    fn fill(&mut self, envelope: &Envelope<'_>, rules: &Rules<'_>) -> Result<(), Refusal> {
        let Rules {
            topics,
            prefixes,
            limits,
            ..
        } = *rules;
        if let Some(topic) = envelope.response_topic {
            topics.check_reply(topic, prefixes).map_err(invalid)?;
            self.request.reply.topic = topic.to_owned();
        }
        if envelope.correlation.is_some() && self.request.reply.correlation.is_none() {
            return Err(invalid(format!(
                "Correlation Data is longer than {CORRELATION_BYTES} bytes"
            )));
        }
        if envelope.payload.len() > limits.request_bytes {
            return Err((
                ErrorCode::TooLarge,
                format!(
                    "the request has {} bytes, the limit is {}",
                    envelope.payload.len(),
                    limits.request_bytes
                ),
            ));
        }
        let text = std::str::from_utf8(envelope.payload)
            .map_err(|error| invalid(format!("the request is not UTF-8: {error}")))?;
        let json = match envelope.content_type {
            Some(kind) if kind.starts_with("application/json") => true,
            Some(kind) if kind.starts_with("text/plain") => false,
            _ => text.trim_start().starts_with('{'),
        };
        let mut own_id = envelope.correlation.is_some();
        if json {
            check_depth(envelope.payload, limits.depth)?;
            let value: Value = serde_json::from_str(text)
                .map_err(|error| invalid(format!("the request is not JSON: {error}")))?;
            let Value::Object(body) = value else {
                return Err(invalid("the request must be a JSON object"));
            };
            own_id |= self.fill_from_json(body, envelope, rules)?;
        } else {
            if text.trim().is_empty() {
                return Err(invalid("the request is empty"));
            }
            self.request.reply.plain = true;
            self.request.messages = vec![Message {
                role: Role::User,
                content: text.to_owned(),
            }];
            self.request.max_tokens = limits.max_tokens;
            self.request.sampling.seed = crate::clock::chance();
        }
        if !own_id {
            self.request.fingerprint = Some(fingerprint(envelope));
        }
        Ok(())
    }

    /// Returns whether the body carried an id.
    fn fill_from_json(
        &mut self,
        mut body: Map<String, Value>,
        envelope: &Envelope<'_>,
        rules: &Rules<'_>,
    ) -> Result<bool, Refusal> {
        let Rules {
            topics,
            prefixes,
            limits,
            adapters,
        } = *rules;
        let request = &mut self.request;
        let mut own_id = false;
        // First what a rejection needs.
        if let Some(id) = take(&mut body, "id") {
            let Some(id) = id.as_str().filter(|id| valid_id(id)) else {
                return Err(invalid("`id` must match [A-Za-z0-9_.-]{1,64}"));
            };
            request.id = id.to_owned();
            own_id = true;
            if envelope.response_topic.is_none() {
                request.reply.topic = topics.answer(id);
            }
        }
        if let Some(topic) = take(&mut body, "reply_to") {
            let Value::String(topic) = topic else {
                return Err(invalid("`reply_to` must be a string"));
            };
            if envelope.response_topic.is_none() {
                topics
                    .check_reply(&topic, prefixes)
                    .map_err(|why| invalid(format!("`reply_to`: {why}")))?;
                request.reply.topic = topic;
            }
        }
        drop_foreign(&mut body)?;
        request.messages = messages(take(&mut body, "messages"), limits)?;
        let sampling = &mut request.sampling;
        sampling.temperature = float(&mut body, "temperature", 0.0, 10.0)?;
        sampling.top_p = float(&mut body, "top_p", 0.0, 1.0)?;
        sampling.min_p = float(&mut body, "min_p", 0.0, 1.0)?;
        sampling.top_k = integer(&mut body, "top_k", 0, i64::from(i32::MAX))?.map(|k| k as i32);
        sampling.repeat_penalty = repeat_penalty(&mut body)?;
        sampling.frequency_penalty = float(&mut body, "frequency_penalty", -2.0, 2.0)?;
        sampling.presence_penalty = float(&mut body, "presence_penalty", -2.0, 2.0)?;
        sampling.repeat_last_n = integer(&mut body, "repeat_last_n", -1, 4096)?.map(|n| n as i32);
        sampling.seed = match integer(&mut body, "seed", i64::MIN, i64::MAX)? {
            Some(seed) => (seed as u64 ^ (seed as u64 >> 32)) as u32,
            None => crate::clock::chance(),
        };
        let newer = integer(&mut body, "max_completion_tokens", 1, MOST)?;
        let max_tokens = integer(&mut body, "max_tokens", 1, MOST)?.or(newer);
        request.max_tokens = max_tokens.map_or(limits.max_tokens, |most| {
            most.min(i64::from(limits.max_tokens)) as u32
        });
        request.stop = stop(take(&mut body, "stop"), limits)?;
        request.schema = format::schema(take(&mut body, "response_format"), limits)?;
        request.adapter = adapter(take(&mut body, "adapter"), adapters)?;
        request.stream = flag(&mut body, "stream")?;
        if let Some(deadline) = integer(&mut body, "deadline_ms", 0, MOST)? {
            let deadline = deadline as u64;
            request.deadline_ms = Some(
                request
                    .deadline_ms
                    .map_or(deadline, |expiry| expiry.min(deadline)),
            );
        }
        request.priority = integer(&mut body, "priority", -100, 100)?.unwrap_or(0) as i32;
        if let Some(field) = body.keys().next() {
            return Err(invalid(format!("unknown field `{}`", cut(field))));
        }
        Ok(own_id)
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
