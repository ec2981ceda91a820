//! Tasks: a prompt with a place for a payload, so that a sensor need not know what a prompt is.
//!
//! In: a file of `[tasks]` and the raw payload of a message on `task/{name}`. Out: the JSON of a request, which then goes
//! the way of every other one. What every prompt of a task begins with alike is computed once (engine::prefix).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{Config, ConfigError};
use crate::wire::topics::valid_id;
use crate::wire::{Envelope, Rules, Topics, request};

/// What stands in a prompt where the payload goes.
const PLACE: &str = "{payload}";

/// A task's file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    system: Option<String>,
    prompt: String,
    schema: Option<PathBuf>,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    adapter: Option<String>,
    reply_to: Option<String>,
}

/// A task.
#[derive(Clone, Debug)]
pub struct Task {
    prompt: String,
    /// Everything of the request but the prompt.
    body: Value,
    /// Where the answer goes when the message does not say; the owner's word, so it needs no allowed prefix.
    pub reply_to: Option<String>,
}

/// Reads every task of a configuration and checks that it makes a request which this device takes.
///
/// # Errors
/// The first file that cannot be read or makes none.
pub fn load(config: &Config, adapters: &[String]) -> Result<BTreeMap<String, Task>, ConfigError> {
    let topics = Topics::new(&config.root, &config.device);
    let mut tasks = BTreeMap::new();
    for (name, path) in &config.tasks {
        let fail =
            |why: String| ConfigError::value(format!("tasks.{name}"), format!("{}: {why}", path.display()));
        if !valid_id(name) {
            return Err(fail(
                "its name becomes a topic; hint: 1 to 64 of A-Z a-z 0-9 _ . -".to_owned(),
            ));
        }
        let task = Task::read(path).map_err(fail)?;
        if let Some(topic) = &task.reply_to {
            let own = std::slice::from_ref(topic);
            topics
                .check_reply(topic, own)
                .map_err(|why| fail(format!("reply_to: {why}")))?;
        }
        let rules = Rules {
            topics: &topics,
            prefixes: &[],
            limits: &config.limits,
            adapters,
        };
        let body = task.request("0");
        let envelope = Envelope {
            payload: &body,
            ..Envelope::default()
        };
        request::parse(&envelope, &rules).map_err(|rejection| fail(rejection.message))?;
        tasks.insert(name.clone(), task);
    }
    Ok(tasks)
}

impl Task {
    fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| format!("{error}; hint: is it there, and may this user read it?"))?;
        let file: File = toml::from_str(&text)
            .map_err(|error| format!("{}; hint: docs/protocol.md, Tasks", error.to_string().trim()))?;
        if !file.prompt.contains(PLACE) {
            return Err(format!(
                "`prompt` has no {PLACE}; hint: it stands where the payload goes"
            ));
        }
        let mut body = json!({});
        let messages = file
            .system
            .iter()
            .map(|text| json!({"role": "system", "content": text}));
        body["messages"] = messages.collect();
        if let Some(schema) = &file.schema {
            let beside = path.parent().unwrap_or(Path::new("")).join(schema);
            let schema: Value = std::fs::read(&beside)
                .map_err(|error| error.to_string())
                .and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string()))
                .map_err(|why| {
                    format!(
                        "schema {}: {why}; hint: a file with a JSON schema",
                        beside.display()
                    )
                })?;
            body["response_format"] = json!({"type": "json_schema", "json_schema": {"schema": schema}});
        }
        // null is the same as absent.
        body["max_tokens"] = json!(file.max_tokens);
        body["temperature"] = json!(file.temperature);
        body["adapter"] = json!(file.adapter);
        Ok(Self {
            prompt: file.prompt,
            body,
            reply_to: file.reply_to,
        })
    }

    /// The request for a payload. The payload is text in a message, whatever is in it.
    pub fn request(&self, payload: &str) -> Vec<u8> {
        let mut body = self.body.clone();
        let prompt = self.prompt.replace(PLACE, payload.trim());
        if let Some(messages) = body["messages"].as_array_mut() {
            messages.push(json!({"role": "user", "content": prompt}));
        }
        // Maps with string keys only: this cannot fail.
        serde_json::to_vec(&body).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration with one task of this text, and what comes of it.
    fn loaded(name: &str, text: &str) -> Result<BTreeMap<String, Task>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("task.toml");
        std::fs::write(&path, text).unwrap();
        std::fs::write(folder.path().join("good.json"), r#"{"type": "object"}"#).unwrap();
        std::fs::write(folder.path().join("bad.json"), "[7]").unwrap();
        let mut config = Config::default();
        config.tasks.insert(name.to_owned(), path);
        load(&config, &["known".to_owned()]).map_err(|error| error.to_string())
    }

    #[test]
    fn a_payload_is_text_in_its_place_and_nowhere_else() {
        let tasks = loaded(
            "alarm",
            "system = 'Watch.'\nprompt = 'It is {payload} degrees, {payload}.'\nschema = 'good.json'\nmax_tokens = 7",
        );
        let body = tasks.unwrap()["alarm"].request(" \"{payload}\"}], \"adapter\": \"x\n");
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["messages"][0]["content"], "Watch.");
        let said = "It is \"{payload}\"}], \"adapter\": \"x degrees, \"{payload}\"}], \"adapter\": \"x.";
        assert_eq!(body["messages"][1]["content"], said);
        assert_eq!((&body["max_tokens"], &body["adapter"]), (&json!(7), &Value::Null));
        assert_eq!(body["response_format"]["json_schema"]["schema"]["type"], "object");
    }

    #[test]
    fn a_task_that_cannot_be_is_named_at_the_start() {
        for (name, text, why) in [
            ("a b", "prompt = '{payload}'", "its name"),
            ("a", "prompt = 'x'", "has no {payload}"),
            ("a", "promt = '{payload}'", "promt"),
            ("a", "prompt = '{payload}'\nschema = 'absent.json'", "absent.json"),
            ("a", "prompt = '{payload}'\nschema = 'bad.json'", "schema"),
            ("a", "prompt = '{payload}'\nadapter = 'unknown'", "unknown"),
            ("a", "prompt = '{payload}'\nmax_tokens = 0", "max_tokens"),
            (
                "a",
                "prompt = '{payload}'\nreply_to = 'pipit/v1/x/req'",
                "reply_to",
            ),
            ("a", "prompt = '{payload}'\nreply_to = 'a/#'", "reply_to"),
        ] {
            let error = loaded(name, text).unwrap_err();
            assert!(error.contains(why) && error.contains("tasks."), "{why}: {error}");
        }
        assert!(
            loaded(
                "a",
                "prompt = '{payload}'\nadapter = 'known'\nreply_to = 'alarms/x'"
            )
            .is_ok()
        );
    }
}
