//! The fields of a request's JSON: each is taken out of the object and checked. What is left over is unknown.

use serde_json::{Map, Value};

use super::{Limits, Message, Refusal, Role, invalid};
use crate::wire::answer::ErrorCode;

/// Fields of OpenAI's body that say nothing about the answer's text and are taken without effect.
const NO_EFFECT: &[&str] = &[
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "stream_options",
];
/// Fields that ask for something this version does not do.
const NOT_SUPPORTED: &[&str] = &[
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "n",
];

/// Takes out what has no effect here.
///
/// # Errors
/// A field that asks for what this version does not do.
pub(super) fn drop_foreign(body: &mut Map<String, Value>) -> Result<(), Refusal> {
    for &field in NOT_SUPPORTED {
        if let Some(value) = take(body, field)
            && !asks_for_nothing(field, &value)
        {
            return Err(invalid(format!("`{field}` is not supported by this version")));
        }
    }
    for field in NO_EFFECT {
        body.shift_remove(*field);
    }
    Ok(())
}

/// Whether a field that is not supported has the value that a client sends who does not use it.
fn asks_for_nothing(field: &str, value: &Value) -> bool {
    match value {
        Value::Bool(asked) => field == "logprobs" && !asked,
        Value::Number(number) => match field {
            "n" => number.as_f64() == Some(1.0),
            "top_logprobs" => number.as_f64() == Some(0.0),
            _ => false,
        },
        Value::Array(list) => matches!(field, "tools" | "functions") && list.is_empty(),
        Value::Object(map) => field == "logit_bias" && map.is_empty(),
        Value::String(text) => matches!(field, "tool_choice" | "function_call") && text == "none",
        Value::Null => true,
    }
}

/// Takes a field; null is the same as absent.
pub(super) fn take(body: &mut Map<String, Value>, field: &str) -> Option<Value> {
    body.shift_remove(field).filter(|value| !value.is_null())
}

/// A number from `low` to `high`.
pub(super) fn float(
    body: &mut Map<String, Value>,
    field: &str,
    low: f64,
    high: f64,
) -> Result<Option<f32>, Refusal> {
    let Some(value) = take(body, field) else {
        return Ok(None);
    };
    match value.as_f64() {
        Some(number) if (low..=high).contains(&number) => Ok(Some(number as f32)),
        _ => Err(invalid(format!(
            "`{field}` must be a number from {low} to {high}"
        ))),
    }
}

/// llama.cpp's `repeat_penalty`: more than 0, because logits are divided by it.
pub(super) fn repeat_penalty(body: &mut Map<String, Value>) -> Result<Option<f32>, Refusal> {
    let penalty = float(body, "repeat_penalty", 0.0, 10.0)?;
    // Also what is more than 0 in the JSON and not as f32.
    if penalty == Some(0.0) {
        return Err(invalid("`repeat_penalty` must be more than 0; 1 is off"));
    }
    Ok(penalty)
}

/// A whole number from `low` to `high`; 3.0 is one, as in JSON Schema.
pub(super) fn integer(
    body: &mut Map<String, Value>,
    field: &str,
    low: i64,
    high: i64,
) -> Result<Option<i64>, Refusal> {
    let Some(value) = take(body, field) else {
        return Ok(None);
    };
    let whole = value.as_i64().or_else(|| {
        value
            .as_f64()
            .filter(|number| number.fract() == 0.0 && number.abs() < 2_f64.powi(53))
            .map(|number| number as i64)
    });
    match whole {
        Some(number) if (low..=high).contains(&number) => Ok(Some(number)),
        _ if low == i64::MIN => Err(invalid(format!("`{field}` must be a whole number of 64 bits"))),
        _ => Err(invalid(format!(
            "`{field}` must be a whole number from {low} to {high}"
        ))),
    }
}

/// True or false; false by default.
pub(super) fn flag(body: &mut Map<String, Value>, field: &str) -> Result<bool, Refusal> {
    match take(body, field) {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(value),
        Some(_) => Err(invalid(format!("`{field}` must be true or false"))),
    }
}

