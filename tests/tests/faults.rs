//! Nothing lost, nothing twice: the daemon is killed at every step of a request's way, and so are its worker, its
//! broker and the end of its journal. Every request has one final answer.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::{Client, Outgoing};
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::process;
use serde_json::Value;

/// One thread, because ggml's threads spin; counters every second; sampled answers, so that a second run shows.
const CONFIG: &str = "[model]\nthreads = 1\n[metrics]\ninterval_s = 1\n[sampling]\ntemperature = 1.0\n";
const POINTS: [&str; 7] = [
    "after_receive",
    "after_journal",
    "after_ack",
    "mid_stream",
    "after_run",
    "after_final",
    "before_mark",
];

/// A device that does not run yet, and a client that hears all its answers and counters.
fn world(broker: &Broker, name: &str, model: &Tiny) -> Result<(Device, Client)> {
    let options = Options {
        config: CONFIG.to_owned(),
        ..Options::default()
    };
    let device = Device::new(name, &model.path(), options)?;
    let filters = [
        device.topic("res/#"),
        device.topic("metrics"),
        "reply/#".to_owned(),
    ];
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    let client = Client::connect(broker.port(), &format!("client-of-{name}"), &filters)?;
    Ok((device, client))
}

/// JSON requests with an id, every other one streamed, and plain text without one, which the device has to recognise.
fn ask_all(device: &Device, client: &Client) -> Result<()> {
    for number in 0..6 {
        let id = format!("r{number}");
        let mut request = device.request(&id, &format!("Say {number}."), 24);
        let mut body: Value = serde_json::from_slice(&request.payload)?;
        body["stream"] = Value::from(number % 2 == 0);
        request.payload = body.to_string().into_bytes();
        client.ask(&id, request);
    }
    for number in 0..3 {
        let topic = format!("reply/{}-{number}", device.topic("plain").replace('/', "-"));
        let plain = Outgoing {
            topic: device.topic("req"),
            payload: format!("Plain text {number}").into_bytes(),
            response_topic: Some(topic.clone()),
            ..Outgoing::default()
        };
        client.ask(&topic, plain);
    }
    Ok(())
}

/// All the answers there will ever be: one more request goes through the whole queue behind the others.
fn settle(device: &Device, client: &Client) -> Result<()> {
    client.wait_answered(PATIENCE)?;
    client.ask("last", device.request("last", "Say goodbye.", 4));
    client.wait_answered(PATIENCE)
}

/// A counter of the device's metrics.
fn counter(device: &Device, client: &Client, name: &str) -> u64 {
    client.see(|seen| seen.json(&device.topic("metrics"))[name].as_u64().unwrap_or(0))
}

fn wait_for_counter(device: &Device, client: &Client, name: &str, least: u64) -> Result<()> {
    let topic = device.topic("metrics");
    client.wait(PATIENCE, &format!("{name} of {least}"), |seen| {
        seen.json(&topic)[name]
            .as_u64()
            .is_some_and(|count| count >= least)
    })
}

#[test]
fn a_daemon_that_dies_at_any_step_answers_everything_once() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    for point in POINTS {
        for passage in [1, 3] {
            let name = format!("{point}-{passage}");
            let (mut device, client) = world(&broker, &name, &model)?;
            device.launch(&broker.url(), Some(&format!("{point}:{passage}")))?;
            // It has subscribed: from here on the broker keeps for it what it has not acknowledged.
            device.wait_for_line(PATIENCE, |line| line.contains("connected to the broker"))?;
            ask_all(&device, &client)?;
            let dead = device
                .ended(PATIENCE)
                .with_context(|| format!("{name} is never passed"))?;
            ensure!(dead.code.is_none(), "{name}: not killed: {dead:?}");
            let before = client.see(|seen| seen.order.len());
            device.launch(&broker.url(), None)?;
            settle(&device, &client).with_context(|| name.clone())?;
            let again = client.check_promise().with_context(|| name.clone())?;
            ensure!(
                client.see(|seen| seen.answers.values().all(|all| all[0].error.is_none())),
                "{name}: an error instead of an answer"
            );
            println!("{name}: {before} answered before, {again} came again");
            device.kill()?;
        }
    }
    Ok(())
}

#[test]
fn a_worker_that_is_killed_again_and_again_costs_no_answer() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let (mut device, client) = world(&broker, "worker", &model)?;
    device.restart(&broker)?;
    for round in 0..5 {
        for number in 0..20 {
            let id = format!("w{round}-{number}");
            client.ask(&id, device.request(&id, "Say something long.", 48));
        }
        client.wait(PATIENCE, "answers before the kill", |seen| {
            seen.answers.len() > round * 20 + 5
        })?;
        process::signal("KILL", device.worker()?)?;
        client.wait_answered(PATIENCE)?;
    }
    settle(&device, &client)?;
    ensure!(
        client.check_promise()? == 0,
        "no answer comes twice when only the worker dies"
    );
    wait_for_counter(&device, &client, "worker_ends", 5)?;
    // Each request was run to its end once: what the kills interrupted was not counted.
    wait_for_counter(&device, &client, "answered", 101)?;
    ensure!(counter(&device, &client, "answered") == 101);
    Ok(())
}

