//! `response_format`: the JSON schema that an answer must obey, bounded before anybody compiles it.
//!
//! In: OpenAI's object, or llama-server's shorthand. Out: a schema without references to other documents. The
//! engine compiles it; a keyword that it does not know is its business. Sources: OpenAI's structured outputs;
//! llama.cpp tools/server/README.md; JSON Schema 2020-12.

use serde_json::{Map, Value, json};

use super::fields::{cut, take};
use super::{Limits, Refusal, invalid};
use crate::wire::answer::ErrorCode;
use crate::wire::topics::valid_id;

/// Longest regular expression in a schema, in bytes.
const PATTERN_BYTES: usize = 256;

/// The schema that a `response_format` asks for; `None` for text.
///
/// # Errors
/// What cannot be understood, is too large, or refers to another document; named by its JSON pointer.
pub(super) fn schema(format: Option<Value>, limits: &Limits) -> Result<Option<Value>, Refusal> {
    let Some(format) = format else {
        return Ok(None);
    };
    let Value::Object(mut format) = format else {
        return Err(invalid("`response_format` must be an object"));
    };
    let kind = take(&mut format, "type");
    let schema = match kind.as_ref().and_then(Value::as_str) {
        Some("text") => None,
        Some("json_object") => match take(&mut format, "schema") {
            Some(schema) => Some(bounded(schema, "/response_format/schema", limits)?),
            None => Some(json!({ "type": "object" })),
        },
        Some("json_schema") => {
            let Some(Value::Object(wrapper)) = take(&mut format, "json_schema") else {
                return Err(invalid("`response_format.json_schema` must be an object"));
            };
            Some(wrapped(wrapper, limits)?)
        }
        _ => {
            return Err(invalid(
                "`response_format.type` must be text, json_object or json_schema",
            ));
        }
    };
    match format.keys().next() {
        None => Ok(schema),
        Some(field) => Err(invalid(format!("unknown field `response_format.{}`", cut(field)))),
    }
}

/// OpenAI's `{"name": …, "description": …, "schema": …, "strict": …}`. The answer always obeys: `strict` changes nothing.
fn wrapped(mut wrapper: Map<String, Value>, limits: &Limits) -> Result<Value, Refusal> {
    let Some(schema) = take(&mut wrapper, "schema") else {
        return Err(invalid("`response_format.json_schema.schema` is missing"));
    };
    let schema = bounded(schema, "/response_format/json_schema/schema", limits)?;
    let fits = |field: &str, value: &Value| match field {
        "name" => value.as_str().is_some_and(valid_id),
        "description" => value.is_string(),
        "strict" => value.is_boolean(),
        _ => false,
    };
    for field in ["name", "description", "strict"] {
        if take(&mut wrapper, field).is_some_and(|value| !fits(field, &value)) {
            let wanted = match field {
                "name" => "match [A-Za-z0-9_.-]{1,64}",
                "description" => "be a string",
                _ => "be true or false",
            };
            return Err(invalid(format!(
                "`response_format.json_schema.{field}` must {wanted}"
            )));
        }
    }
    match wrapper.keys().next() {
        None => Ok(schema),
        Some(field) => Err(invalid(format!(
            "unknown field `response_format.json_schema.{}`",
            cut(field)
        ))),
    }
}

/// Checks a schema's size and what it refers to. Its depth is a part of the request's, which was checked before.
fn bounded(schema: Value, place: &str, limits: &Limits) -> Result<Value, Refusal> {
    if !schema.is_object() {
        return Err(invalid(format!("{place}: a JSON schema must be an object")));
    }
    let bytes = schema.to_string().len();
    if bytes > limits.schema_bytes {
        return Err((
            ErrorCode::TooLarge,
            format!(
                "{place}: the JSON schema has {bytes} bytes, the limit is {}",
                limits.schema_bytes
            ),
        ));
    }
    check(&schema, place)?;
    Ok(schema)
}

fn check(schema: &Value, place: &str) -> Result<(), Refusal> {
    match schema {
        Value::Object(keywords) => keywords
            .iter()
            .try_for_each(|(keyword, value)| check_keyword(keyword, value, &below(place, keyword))),
        Value::Array(schemas) => schemas
            .iter()
            .enumerate()
            .try_for_each(|(at, schema)| check(schema, &format!("{place}/{at}"))),
        _ => Ok(()),
    }
}

fn check_keyword(keyword: &str, value: &Value, place: &str) -> Result<(), Refusal> {
    match keyword {
        // Values, not schemas: whatever they hold is data.
        "const" | "enum" | "default" | "examples" => Ok(()),
        "$ref" | "$dynamicRef" | "$recursiveRef" => match value.as_str() {
            Some(target) if target.starts_with('#') => Ok(()),
            _ => Err(invalid(format!(
                "{}: `{keyword}` may only refer to this schema itself, as in `#/$defs/name`",
                shown(place)
            ))),
        },
        "pattern" => check_pattern(keyword, value.as_str(), place),
        "properties" | "patternProperties" | "$defs" | "definitions" | "dependentSchemas" => {
            let Value::Object(schemas) = value else {
                return Err(invalid(format!(
                    "{}: `{keyword}` must be an object",
                    shown(place)
                )));
            };
            schemas.iter().try_for_each(|(name, schema)| {
                let place = below(place, name);
                if keyword == "patternProperties" {
                    check_pattern(keyword, Some(name), &place)?;
                }
                check(schema, &place)
            })
        }
        _ => check(value, place),
    }
}

fn check_pattern(keyword: &str, pattern: Option<&str>, place: &str) -> Result<(), Refusal> {
    match pattern {
        Some(pattern) if pattern.len() <= PATTERN_BYTES => Ok(()),
        Some(pattern) => Err(invalid(format!(
            "{}: `{keyword}` has {} bytes, the limit is {PATTERN_BYTES}",
            shown(place),
            pattern.len()
        ))),
        None => Err(invalid(format!("{}: `{keyword}` must be a string", shown(place)))),
    }
}

/// A step down in a JSON pointer (RFC 6901).
fn below(place: &str, name: &str) -> String {
    format!("{place}/{}", name.replace('~', "~0").replace('/', "~1"))
}

/// A pointer as a message shows it: names in it are as long as whoever sent them likes.
fn shown(place: &str) -> String {
    const MOST: usize = 200;
    if place.chars().count() <= MOST {
        return place.to_owned();
    }
    let mut start: String = place.chars().take(MOST).collect();
    start.push('…');
    start
}