/// The name of an adapter that this device has.
pub(super) fn adapter(value: Option<Value>, known: &[String]) -> Result<Option<String>, Refusal> {
    let Some(value) = value else {
        return Ok(None);
    };
    let Some(name) = value.as_str().filter(|name| crate::wire::topics::valid_id(name)) else {
        return Err(invalid("`adapter` must match [A-Za-z0-9_.-]{1,64}"));
    };
    if known.iter().any(|adapter| adapter == name) {
        return Ok(Some(name.to_owned()));
    }
    let have = match known {
        [] => "has none".to_owned(),
        some => format!("has {}", some.join(", ")),
    };
    Err(invalid(format!(
        "`adapter`: there is no `{name}`; this device {have}"
    )))
}

/// The conversation.
pub(super) fn messages(value: Option<Value>, limits: &Limits) -> Result<Vec<Message>, Refusal> {
    let Some(Value::Array(list)) = value else {
        return Err(invalid("`messages` must be a list"));
    };
    if list.is_empty() {
        return Err(invalid("`messages` is empty"));
    }
    if list.len() > limits.messages {
        return Err((
            ErrorCode::TooLarge,
            format!("{} messages, the limit is {}", list.len(), limits.messages),
        ));
    }
    list.into_iter()
        .enumerate()
        .map(|(at, value)| message(value).map_err(|why| invalid(format!("`messages[{at}]`: {why}"))))
        .collect()
}

fn message(value: Value) -> Result<Message, String> {
    let Value::Object(mut fields) = value else {
        return Err("must be an object".to_owned());
    };
    let role = match take(&mut fields, "role").as_ref().and_then(Value::as_str) {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        _ => return Err("`role` must be system, user or assistant".to_owned()),
    };
    let content = match take(&mut fields, "content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for part in parts {
                text.push_str(&text_part(part)?);
            }
            text
        }
        _ => return Err("`content` must be text".to_owned()),
    };
    // OpenAI's name of a participant: the templates have no place for it.
    if take(&mut fields, "name").is_some_and(|name| !name.is_string()) {
        return Err("`name` must be a string".to_owned());
    }
    if let Some(field) = fields.keys().next() {
        return Err(format!("unknown field `{}`", cut(field)));
    }
    Ok(Message { role, content })
}

fn text_part(part: Value) -> Result<String, String> {
    let Value::Object(mut part) = part else {
        return Err("a part of `content` must be an object".to_owned());
    };
    let kind = take(&mut part, "type");
    let text = take(&mut part, "text");
    match (kind, text) {
        (Some(Value::String(kind)), Some(Value::String(text))) if kind == "text" => {
            match part.keys().next() {
                None => Ok(text),
                Some(field) => Err(format!("unknown field `{}` in a part of `content`", cut(field))),
            }
        }
        _ => Err("`content` may hold parts of type text only".to_owned()),
    }
}

/// The beginning of a name that somebody sent, for a message.
pub(super) fn cut(name: &str) -> String {
    name.chars().take(64).collect()
}

/// One stop string or a list of them.
pub(super) fn stop(value: Option<Value>, limits: &Limits) -> Result<Vec<String>, Refusal> {
    let list = match value {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![Value::String(one)],
        Some(Value::Array(list)) => list,
        Some(_) => return Err(invalid("`stop` must be a string or a list of strings")),
    };
    if list.len() > limits.stop_strings {
        return Err(invalid(format!(
            "`stop` has {} strings, the limit is {}",
            list.len(),
            limits.stop_strings
        )));
    }
    list.into_iter()
        .map(|value| match value {
            Value::String(text) if text.is_empty() => Err(invalid("`stop` holds an empty string")),
            Value::String(text) if text.len() > limits.stop_bytes => Err(invalid(format!(
                "`stop` holds a string of more than {} bytes",
                limits.stop_bytes
            ))),
            Value::String(text) => Ok(text),
            _ => Err(invalid("`stop` must be a string or a list of strings")),
        })
        .collect()
}

/// Refuses deep nesting before the JSON is parsed.
pub(super) fn check_depth(payload: &[u8], most: usize) -> Result<(), Refusal> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for &byte in payload {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > most {
                    return Err(invalid(format!("the JSON is nested deeper than {most}")));
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}
