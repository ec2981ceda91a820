//! Stock MQTT clients against a device: every program of examples/clients, as a newcomer runs it.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::device::{Device, PATIENCE};
use pipit_tests::example::{Example, source};
use pipit_tests::model;
use pipit_tests::process::{Finished, Running, signal};
use serde_json::Value;

const PROMPT: &str = "Say hello in one sentence.";
const LONG: &str = "Write a very long story about a wagtail.";

struct World {
    broker: Broker,
    device: Device,
}

impl World {
    fn new() -> Result<Self> {
        let broker = Broker::forgetful()?;
        let device = Device::start(&broker, "porch", &model::smollm2()?)?;
        Ok(Self { broker, device })
    }

    /// The whole answer to `prompt`, as the wire has it.
    fn reference(&self, prompt: &str) -> Result<String> {
        let answers = self.broker.subscribe(&self.device.topic("res/reference"))?;
        self.device.send(&self.broker, "reference", prompt, 100)?;
        let answer: Value = serde_json::from_str(&answers.next(PATIENCE)?.payload)?;
        let text = answer["choices"][0]["message"]["content"]
            .as_str()
            .with_context(|| format!("no answer: {answer}"))?;
        ensure!(!text.is_empty(), "an empty answer");
        Ok(text.to_owned())
    }

    /// A shell script, which takes the broker from its environment.
    fn script(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Example::mosquitto().command(name);
        command
            .env("MQTT_HOST", "127.0.0.1")
            .env("MQTT_PORT", self.broker.port().to_string());
        command.arg("porch").args(arguments);
        command
    }

    /// A Python or Node program, which takes the broker from its arguments.
    fn program(&self, example: &Example, name: &str, arguments: &[&str]) -> Command {
        let mut command = example.command(name);
        let port = self.broker.port().to_string();
        command.args(["porch", "--host", "127.0.0.1", "--port", &port]);
        command.args(arguments);
        command
    }
}

fn run(command: &mut Command) -> Result<Finished> {
    Running::start(command)?.finish(PATIENCE)
}

/// The chunks that a program showed add up to a beginning of the answer, in order.
fn assert_streamed(finished: &Finished, answer: &str) -> Result<()> {
    let mut text = String::new();
    let chunks = finished
        .stderr
        .lines()
        .filter_map(|line| line.strip_prefix("chunk "));
    for (at, chunk) in chunks.enumerate() {
        let (seq, piece) = chunk.split_once(": ").context("a chunk without a text")?;
        ensure!(seq == at.to_string(), "chunk {seq} is the {at}th");
        text += &serde_json::from_str::<String>(piece)?;
    }
    ensure!(!text.is_empty(), "no chunks: {}", finished.stderr);
    ensure!(
        answer.starts_with(&text),
        "the chunks say {text:?}, the answer {answer:?}"
    );
    assert_eq!(finished.stdout.trim_end_matches('\n'), answer);
    Ok(())
}

fn assert_refused(finished: &Finished, code: &str) {
    assert_ne!(finished.code, Some(0), "{finished:?}");
    assert!(finished.stdout.is_empty(), "{finished:?}");
    assert!(
        finished.stderr.contains(&format!("{code}: ")),
        "{code}: {finished:?}"
    );
}

#[test]
fn mosquitto_clients() -> Result<()> {
    let world = World::new()?;
    let answer = world.reference(PROMPT)?;

    let plain = run(&mut world.script("ask-5.sh", &[PROMPT]))?.success()?;
    ensure!(
        !plain.trim().is_empty() && serde_json::from_str::<Value>(&plain).is_err(),
        "plain text in, plain text out: {plain}"
    );
    for arguments in [&[PROMPT][..], &[PROMPT, "reply/porch"]] {
        let whole = run(&mut world.script("ask-311.sh", arguments))?.success()?;
        assert_eq!(whole.trim_end_matches('\n'), answer);
    }
    let streamed = run(&mut world.script("stream.sh", &[PROMPT]))?;
    assert_streamed(&streamed, &answer)?;

    let long = Running::start(&mut world.script("stream.sh", &[LONG, "500"]))?;
    let id = long.wait_for_line(PATIENCE, |line| line.starts_with("id "))?;
    long.wait_for_line(PATIENCE, |line| line.starts_with("chunk 0: "))?;
    run(&mut world.script("cancel.sh", &[&id["id ".len()..]]))?.success()?;
    assert_refused(&long.finish(PATIENCE)?, "cancelled");
    Ok(())
}

