//! What `pipit ask` asks for: flags become the body of a request.

use std::time::Duration;

use pipit::wire::body::{NamedSchema, ResponseFormat, Stop, Turn};
use pipit::wire::{Body, Role};
use serde_json::Value;

/// Flags that become fields of the request. What is not given is the device's to choose.
#[derive(Debug, clap::Args)]
pub(super) struct RequestArgs {
    /// Instructions before the prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of the answer
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", value_parser = number)]
    temperature: Option<f32>,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", value_parser = number)]
    top_p: Option<f32>,
    /// Draw from the best K tokens; 0 is all
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(i32).range(0..))]
    top_k: Option<i32>,
    /// Draw from tokens with at least this share of the best one's probability
    #[arg(long, value_name = "P", value_parser = number)]
    min_p: Option<f32>,
    /// Divide the logits of tokens seen before; 1 is off
    #[arg(long, value_name = "R", value_parser = number)]
    repeat_penalty: Option<f32>,
    /// The same seed gives the same answer
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<i64>,
    /// End the answer before this text; can be given again
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// JSON schema that the answer obeys: a file, or the schema itself
    #[arg(long, value_name = "FILE|JSON", value_parser = schema)]
    schema: Option<Value>,
    /// LoRA adapter of the device
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// -100 to 100; higher goes first
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-100..=100))]
    priority: Option<i32>,
    /// The work must begin within this time: 500ms, 60s, 5m
    #[arg(long, value_name = "TIME", value_parser = duration)]
    deadline: Option<Duration>,
}

impl RequestArgs {
    /// The body, as docs/protocol.md has it.
    pub(super) fn body(&self, id: &str, prompt: &str, stream: bool) -> Body {
        let system = self.system.iter().map(|text| Turn::new(Role::System, text));
        Body {
            id: Some(id.to_owned()),
            messages: system.chain([Turn::new(Role::User, prompt)]).collect(),
            stream: Some(stream),
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed,
            stop: (!self.stop.is_empty()).then(|| Stop::Several(self.stop.clone())),
            response_format: self.schema.as_ref().map(|schema| ResponseFormat::JsonSchema {
                json_schema: NamedSchema {
                    schema: schema.clone(),
                    ..NamedSchema::default()
                },
            }),
            adapter: self.adapter.clone(),
            priority: self.priority,
            deadline_ms: self
                .deadline
                .map(|deadline| u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX)),
            ..Body::default()
        }
    }
}

/// A time as people write it: `500ms`, `60s`, `5m`, `1h`; a number alone is seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let number: f64 = digits
        .parse()
        .map_err(|_| "hint: a number and ms, s, m or h, like 60s".to_owned())?;
    let unit = match &text[digits.len()..] {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("hint: the unit is ms, s, m or h".to_owned()),
    };
    Duration::try_from_secs_f64(number * unit).map_err(|error| error.to_string())
}

/// A number that JSON can hold.
fn number(text: &str) -> Result<f32, String> {
    text.parse()
        .ok()
        .filter(|number: &f32| number.is_finite())
        .ok_or_else(|| "hint: a number like 0.7".to_owned())
}

fn schema(text: &str) -> Result<Value, String> {
    let (place, json) = if text.trim_start().starts_with('{') {
        ("the schema".to_owned(), text.to_owned())
    } else {
        let json = std::fs::read_to_string(text)
            .map_err(|error| format!("{error}; hint: a file, or a JSON object in quotes"))?;
        (text.to_owned(), json)
    };
    match serde_json::from_str(&json) {
        Ok(schema @ Value::Object(_)) => Ok(schema),
        Ok(_) => Err(format!(
            "{place} is no JSON object; hint: {{\"type\": \"object\", ...}}"
        )),
        Err(error) => Err(format!(
            "{place} is no JSON: {error}; hint: {{\"type\": \"object\", ...}}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        request: RequestArgs,
    }

    fn body(flags: &[&str]) -> Value {
        let line = Line::try_parse_from([&["ask"], flags].concat()).unwrap();
        serde_json::to_value(line.request.body("one", "Hello", false)).unwrap()
    }

    #[test]
    fn without_flags_the_device_chooses() {
        let expected = json!({
            "id": "one", "messages": [{ "role": "user", "content": "Hello" }], "stream": false,
        });
        assert_eq!(body(&[]), expected);
    }

    #[test]
    fn every_flag_is_a_field() {
        let flags = [
            "--system",
            "Be brief.",
            "--max-tokens",
            "9",
            "--temperature",
            "0.7",
            "--top-p",
            "0.9",
            "--top-k",
            "40",
            "--min-p",
            "0.05",
            "--repeat-penalty",
            "1.1",
            "--seed",
            "-3",
            "--stop",
            "\n",
            "--stop",
            "END",
            "--schema",
            r#"{"type": "object"}"#,
            "--adapter",
            "home",
            "--priority",
            "-5",
            "--deadline",
            "1500ms",
        ];
        // As text: 0.7 is 0.7 on the wire.
        let expected = r#"{"id":"one","messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hello"}],"max_tokens":9,"temperature":0.7,"top_p":0.9,"top_k":40,"min_p":0.05,"repeat_penalty":1.1,"seed":-3,"stop":["\n","END"],"stream":false,"response_format":{"type":"json_schema","json_schema":{"schema":{"type":"object"}}},"adapter":"home","deadline_ms":1500,"priority":-5}"#;
        let line = Line::try_parse_from([&["ask"], &flags[..]].concat()).unwrap();
        let body = serde_json::to_string(&line.request.body("one", "Hello", false)).unwrap();
        assert_eq!(body, expected);
    }

    #[test]
    fn a_schema_can_be_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("schema.json");
        std::fs::write(&file, r#"{"type": "array"}"#).unwrap();
        let body = body(&["--schema", file.to_str().unwrap()]);
        assert_eq!(
            body["response_format"]["json_schema"]["schema"],
            json!({ "type": "array" })
        );
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_hint() {
        for flags in [
            ["--temperature", "nan"],
            ["--temperature", "warm"],
            ["--schema", "/nonexistent.json"],
            ["--schema", "{broken"],
            ["--deadline", "5 parsecs"],
        ] {
            let error = Line::try_parse_from([&["ask"], &flags[..]].concat())
                .unwrap_err()
                .to_string();
            assert!(error.contains(flags[0]) && error.contains("hint:"), "{error}");
        }
        assert!(Line::try_parse_from(["ask", "--priority", "101"]).is_err());
        assert!(Line::try_parse_from(["ask", "--top-k", "-1"]).is_err());
    }
}
