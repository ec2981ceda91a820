//! Home Assistant finds a device, hears of it again when it has begun, asks it, changes its model, and loses it when the
//! configuration says so. The second test does the same with a real Home Assistant.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::{Broker, Message, Subscription};
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::package::{Maker, Package};
use pipit_tests::process::Running;
use pipit_tests::program;
use serde_json::{Value, json};

const OFF: &str =
    "[model]\nthreads = 1\nn_ctx = 1024\nslots = 2\n[metrics]\ninterval_s = 1\n[admin]\nover_mqtt = true\n";
const ON: &str = "[home_assistant]\ndiscovery = true\n";
const TOPIC: &str = "homeassistant/device/pipit-hall_1/config";

/// What is said below `homeassistant/` before the test itself says something there.
fn said(broker: &Broker, heard: &Subscription) -> Result<Vec<Message>> {
    broker.publish("homeassistant/marker", "x", &[])?;
    let mut said = Vec::new();
    loop {
        match heard.next(PATIENCE)? {
            message if message.topic.ends_with("/marker") => return Ok(said),
            message if message.topic.ends_with("/status") => {}
            message => said.push(message),
        }
    }
}

/// What is retained there.
fn retained(broker: &Broker) -> Result<Vec<Message>> {
    said(broker, &broker.subscribe("homeassistant/#")?)
}

fn restart(device: &mut Device, broker: &Broker, config: &str) -> Result<()> {
    device.stop()?;
    device.configure(config);
    device.restart(broker)
}

fn install(device: &Device, package: &Package) -> Result<()> {
    let mut command = Command::new(program::path("pipit")?);
    command.args(["model", "install"]).arg(package.path());
    command.arg("--config").arg(device.config());
    command.arg("--state-dir").arg(device.state());
    Running::start(&mut command)?.finish(PATIENCE)?.success()?;
    Ok(())
}

/// A device that does not run yet, with two models installed, and its configurations with discovery off and on. Home
/// Assistant takes no dot in a topic of its own.
fn hall() -> Result<(Device, String, String)> {
    let maker = Maker::new()?;
    let off = format!("{OFF}{}", maker.trusted());
    let options = Options {
        config: off.clone(),
        ..Options::default()
    };
    let device = Device::of_store("hall.1", options)?;
    std::fs::write(device.config(), &off)?;
    for (kind, version) in [("F16", "1"), ("BF16", "2")] {
        install(&device, &maker.pack(&Tiny::of_type(kind)?.path(), version, &[])?)?;
    }
    let on = format!("{off}{ON}");
    Ok((device, off, on))
}

#[test]
fn home_assistant_finds_asks_and_loses_a_device() -> Result<()> {
    let (mut device, off, on) = hall()?;
    let broker = Broker::forgetful()?;
    let heard = broker.subscribe("homeassistant/#")?;
    device.restart(&broker)?;
    ensure!(said(&broker, &heard)?.is_empty(), "it is off by default");

    restart(&mut device, &broker, &on)?;
    let shown = said(&broker, &heard)?;
    let kept = retained(&broker)?;
    let last = shown.last().context("nothing was published")?;
    assert_eq!((kept.len(), &kept[0], last.topic.as_str()), (1, last, TOPIC));
    let shown: Value = serde_json::from_str(&last.payload)?;
    let entities = &shown["components"];
    assert_eq!(shown["availability"][0]["topic"], device.topic("status"));

    // Home Assistant begins anew, and takes its leave.
    broker.publish("homeassistant/status", "online", &[])?;
    let again = heard.wait_for(PATIENCE, |message| message.topic == TOPIC)?;
    assert_eq!(again, kept[0]);
    broker.publish("homeassistant/status", "offline", &[])?;

    // A prompt, as the template of its text makes it.
    let answers = broker.subscribe(entities["answer"]["state_topic"].as_str().context("no answer")?)?;
    let body = json!({"messages": [{"role": "user", "content": "Hello."}], "reply_to": device.topic("res/home-assistant")});
    for entity in ["prompt", "ask"] {
        let topic = entities[entity]["command_topic"].as_str().context("no command")?;
        broker.publish(topic, &body.to_string(), &[])?;
        let answer: Value = serde_json::from_str(&answers.next(PATIENCE)?.payload)?;
        ensure!(answer["ai_generated"] == true, "{answer}");
    }
    ensure!(said(&broker, &heard)?.is_empty(), "it answered a farewell");

    // The model that is not served, as the template of its select makes it.
    let select = &entities["model"];
    let cards = broker.subscribe(select["state_topic"].as_str().context("no state")?)?;
    let served = |message: &Message| {
        let card: Value = serde_json::from_str(&message.payload).unwrap_or_default();
        card["model"]["id"].clone()
    };
    let first = served(&cards.next(PATIENCE)?);
    let options = select["options"].as_array().context("no options")?;
    ensure!(
        options.len() == 2 && options.contains(&first),
        "{select}: {first}"
    );
    let other = options
        .iter()
        .find(|option| **option != first)
        .context("one model")?;
    let topic = select["command_topic"].as_str().context("no command")?;
    broker.publish(
        topic,
        &json!({"action": "activate", "model": other}).to_string(),
        &[],
    )?;
    cards.wait_for(PATIENCE, |card| served(card) == *other)?;

    said(&broker, &heard)?;
    restart(&mut device, &broker, &off)?;
    let removal = Message {
        topic: TOPIC.to_owned(),
        payload: String::new(),
    };
    assert_eq!(said(&broker, &heard)?, [removal]);
    ensure!(retained(&broker)?.is_empty(), "something is left at the broker");
    restart(&mut device, &broker, &off)?;
    ensure!(said(&broker, &heard)?.is_empty(), "it is removed once");
    Ok(())
}