/// Whole, streamed, too late, and taken back with Ctrl-C: the same for every program.
fn ask_in_every_way(world: &World, example: &Example, name: &str, answer: &str) -> Result<()> {
    let whole = run(&mut world.program(example, name, &[PROMPT]))?.success()?;
    assert_eq!(whole.trim_end_matches('\n'), answer, "{name}");
    let streamed = run(&mut world.program(example, name, &[PROMPT, "--stream"]))?;
    assert_streamed(&streamed, answer)?;
    let late = run(&mut world.program(example, name, &[PROMPT, "--deadline-ms", "0"]))?;
    assert_refused(&late, "expired");
    let long = [LONG, "--stream", "--max-tokens", "500"];
    let long = Running::start(&mut world.program(example, name, &long))?;
    long.wait_for_line(PATIENCE, |line| line.starts_with("chunk 0: "))?;
    signal("INT", long.id())?;
    assert_refused(&long.finish(PATIENCE)?, "cancelled");
    Ok(())
}

#[test]
fn python_paho() -> Result<()> {
    let (world, example) = (World::new()?, Example::python()?);
    let answer = world.reference(PROMPT)?;
    for name in ["ask_311.py", "ask_5.py"] {
        ask_in_every_way(&world, &example, name, &answer)?;
    }
    let elsewhere = [PROMPT, "--reply-to", "reply/porch"];
    let whole = run(&mut world.program(&example, "ask_311.py", &elsewhere))?.success()?;
    assert_eq!(whole.trim_end_matches('\n'), answer);
    Ok(())
}

#[test]
fn mqtt_js() -> Result<()> {
    let (world, example) = (World::new()?, Example::node()?);
    let answer = world.reference(PROMPT)?;
    for name in ["ask_311.mjs", "ask_5.mjs"] {
        ask_in_every_way(&world, &example, name, &answer)?;
    }
    let elsewhere = [PROMPT, "--reply-to", "reply/porch"];
    let whole = run(&mut world.program(&example, "ask_311.mjs", &elsewhere))?.success()?;
    assert_eq!(whole.trim_end_matches('\n'), answer);
    Ok(())
}

#[test]
fn answers_obey_a_json_schema() -> Result<()> {
    let world = World::new()?;
    let schema = source("light.schema.json");
    let schema = schema.to_str().context("a path that is not UTF-8")?;
    let (python, node) = (Example::python()?, Example::node()?);
    let prompt = "Turn on the light in the kitchen.";
    for (example, name) in [
        (&python, "ask_311.py"),
        (&python, "ask_5.py"),
        (&node, "ask_311.mjs"),
        (&node, "ask_5.mjs"),
    ] {
        let answer = run(&mut world.program(example, name, &[prompt, "--schema", schema]))?.success()?;
        let answer: Value = serde_json::from_str(&answer).with_context(|| format!("{name}: {answer}"))?;
        let fields = answer.as_object().context("no object")?;
        assert_eq!(fields.len(), 2, "{name}: {answer}");
        assert!(answer["on"].is_boolean(), "{name}: {answer}");
        assert!(
            ["kitchen", "hall", "bedroom"].contains(&answer["room"].as_str().unwrap_or_default()),
            "{name}: {answer}"
        );
    }
    Ok(())
}