/// Requests are accepted, then the broker dies, then the answers are made.
fn broker_dies(mut broker: Broker, name: &str) -> Result<()> {
    let model = Tiny::make()?;
    let (mut device, client) = world(&broker, name, &model)?;
    device.restart(&broker)?;
    let worker = device.worker()?;
    process::signal("STOP", worker)?;
    for number in 0..20 {
        let id = format!("b{number}");
        client.ask(&id, device.request(&id, "Say something.", 8));
    }
    wait_for_counter(&device, &client, "accepted", 20)?;
    broker.kill()?;
    process::signal("CONT", worker)?;
    device.wait_for_line(PATIENCE, |line| line.contains("no connection to the broker"))?;
    broker.restart()?;
    settle(&device, &client)?;
    println!("{name}: {} came again", client.check_promise()?);
    // The client sent all of them again in its new connection; none was run again.
    wait_for_counter(&device, &client, "answered", 21)?;
    ensure!(counter(&device, &client, "answered") == 21);
    Ok(())
}

#[test]
fn a_broker_that_dies_and_forgets_costs_no_answer() -> Result<()> {
    broker_dies(Broker::forgetful()?, "forgetful")
}

#[test]
fn a_broker_that_dies_and_remembers_costs_no_answer() -> Result<()> {
    broker_dies(Broker::persistent()?, "persistent")
}

#[test]
fn a_request_that_comes_again_is_not_run_again_at_any_stage() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let (mut device, client) = world(&broker, "again", &model)?;
    device.restart(&broker)?;
    let worker = device.worker()?;
    let send_thrice = || {
        for number in 0..30 {
            let id = format!("a{}", number % 10);
            client.send(device.request(&id, "Say something.", 16));
        }
    };
    process::signal("STOP", worker)?;
    for number in 0..10 {
        let id = format!("a{number}");
        client.ask(&id, device.request(&id, "Say something.", 16));
    }
    // While it waits, and when it was answered.
    send_thrice();
    wait_for_counter(&device, &client, "duplicates", 30)?;
    process::signal("CONT", worker)?;
    client.wait_answered(PATIENCE)?;
    send_thrice();
    wait_for_counter(&device, &client, "duplicates", 60)?;
    settle(&device, &client)?;
    let again = client.check_promise()?;
    ensure!(again == 30, "each one after the answer gets it: {again}");
    wait_for_counter(&device, &client, "answered", 11)?;
    ensure!(counter(&device, &client, "answered") == 11);
    Ok(())
}

/// The broker's process stands still with all connections open. What is sent to it goes nowhere, and says nothing.
#[test]
fn a_half_open_link_is_noticed_and_costs_no_answer() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let options = Options {
        config: format!("{CONFIG}[broker]\nkeep_alive_s = 5\n"),
        ..Options::default()
    };
    let mut device = Device::new("half-open", &model.path(), options)?;
    let (answers, metrics) = (device.topic("res/#"), device.topic("metrics"));
    let client = Client::connect(broker.port(), "client", &[&answers, &metrics])?;
    device.restart(&broker)?;
    let worker = device.worker()?;
    process::signal("STOP", worker)?;
    for number in 0..40 {
        let id = format!("h{number}");
        client.ask(&id, device.request(&id, "Say something.", 64));
    }
    wait_for_counter(&device, &client, "accepted", 40)?;
    let stopped = std::time::Instant::now();
    broker.pause()?;
    process::signal("CONT", worker)?;
    // One and a half keep-alive intervals, and what a busy machine adds.
    device.wait_for_line(Duration::from_secs(20), |line| {
        line.contains("no connection to the broker")
    })?;
    println!(
        "a half-open link was noticed after {:.1} s",
        stopped.elapsed().as_secs_f64()
    );
    broker.resume()?;
    settle(&device, &client)?;
    println!("{} came again", client.check_promise()?);
    Ok(())
}

#[test]
fn a_torn_record_and_garbage_at_the_end_of_the_journal_cost_nothing_that_was_promised() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let (mut device, client) = world(&broker, "torn", &model)?;
    device.restart(&broker)?;
    process::signal("STOP", device.worker()?)?;
    for number in 0..10 {
        let id = format!("t{number}");
        client.ask(&id, device.request(&id, "Say something.", 8));
    }
    wait_for_counter(&device, &client, "accepted", 10)?;
    device.kill()?;
    let journal = device.state().join("journal");
    let whole = std::fs::read(&journal)?;
    let first = u32::from_le_bytes(whole[8..12].try_into()?) as usize;
    // Half of a record with a header that promises all of it; then what a block of another file might hold.
    let garbage: Vec<u8> = (0..70_000_u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for tail in [&whole[8..16 + first / 2], &garbage] {
        OpenOptions::new().append(true).open(&journal)?.write_all(tail)?;
        device.launch(&broker.url(), None)?;
        device.wait_for_line(PATIENCE, |line| {
            line.contains(&format!("journal: {} bytes at its end were torn", tail.len()))
        })?;
        device.kill()?;
    }
    device.launch(&broker.url(), None)?;
    settle(&device, &client)?;
    client.check_promise()?;
    Ok(())
}
