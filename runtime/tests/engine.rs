//! The engine, as the daemon sees it: frames to and from `pipit worker`, with a real model (SmolLM2; Gemma 3 where its
//! sliding windows and its SentencePiece vocabulary matter).
//!
//! The models are where `scripts/fetch-model` puts them; `PIPIT_TEST_MODEL` and `PIPIT_TEST_GEMMA` name others.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

mod models;

use models::model;

fn smollm2() -> PathBuf {
    model("PIPIT_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf")
}

fn gemma() -> PathBuf {
    model("PIPIT_TEST_GEMMA", "gemma-3-270m-q4_k_m.gguf")
}

/// A worker on one thread: ggml's threads spin, and tests run side by side.
struct Worker {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    jobs: u64,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Worker {
    fn start(model: &Path, settings: &Value) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pipit"))
            .arg("worker")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut load = json!({
            "op": "load", "model": model, "n_ctx": 2048, "slots": 4, "threads": 1,
            "cache_type_k": "f16", "cache_type_v": "f16", "prefill_chunk": 512, "prefill_ms": 250,
            "adapters": {}, "prefix_bytes": 64 << 20, "prefix_disk": null,
        });
        for (key, value) in settings.as_object().unwrap() {
            load[key] = value.clone();
        }
        let mut worker = Self {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
            jobs: 0,
        };
        worker.send(&load);
        let ready = worker.frame();
        assert_eq!(ready["event"], "ready", "{ready}");
        worker
    }

    fn send(&mut self, frame: &Value) {
        writeln!(self.input, "{frame}").unwrap();
    }

    fn frame(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the worker ended");
        serde_json::from_str(&line).unwrap()
    }

    /// Sends a request for a greedy answer; `more` overrides.
    fn run(&mut self, prompt: &str, more: &Value) -> u64 {
        self.jobs += 1;
        let mut messages = vec![json!({ "role": "user", "content": prompt })];
        if let Some(system) = more.get("system") {
            messages.insert(0, json!({ "role": "system", "content": system }));
        }
        let mut frame = json!({
            "op": "run", "job": self.jobs, "messages": messages, "max_tokens": 16, "stop": [], "stream": false,
            "schema": null, "adapter": null,
            "sampling": {
                "temperature": 0.0, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "repeat_penalty": 1.0,
                "frequency_penalty": 0.0, "presence_penalty": 0.0, "repeat_last_n": 64, "seed": 1,
            },
        });
        for (key, value) in more.as_object().unwrap() {
            match (key.as_str(), value) {
                ("system", _) => {}
                ("sampling", Value::Object(fields)) => {
                    for (field, value) in fields {
                        frame["sampling"][field] = value.clone();
                    }
                }
                _ => frame[key] = value.clone(),
            }
        }
        self.send(&frame);
        self.jobs
    }

    /// The ends of these jobs, in their order.
    fn ends(&mut self, jobs: &[u64]) -> Vec<Value> {
        let mut ends = HashMap::new();
        while ends.len() < jobs.len() {
            let frame = self.frame();
            if frame["event"] == "done" || frame["event"] == "failed" {
                let job = frame["job"].as_u64().unwrap();
                assert!(jobs.contains(&job), "{frame}");
                assert!(ends.insert(job, frame).is_none(), "two ends of job {job}");
            }
        }
        jobs.iter().map(|job| ends.remove(job).unwrap()).collect()
    }

    fn answer(&mut self, prompt: &str, more: &Value) -> Value {
        let job = self.run(prompt, more);
        self.ends(&[job]).remove(0)
    }
}

/// About 12 tokens a sentence.
fn long_system(sentences: usize) -> String {
    let rooms = ["kitchen", "hall", "attic", "cellar", "office", "garden"];
    (0..sentences)
        .map(|number| {
            format!(
                "Rule {number}: the lamp in the {} is number {}. ",
                rooms[number % 6],
                number * 7
            )
        })
        .collect()
}

