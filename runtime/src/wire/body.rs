//! The JSON of a request, as a client writes it: OpenAI's chat-completions body with a few fields more.
//!
//! `pipit ask` sends it, and `docs/reference/request.schema.json` is made of it. A device reads requests with
//! [`super::request`], whose messages say what is wrong where; a test holds both to the same language. How many
//! messages, how long a stop string, and which adapters: that is a device's own, see its card.

use serde::Serialize;
use serde_json::Value;

use super::Role;

/// A request. A field that is not listed here is refused by name; null is the same as absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[cfg_attr(
    test,
    derive(schemars::JsonSchema),
    schemars(title = "Request", deny_unknown_fields)
)]
pub struct Body {
    /// The request's name; made from the Correlation Data when absent, else generated. One final answer for a
    /// reply topic and id.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(regex(pattern = r"^[A-Za-z0-9_.-]{1,64}$")))]
    pub id: Option<String>,
    /// Topic of the answer, for clients without MQTT 5; under `{root}/v1/{device}/res/` or a prefix that the
    /// device's card lists. A Response Topic goes before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        test,
        schemars(regex(pattern = r"^[^$+#\x00-\x1f\x7f-\x9f][^+#\x00-\x1f\x7f-\x9f]{0,255}$"))
    )]
    pub reply_to: Option<String>,
    /// The conversation.
    #[cfg_attr(test, schemars(length(min = 1)))]
    pub messages: Vec<Turn>,
    /// Most tokens to generate; at most the device's limit, which is also the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 1, max = 4294967295_u64)))]
    pub max_tokens: Option<u32>,
    /// OpenAI's newer name of `max_tokens`; counts where that is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 1, max = 4294967295_u64)))]
    pub max_completion_tokens: Option<u32>,
    /// 0 is greedy: always the likeliest token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 0, max = 10)))]
    pub temperature: Option<f32>,
    /// Nucleus: the likeliest tokens that together have this probability.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 0, max = 1)))]
    pub top_p: Option<f32>,
    /// The k likeliest tokens; 0 is all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 0, max = 2147483647)))]
    pub top_k: Option<i32>,
    /// Tokens with at least this share of the likeliest one's probability.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 0, max = 1)))]
    pub min_p: Option<f32>,
    /// Divides the logits of tokens seen before; 1 is off. llama.cpp's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(max = 10), extend("exclusiveMinimum" = 0)))]
    pub repeat_penalty: Option<f32>,
    /// Subtracted once for each time that a token was seen; 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = -2, max = 2)))]
    pub frequency_penalty: Option<f32>,
    /// Subtracted from tokens seen at all; 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = -2, max = 2)))]
    pub presence_penalty: Option<f32>,
    /// How many of the last tokens count as seen; 0 is none, -1 all. llama.cpp's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = -1, max = 4096)))]
    pub repeat_last_n: Option<i32>,
    /// The same seed gives the same answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = -9223372036854775808_i64, max = 9223372036854775807_i64)))]
    pub seed: Option<i64>,
    /// What ends the answer; not a part of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// Send chunks before the final answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// Text (the default), any JSON object, or JSON that obeys a schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_format: Option<ResponseFormat>,
    /// Name of a LoRA adapter that the device's card lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(regex(pattern = r"^[A-Za-z0-9_.-]{1,64}$")))]
    pub adapter: Option<String>,
    /// Milliseconds after receipt by which the work must have begun.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = 0, max = 4294967295_u64)))]
    pub deadline_ms: Option<u32>,
    /// Higher goes first; 0 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(range(min = -100, max = 100)))]
    pub priority: Option<i32>,
    /// What stock OpenAI clients send besides.
    #[serde(flatten)]
    pub others: Others,
}

/// Fields of OpenAI's body that have no effect, or no value but the one that asks for nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Others {
    /// No effect: a device serves one model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<Value>,
    /// No effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<Value>,
    /// No effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Value>,
    /// No effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<Value>,
    /// No effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_tier: Option<Value>,
    /// No effect: the final answer always has `usage`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_options: Option<Value>,
    /// Not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(extend("enum" = [null, []])))]
    pub tools: Option<Value>,
    /// Not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(extend("enum" = [null, "none"])))]
    pub tool_choice: Option<Value>,
    /// Not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(extend("enum" = [null, []])))]
    pub functions: Option<Value>,
    /// Not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(extend("enum" = [null, "none"])))]
    pub function_call: Option<Value>,
    /// Not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(extend("enum" = [null, false])))]
    pub logprobs: Option<Value>,
    /// Not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(extend("enum" = [null, 0])))]
    pub top_logprobs: Option<Value>,
    /// Not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(extend("enum" = [null, {}])))]
    pub logit_bias: Option<Value>,
    /// One answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(extend("enum" = [null, 1])))]
    pub n: Option<Value>,
}

/// One turn of the conversation.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub struct Turn {
    /// Who speaks; `developer` is OpenAI's newer word for `system`.
    #[cfg_attr(test, schemars(schema_with = "schemas::role"))]
    pub role: Role,
    /// What they say. Never becomes a control token.
    pub content: Content,
    /// No effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Turn {
    /// A turn of text.
    pub fn new(role: Role, text: impl Into<String>) -> Self {
        Self {
            role,
            content: Content::Text(text.into()),
            name: None,
        }
    }
}

/// Text, whole or in parts.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Content {
    /// Whole.
    Text(String),
    /// In parts, which are joined.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Text.
    Text {
        /// The text.
        text: String,
    },
}

/// Stop strings.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Stop {
    /// One.
    One(#[cfg_attr(test, schemars(length(min = 1)))] String),
    /// Several.
    Several(#[cfg_attr(test, schemars(inner(length(min = 1))))] Vec<String>),
}

/// What the answer looks like.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Whatever the model says.
    Text,
    /// A JSON object.
    JsonObject {
        /// llama-server's shorthand: a schema that it obeys.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[cfg_attr(test, schemars(default, schema_with = "schemas::optional_schema"))]
        schema: Option<Value>,
    },
    /// JSON that obeys a schema, as OpenAI writes it.
    JsonSchema {
        /// The schema and its name.
        json_schema: NamedSchema,
    },
}

/// OpenAI's wrapper of a JSON schema.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub struct NamedSchema {
    /// OpenAI demands one; no effect here.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(regex(pattern = r"^[A-Za-z0-9_.-]{1,64}$")))]
    pub name: Option<String>,
    /// No effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The schema. `$ref` refers to the schema itself (`#…`); a `pattern` has at most 256 bytes.
    #[cfg_attr(test, schemars(schema_with = "schemas::schema"))]
    pub schema: Value,
    /// No effect: the answer always obeys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// Where the JSON allows something else than the type.
#[cfg(test)]
mod schemas {
    use schemars::{Schema, SchemaGenerator, json_schema};

    pub(super) fn role(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "enum": ["system", "developer", "user", "assistant"] })
    }

    pub(super) fn schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "object" })
    }

    pub(super) fn optional_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["object", "null"] })
    }
}
