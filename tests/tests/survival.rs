//! Prompts outlive the processes that work on them: one answer for each id, whatever is killed meanwhile.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pipit_tests::broker::{Broker, Subscription};
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::{model, process, program};
use serde_json::Value;

/// Final answers by id, with how often each text came.
type Answers = BTreeMap<String, Vec<String>>;

/// Takes in answers until each id of `wanted` has one.
fn collect(subscription: &Subscription, answers: &mut Answers, wanted: &[&str]) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !wanted.iter().all(|id| answers.contains_key(*id)) {
        let message = subscription.next(deadline.saturating_duration_since(Instant::now()))?;
        let answer: Value = serde_json::from_str(&message.payload)?;
        if answer["object"] == "chat.completion.chunk" {
            continue;
        }
        ensure!(
            answer["error"].is_null(),
            "an error instead of an answer: {answer}"
        );
        let id = message.topic.rsplit('/').next().unwrap_or_default().to_owned();
        ensure!(
            answer["id"] == id,
            "the answer to {id} carries another id: {answer}"
        );
        let text = answer["choices"][0]["message"]["content"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        answers.entry(id).or_default().push(text);
    }
    Ok(())
}

/// A device that answers in the order of arrival.
fn one_at_a_time(broker: &Broker, name: &str) -> Result<Device> {
    let options = Options {
        config: "[model]\nslots = 1\n".to_owned(),
        ..Options::default()
    };
    let mut device = Device::new(name, &model::smollm2()?, options)?;
    device.restart(broker)?;
    Ok(device)
}

/// All answers there will ever be: one more request goes through the whole queue behind the others.
fn settle(
    device: &Device,
    broker: &Broker,
    subscription: &Subscription,
    answers: &mut Answers,
) -> Result<()> {
    device.send(broker, "last", "Say goodbye.", 4)?;
    collect(subscription, answers, &["last"])
}

fn gone(id: u32, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while Path::new(&format!("/proc/{id}")).exists() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

const IDS: [&str; 5] = ["p0", "p1", "p2", "p3", "p4"];

fn send_all(device: &Device, broker: &Broker) -> Result<()> {
    for id in IDS {
        device.send(
            broker,
            id,
            &format!("Tell me a short story about the number {}.", &id[1..]),
            48,
        )?;
    }
    Ok(())
}

#[test]
fn every_prompt_is_answered_once_though_the_worker_is_killed() -> Result<()> {
    let broker = Broker::forgetful()?;
    let device = one_at_a_time(&broker, "worker-dies")?;
    let subscription = broker.subscribe(&device.topic("res/#"))?;
    send_all(&device, &broker)?;

    let mut answers = Answers::new();
    collect(&subscription, &mut answers, &["p0"])?;
    let worker = device.worker()?;
    process::signal("KILL", worker)?;
    collect(&subscription, &mut answers, &IDS)?;
    assert_ne!(
        device.worker()?,
        worker,
        "the answers after the kill came from a new worker"
    );
    settle(&device, &broker, &subscription, &mut answers)?;

    for id in IDS {
        assert_eq!(
            answers[id].len(),
            1,
            "{id} is answered exactly once: {:?}",
            answers[id]
        );
        assert!(!answers[id][0].trim().is_empty(), "{id} has an answer");
    }
    Ok(())
}

#[test]
fn every_prompt_is_answered_though_the_daemon_is_killed() -> Result<()> {
    let broker = Broker::forgetful()?;
    let mut device = one_at_a_time(&broker, "daemon-dies")?;
    let subscription = broker.subscribe(&device.topic("res/#"))?;
    send_all(&device, &broker)?;

    let mut answers = Answers::new();
    collect(&subscription, &mut answers, &["p0"])?;
    let worker = device.worker()?;
    device.kill()?;
    assert!(
        gone(worker, Duration::from_secs(10)),
        "the worker ends when its daemon is gone"
    );
    device.restart(&broker)?;
    collect(&subscription, &mut answers, &IDS)?;
    settle(&device, &broker, &subscription, &mut answers)?;

    for id in IDS {
        // Killed between a delivery and its record, the daemon delivers the stored answer again: the same text.
        let texts = &answers[id];
        assert!(
            texts.len() <= 2 && texts.iter().all(|text| text == &texts[0]),
            "{id}: {texts:?}"
        );
        assert!(!texts[0].trim().is_empty(), "{id} has an answer");
    }
    let again = answers.values().filter(|texts| texts.len() > 1).count();
    assert!(
        again <= 1,
        "only what was under way at the kill may come again: {answers:?}"
    );
    Ok(())
}

#[test]
fn a_request_that_comes_again_gets_the_stored_answer() -> Result<()> {
    let broker = Broker::forgetful()?;
    let mut device = one_at_a_time(&broker, "redelivery")?;
    let subscription = broker.subscribe(&device.topic("res/#"))?;
    device.send(&broker, "same", "Name a colour.", 8)?;
    let first = subscription.next(PATIENCE)?;
    device.kill()?;
    device.restart(&broker)?;
    device.send(&broker, "same", "Name a colour.", 8)?;
    let second = subscription.next(PATIENCE)?;
    // The same bytes, the time of making included: it was not made anew.
    assert_eq!(first, second);
    Ok(())
}

#[test]
fn a_request_sent_while_the_device_is_down_waits_for_it() -> Result<()> {
    let broker = Broker::persistent()?;
    let mut device = one_at_a_time(&broker, "away")?;
    let subscription = broker.subscribe(&device.topic("res/#"))?;
    let stopped = device.stop()?;
    assert_eq!(
        stopped.code,
        Some(0),
        "SIGTERM ends it in good order: {}",
        stopped.stderr
    );
    device.send(&broker, "while-away", "Name a colour.", 8)?;
    device.restart(&broker)?;
    let mut answers = Answers::new();
    collect(&subscription, &mut answers, &["while-away"])?;
    Ok(())
}

#[test]
fn a_prompt_that_no_device_hears_is_sent_again() -> Result<()> {
    let broker = Broker::forgetful()?;
    let model = model::Tiny::make()?;
    let mut device = Device::new("late", &model.path(), Options::default())?;
    let observer = broker.subscribe(&device.topic("res/#"))?;
    let url = broker.url();
    let ask = [
        "ask",
        "Name a colour.",
        "--broker",
        &url,
        "--device",
        "late",
        "--max-tokens",
        "4",
    ];
    let asking = program::start("pipit", ask)?;
    asking.wait_for_line(PATIENCE, |line| line.contains("no device listens"))?;
    device.restart(&broker)?;
    asking.finish(PATIENCE)?.success()?;
    observer.next(PATIENCE)?;
    Ok(())
}