#[test]
fn many_at_once_and_each_as_if_it_were_alone() {
    let mut worker = Worker::start(&smollm2(), &json!({}));
    let questions = [
        "What is the capital of France?",
        "Name three birds.",
        "Count to five.",
        "Say hello in Dutch.",
        "What is 2+2?",
        "Why is the sky blue?",
    ];
    let jobs: Vec<u64> = questions
        .iter()
        .map(|question| worker.run(question, &json!({})))
        .collect();
    for (question, end) in questions.iter().zip(worker.ends(&jobs)) {
        assert_eq!(end["event"], "done", "{question}: {end}");
        let tokens = end["completion_tokens"].as_u64().unwrap();
        assert!((1..=16).contains(&tokens), "{end}");
        assert!(!end["text"].as_str().unwrap().is_empty(), "{end}");
    }
    let sampled = json!({ "sampling": { "temperature": 0.9, "seed": 7, "repeat_penalty": 1.2 } });
    let other = json!({ "sampling": { "temperature": 0.9, "seed": 8, "repeat_penalty": 1.2 } });
    // Where its cells lie, and what was computed before, changes the last bits: from the same state it is the same.
    let poem =
        |more: &Value| Worker::start(&smollm2(), &json!({})).answer("Write a poem.", more)["text"].clone();
    let first = poem(&sampled);
    assert_eq!(first, poem(&sampled), "the same seed, the same answer");
    assert_ne!(first, poem(&other));
    let plain = json!({ "max_tokens": 60 });
    let penalised = json!({ "max_tokens": 60, "sampling": { "repeat_penalty": 1.5, "repeat_last_n": -1 } });
    let text = worker.answer("Repeat the word bird many times.", &plain)["text"].clone();
    assert_ne!(
        text,
        worker.answer("Repeat the word bird many times.", &penalised)["text"]
    );
    let stopped = json!({ "stop": ["Paris"], "max_tokens": 30 });
    let end = worker.answer(
        "What is the capital of France? Answer: Paris. Repeat it.",
        &stopped,
    );
    assert!(!end["text"].as_str().unwrap().contains("Paris"), "{end}");
}

#[test]
fn a_common_beginning_is_computed_once() {
    let mut worker = Worker::start(&smollm2(), &json!({}));
    let system = long_system(30);
    let more = json!({ "system": system, "max_tokens": 4 });
    let questions = [
        "Which lamp is in the hall?",
        "Name a room.",
        "How many rules?",
        "Say yes.",
    ];
    // All at once: three wait for what the first computes.
    let jobs: Vec<u64> = questions
        .iter()
        .map(|question| worker.run(question, &more))
        .collect();
    let ends = worker.ends(&jobs);
    let cached = |end: &Value| end["cached_tokens"].as_u64().unwrap();
    let prompt = ends[0]["prompt_tokens"].as_u64().unwrap();
    assert!(prompt > 350, "{prompt}");
    assert_eq!(cached(&ends[0]), 0);
    for end in &ends[1..] {
        assert!(cached(end) > prompt - 30, "{end}");
    }
    // And later: one that came back computes nothing but its last token.
    let end = worker.answer(questions[0], &more);
    assert_eq!(cached(&end), prompt - 1);
    assert_eq!(
        end["text"], ends[0]["text"],
        "what was shared is what was computed"
    );
    // A beginning that differs early is not shared.
    let end = worker.answer(
        questions[0],
        &json!({ "system": format!("No. {system}"), "max_tokens": 4 }),
    );
    assert!(cached(&end) < 16, "{end}");
}

#[test]
fn a_common_beginning_outlives_the_worker_unless_it_is_damaged_or_foreign() {
    let folder = tempfile::tempdir().unwrap();
    let settings = json!({ "prefix_disk": { "folder": folder.path(), "bytes": 64 << 20, "tokens": 64 } });
    let more = json!({ "system": long_system(30), "max_tokens": 4 });
    let start = |sha256: &str| {
        let mut worker = Worker::start(&smollm2(), &settings);
        worker.send(&json!({ "op": "identity", "sha256": sha256 }));
        worker
    };
    let cached = |end: &Value| end["cached_tokens"].as_u64().unwrap();
    let files = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder.path()).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let mut worker = start("aa");
    let first = worker.answer("Which lamp is in the hall?", &more);
    assert_eq!(files().len(), 0, "one prompt alone is not worth flash");
    worker.answer("Name a room.", &more);
    worker.answer("Say yes.", &more);
    drop(worker);
    let kept = files();
    assert!(
        kept.len() == 1 && kept[0].extension().unwrap() == "kv",
        "{kept:?}"
    );

    let mut worker = start("aa");
    let end = worker.answer("Which lamp is in the hall?", &more);
    assert!(cached(&end) > 350, "{end}");
    assert_eq!(end["text"], first["text"]);
    drop(worker);

    let mut worker = start("bb");
    let end = worker.answer("Which lamp is in the hall?", &more);
    assert_eq!(cached(&end), 0, "another model's: {end}");
    drop(worker);

    let mut content = std::fs::read(&kept[0]).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 1;
    std::fs::write(&kept[0], content).unwrap();
    let mut worker = start("aa");
    let end = worker.answer("Which lamp is in the hall?", &more);
    assert_eq!(cached(&end), 0, "damaged: {end}");
    assert_eq!(end["text"], first["text"]);
    assert!(!kept[0].exists(), "a damaged file is removed");
}

