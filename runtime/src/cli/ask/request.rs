//! What `pipit ask` asks for: flags become the body of a request.

use std::time::Duration;

use serde_json::{Value, json};

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
    temperature: Option<f64>,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", value_parser = number)]
    top_p: Option<f64>,
    /// Draw from the best K tokens; 0 is all
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Draw from tokens with at least this share of the best one's probability
    #[arg(long, value_name = "P", value_parser = number)]
    min_p: Option<f64>,
    /// Divide the logits of tokens seen before; 1 is off
    #[arg(long, value_name = "R", value_parser = number)]
    repeat_penalty: Option<f64>,
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
    pub(super) fn body(&self, id: &str, prompt: &str, stream: bool) -> Value {
        let system = self
            .system
            .iter()
            .map(|text| json!({ "role": "system", "content": text }));
        let user = json!({ "role": "user", "content": prompt });
        let messages: Vec<Value> = system.chain([user]).collect();
        let mut body = json!({ "id": id, "messages": messages, "stream": stream });
        let format = self.schema.as_ref().map(|schema| {
            json!({
                "type": "json_schema",
                "json_schema": { "name": "answer", "strict": true, "schema": schema },
            })
        });
        let stop = Some(&self.stop).filter(|stop| !stop.is_empty());
        let deadline_ms = self
            .deadline
            .map(|deadline| u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
        for (field, value) in [
            ("max_tokens", self.max_tokens.map(Value::from)),
            ("temperature", self.temperature.map(Value::from)),
            ("top_p", self.top_p.map(Value::from)),
            ("top_k", self.top_k.map(Value::from)),
            ("min_p", self.min_p.map(Value::from)),
            ("repeat_penalty", self.repeat_penalty.map(Value::from)),
            ("seed", self.seed.map(Value::from)),
            ("stop", stop.map(|stop| json!(stop))),
            ("response_format", format),
            ("adapter", self.adapter.as_deref().map(Value::from)),
            ("priority", self.priority.map(Value::from)),
            ("deadline_ms", deadline_ms.map(Value::from)),
        ] {
            if let Some(value) = value {
                body[field] = value;
            }
        }
        body
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
fn number(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|number: &f64| number.is_finite())
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

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        request: RequestArgs,
    }

    fn body(flags: &[&str]) -> Value {
        let line = Line::try_parse_from([&["ask"], flags].concat()).unwrap();
        line.request.body("one", "Hello", false)
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
        // As text: 0.7 is 0.7 on the wire, not the nearest f32.
        let expected = r#"{"id":"one","messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hello"}],"stream":false,"max_tokens":9,"temperature":0.7,"top_p":0.9,"top_k":40,"min_p":0.05,"repeat_penalty":1.1,"seed":-3,"stop":["\n","END"],"response_format":{"type":"json_schema","json_schema":{"name":"answer","strict":true,"schema":{"type":"object"}}},"adapter":"home","priority":-5,"deadline_ms":1500}"#;
        assert_eq!(body(&flags).to_string(), expected);
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