/// Home Assistant's own code runs: it takes the message, its templates make requests, and read what the device says.
#[test]
#[ignore = "makes an installation of Home Assistant; ./check --references runs it"]
fn a_real_home_assistant() -> Result<()> {
    let (mut device, off, on) = hall()?;
    let broker = Broker::forgetful()?;
    device.configure(&on);
    device.restart(&broker)?;
    let requests = broker.subscribe(&device.topic("req"))?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("home-assistant");
    let mut command = Command::new("bash");
    command.args([
        "-c",
        "exec ./python - \"$0\" <check.py",
        &broker.port().to_string(),
    ]);
    let house = Running::start(command.current_dir(folder))?;
    // An installation takes minutes.
    let limit = PATIENCE * 5;
    let next = |what: &str| -> Result<Value> {
        let line = house.wait_for_line(limit, |line| line.starts_with('{'));
        let line = line.with_context(|| format!("{what}: {}", house.said()))?;
        println!("{line}");
        Ok(serde_json::from_str(&line)?)
    };

    let first = next("the device is not seen")?;
    let seen = &first["seen"];
    assert_eq!(first["devices"][0]["name"], "hall.1");
    assert_eq!(
        (&seen["state"]["state"], &seen["state"]["device_class"]),
        (&json!("ready"), &json!("enum"))
    );
    for measured in ["speed", "queue", "memory"] {
        let value = seen[measured]["state"].as_str().unwrap_or_default();
        ensure!(value.parse::<f64>().is_ok(), "{measured}: {seen}");
    }
    let options = seen["model"]["options"].as_array().context("no options")?;
    ensure!(
        options.len() == 2 && options.contains(&seen["model"]["state"]),
        "{}",
        seen["model"]
    );

    for what in ["prompt", "ask"] {
        let answer = next("no answer")?[what].clone();
        let (short, whole) = (answer["state"].as_str(), answer["answer"].as_str());
        let (short, whole) = short.zip(whole).with_context(|| answer.to_string())?;
        ensure!(
            short.chars().count() <= 255 && whole.chars().count() >= short.chars().count(),
            "{answer}"
        );
        ensure!(
            answer["ai_generated"] == true && answer["error"].is_null(),
            "{answer}"
        );
        ensure!(
            answer["model_sha256"]
                .as_str()
                .is_some_and(|sha256| sha256.len() == 64),
            "{answer}"
        );
        let request: Value = serde_json::from_str(&requests.next(PATIENCE)?.payload)?;
        let text = request["messages"][0]["content"].as_str().unwrap_or_default();
        ensure!(
            what == "ask" || text == "Say \"hello\" to <Jörg> & {{ friends }}.",
            "{request}"
        );
    }
    ensure!(
        options.contains(&next("the model did not change")?["model"]),
        "another model"
    );
    restart(&mut device, &broker, &off)?;
    assert_eq!(next("it is still there")?["left"], json!({}));
    house.finish(PATIENCE)?.success()?;
    Ok(())
}