#[test]
fn a_beginning_that_left_the_context_comes_back_from_memory() {
    let cached = |end: &Value| end["cached_tokens"].as_u64().unwrap();
    let (long, other) = (long_system(30), format!("Other rules. {}", long_system(40)));
    let more = json!({ "system": long, "max_tokens": 6 });
    let questions = ["Which lamp is in the hall?", "Name a room."];
    for (bytes, kept) in [(64 << 20, true), (0, false)] {
        let mut worker = Worker::start(&smollm2(), &json!({ "n_ctx": 1024, "prefix_bytes": bytes }));
        let first = worker.answer(questions[0], &more);
        let prompt = first["prompt_tokens"].as_u64().unwrap();
        // Both are more than the context has.
        let end = worker.answer("Say yes.", &json!({ "system": other, "max_tokens": 4 }));
        assert!(cached(&end) < 32, "{end}");
        let end = worker.answer(questions[0], &more);
        assert_eq!(cached(&end) == prompt - 1, kept, "{end}");
        assert_eq!(end["text"], first["text"], "what is copied is what was computed");
        // One that parts from it later has the system messages, also when it comes with others.
        worker.answer("Say yes.", &json!({ "system": other, "max_tokens": 4 }));
        let jobs: Vec<u64> = questions
            .iter()
            .map(|question| worker.run(question, &more))
            .collect();
        let ends = worker.ends(&jobs);
        assert_eq!(ends[0]["text"], first["text"]);
        assert!(cached(&ends[1]) > prompt - 30, "{ends:?}");
    }
}

#[test]
fn more_than_memory_is_for_keeps_its_beginning() {
    // A token of SmolLM2 takes 23 KB: about 600 of them fit.
    let mut worker = Worker::start(&smollm2(), &json!({ "prefix_bytes": 14_000_000 }));
    let more = json!({ "max_tokens": 4 });
    let long = long_system(100);
    let first = worker.answer(&long, &more);
    worker.answer("Say yes.", &more);
    let end = worker.answer(&long, &more);
    let cached = end["cached_tokens"].as_u64().unwrap();
    assert!((400..700).contains(&cached), "{end}");
    assert_eq!(end["text"], first["text"]);
}

#[test]
fn a_full_context_makes_the_young_wait_and_loses_nothing() {
    // Four answers of 100 tokens and their prompts are more than 256.
    let mut worker = Worker::start(&smollm2(), &json!({ "n_ctx": 256 }));
    let more = json!({ "max_tokens": 100, "sampling": { "temperature": 1.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0 } });
    let jobs: Vec<u64> = (0..6)
        .map(|number| worker.run(&format!("Write a long story, number {number}."), &more))
        .collect();
    for end in worker.ends(&jobs) {
        assert_eq!(end["event"], "done", "{end}");
        let all = end["completion_tokens"] == 100 && end["finish_reason"] == "length";
        assert!(all || end["finish_reason"] == "stop", "{end}");
    }
    // One that needs all of it is cut where the context ends.
    let end = worker.answer("Write a long story.", &json!({ "max_tokens": 1000 }));
    let tokens = end["prompt_tokens"].as_u64().unwrap() + end["completion_tokens"].as_u64().unwrap();
    assert!(end["finish_reason"] == "stop" || tokens == 256, "{end}");
    let end = worker.answer(&long_system(40), &json!({}));
    assert_eq!(
        (&end["event"], &end["code"]),
        (&json!("failed"), &json!("too_large")),
        "{end}"
    );
}

#[test]
fn a_cancel_is_heard_during_prefill() {
    let mut worker = Worker::start(&smollm2(), &json!({ "prefill_ms": 20 }));
    let job = worker.run(&long_system(100), &json!({ "max_tokens": 100 }));
    let other = worker.run("Say yes.", &json!({ "max_tokens": 3 }));
    // The short one overtakes; the long one is at its prefill still.
    let end = worker.ends(&[other]).remove(0);
    assert_eq!(end["event"], "done", "{end}");
    worker.send(&json!({ "op": "cancel", "job": job }));
    let end = worker.ends(&[job]).remove(0);
    assert_eq!(
        (&end["event"], &end["code"]),
        (&json!("failed"), &json!("cancelled")),
        "{end}"
    );
    assert_eq!(worker.answer("Say yes.", &json!({}))["event"], "done");
}

#[test]
fn a_cancel_ends_a_step_and_the_others_compute_it_again() {
    // Steps of 512 tokens take a second or so: the cancel comes within one.
    let mut worker = Worker::start(&smollm2(), &json!({ "prefill_ms": 60_000 }));
    let more = json!({ "max_tokens": 8 });
    let question = format!("{} Which lamp is in the hall?", long_system(40));
    let alone = worker.answer(&question, &more);
    worker.answer("Say yes.", &more);
    let mut fresh = Worker::start(&smollm2(), &json!({ "prefill_ms": 60_000 }));
    let doomed = fresh.run(&format!("No. {}", long_system(90)), &more);
    let other = fresh.run(&question, &more);
    std::thread::sleep(std::time::Duration::from_millis(150));
    fresh.send(&json!({ "op": "cancel", "job": doomed }));
    let ends = fresh.ends(&[doomed, other]);
    assert_eq!(ends[0]["code"], "cancelled", "{ends:?}");
    assert_eq!(ends[1]["text"], alone["text"]);
    // Nothing is left of it that should not be.
    let end = fresh.answer(&question, &more);
    assert_eq!(end["text"], alone["text"]);
    assert!(end["cached_tokens"].as_u64().unwrap() > 400, "{end}");
}

