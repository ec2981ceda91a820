//! From a GGUF that somebody published to a fine-tuned one that answers over MQTT, with real programs throughout.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use pipit_tests::broker::Broker;
use pipit_tests::device::{Device, Options};
use pipit_tests::{model, program};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(300);
const SYSTEM: &str =
    "You control a smart home. Answer with one JSON object holding the intent and its slots.";
const PROMPT: &str = "Zet het licht in de keuken aan";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

#[test]
fn a_published_gguf_is_imported_fine_tuned_quantised_and_served() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (base, run, gguf) = (
        folder.path().join("base"),
        folder.path().join("run"),
        folder.path().join("home.Q8_0.gguf"),
    );
    let (base, run, gguf) = (text(&base)?, text(&run)?, text(&gguf)?);
    let published = model::smollm2()?;
    let (train, held_out) = (
        fixture("smart-home-train.jsonl"),
        fixture("smart-home-eval.jsonl"),
    );
    let (train, held_out) = (text(&train)?, text(&held_out)?);

    program::run("pipit-convert", ["import", text(&published)?, "-o", base], LONG)?.success()?;
    for file in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        let content = fs::read(Path::new(base).join(file)).with_context(|| file.to_owned())?;
        serde_json::from_slice::<Value>(&content).with_context(|| file.to_owned())?;
    }

    let loss = |adapter: &[&str]| -> Result<f64> {
        let mut arguments = vec![
            "eval",
            "--model",
            base,
            "--data",
            held_out,
            "--no-generate",
            "--json",
        ];
        arguments.extend(adapter);
        let report: Value =
            serde_json::from_str(&program::run("pipit-distill", arguments, LONG)?.success()?)?;
        report["loss"]
            .as_f64()
            .with_context(|| format!("no loss in {report}"))
    };
    let before = loss(&[])?;
    let sft = [
        "sft",
        "--model",
        base,
        "--data",
        train,
        "--method",
        "lora",
        "--max-steps",
        "8",
        "-o",
        run,
    ];
    program::run("pipit-distill", sft, LONG)?.success()?;
    let after = loss(&["--adapter", run])?;
    assert!(
        after < before - 0.5,
        "eight steps lower the loss on held-out rows: {before} -> {after}"
    );

    let convert = ["model", base, "--adapter", run, "-t", "Q8_0", "-o", gguf];
    program::run("pipit-convert", convert, LONG)?.success()?;

    let broker = Broker::forgetful()?;
    let device = Device::start(&broker, "whole-path", Path::new(gguf))?;
    let url = broker.url();
    let ask = [
        "ask",
        PROMPT,
        "--broker",
        &url,
        "--device",
        "whole-path",
        "--system",
        SYSTEM,
        "--stream",
        "--max-tokens",
        "48",
        "--timeout",
        "240s",
    ];
    let asked = || program::run("pipit", ask, LONG)?.success();
    let first = asked()?;
    assert!(
        first.contains("intent"),
        "eight steps teach the form of the answer: {first}"
    );
    assert_eq!(first, asked()?, "the same prompt gets the same answer");

    let messages = json!([{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]);
    let body = json!({"messages": messages, "temperature": 0, "max_tokens": 48});
    let answer = broker
        .request(&device.topic("req"), "reply/me", &body.to_string(), LONG)?
        .success()?;
    let answer: Value = serde_json::from_str(&answer)?;
    assert_eq!(
        answer["choices"][0]["message"]["content"].as_str(),
        first.strip_suffix('\n')
    );
    assert_eq!(answer["ai_generated"], true);
    drop(device);

    // The same adapter, not merged: a device with the base model answers like the one or like the other, by name.
    let (plain, lora) = (
        folder.path().join("base.Q8_0.gguf"),
        folder.path().join("home.lora.gguf"),
    );
    let convert = ["model", base, "-t", "Q8_0", "-o", text(&plain)?];
    program::run("pipit-convert", convert, LONG)?.success()?;
    let convert = ["adapter", run, "--base", base, "-o", text(&lora)?];
    program::run("pipit-convert", convert, LONG)?.success()?;
    let options = Options {
        config: format!("[adapters]\nhome = {:?}\n", text(&lora)?),
        ..Options::default()
    };
    let mut device = Device::new("two-minds", &plain, options)?;
    device.restart(&broker)?;
    let card = broker.subscribe(&device.topic("card"))?.next(LONG)?;
    let card: Value = serde_json::from_str(&card.payload)?;
    assert_eq!(card["adapters"], json!(["home"]), "{card}");
    let ask = |more: Value| -> Result<String> {
        let mut body = body.clone();
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        let answer = broker
            .request(&device.topic("req"), "reply/me", &body.to_string(), LONG)?
            .success()?;
        let answer: Value = serde_json::from_str(&answer)?;
        let content = answer["choices"][0]["message"]["content"].as_str();
        Ok(content.with_context(|| answer.to_string())?.to_owned())
    };
    // With the weights merged before they were quantised, or beside them: the last bits differ, the beginning does not.
    let beginning = |text: &str| text.chars().take(10).collect::<String>();
    let adapted = ask(json!({ "adapter": "home" }))?;
    assert_eq!(beginning(&adapted), beginning(&first));
    let own = ask(json!({}))?;
    assert!(
        !own.contains("\"intent\""),
        "the base model knows nothing of intents: {own}"
    );
    assert_eq!(
        ask(json!({ "adapter": "home" }))?,
        adapted,
        "what it computed before belongs to no adapter"
    );
    let refused = broker.request(
        &device.topic("req"),
        "reply/me",
        &json!({"messages": messages, "adapter": "office"}).to_string(),
        LONG,
    )?;
    let refused: Value = serde_json::from_str(&refused.success()?)?;
    assert_eq!(refused["error"]["code"], "invalid_request", "{refused}");
    Ok(())
}