#[test]
fn a_schema_is_obeyed_wherever_the_answer_ends() {
    let person = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age", "tags", "home"],
        "properties": {
            "name": { "type": "string", "maxLength": 20 },
            "age": { "type": "integer", "minimum": 0, "maximum": 120 },
            "tags": { "type": "array", "items": { "enum": ["tall", "old", "kind"] }, "minItems": 1, "maxItems": 3 },
            "home": { "$ref": "#/$defs/home" },
        },
        "$defs": { "home": { "type": "object", "required": ["city"], "properties": { "city": { "type": "string" } } } },
    });
    for path in [smollm2(), gemma()] {
        let mut worker = Worker::start(&path, &json!({}));
        for temperature in [0.0, 1.5] {
            for max_tokens in [1, 2, 7, 20, 40, 200] {
                let end = worker.answer(
                    "Describe a person as JSON.",
                    &json!({
                        "schema": person, "max_tokens": max_tokens,
                        "sampling": { "temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0 },
                    }),
                );
                assert_eq!(end["event"], "done", "{end}");
                let text = end["text"].as_str().unwrap();
                let value: Value =
                    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
                assert!(value["age"].as_u64().unwrap() <= 120, "{text}");
                assert!(value["name"].as_str().unwrap().chars().count() <= 20, "{text}");
                assert!(
                    (1..=3).contains(&value["tags"].as_array().unwrap().len()),
                    "{text}"
                );
                assert!(value["home"]["city"].is_string(), "{text}");
            }
        }
        let end = worker.answer("x", &json!({ "schema": { "const": { "a": [1, "ü"] } } }));
        assert_eq!(end["text"], r#"{"a":[1,"ü"]}"#, "{end}");
        for bad in [json!({ "type": "bogus" }), json!({ "$ref": "#/$defs/none" })] {
            let end = worker.answer("x", &json!({ "schema": bad }));
            assert_eq!(
                (&end["event"], &end["code"]),
                (&json!("failed"), &json!("invalid_request")),
                "{end}"
            );
        }
    }
}

#[test]
fn sliding_windows_share_whole_beginnings() {
    // Gemma 3 looks back 512 tokens in five of six layers: a beginning can be shared only where an entry ends.
    let mut worker = Worker::start(&gemma(), &json!({ "n_ctx": 4096 }));
    let rules = long_system(80);
    let ask = |question: &str| format!("{rules}{question}");
    // What follows is certain, so that no last bit decides.
    let questions = [
        "Rule 80: the lamp in the",
        "Rule 81: the lamp in",
        "Rule 82: the lamp",
        "Rule 83:",
    ];
    let cached = |end: &Value| end["cached_tokens"].as_u64().unwrap();
    let more = json!({ "max_tokens": 4 });
    let texts: Vec<(Value, u64)> = questions
        .iter()
        .map(|question| {
            let end = worker.answer(&ask(question), &more);
            (end["text"].clone(), cached(&end))
        })
        .collect();
    // The second notices where it parts from the first, the third and the fourth profit.
    assert!(texts[2].1 > 900 && texts[3].1 > 900, "{texts:?}");
    // At once, the others take over from the first when it gets there.
    let mut fresh = Worker::start(&gemma(), &json!({ "n_ctx": 4096 }));
    let jobs: Vec<u64> = questions
        .iter()
        .map(|question| fresh.run(&ask(question), &more))
        .collect();
    let ends = fresh.ends(&jobs);
    for (end, (text, _)) in ends.iter().zip(&texts) {
        assert_eq!(end["text"], *text, "shared or not, the answer is the same");
    }
    assert!(ends[1..].iter().all(|end| cached(end) > 900), "{ends:?}");
}

#[test]
fn every_type_of_the_kv_cache_answers() {
    for (k, v) in [
        ("q8_0", "q8_0"),
        ("q4_0", "f16"),
        ("f16", "q4_0"),
        ("bf16", "bf16"),
        ("f32", "f32"),
    ] {
        let settings = json!({ "cache_type_k": k, "cache_type_v": v, "n_ctx": 512 });
        let mut worker = Worker::start(&smollm2(), &settings);
        let end = worker.answer("What is the capital of France?", &json!({ "max_tokens": 20 }));
        assert!(end["text"].as_str().unwrap().len() > 10, "{k} {v}: {end}");
    }
}
