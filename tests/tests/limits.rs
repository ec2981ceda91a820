//! Limits of the engine's time: who asks for too much of it gets an error, and everybody else an answer.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::smollm2;
use serde_json::Value;

#[test]
fn work_that_takes_too_long_is_ended_and_the_next_is_answered() -> Result<()> {
    let broker = Broker::forgetful()?;
    let options = Options {
        // One at a time: the second one waits for the end of the first.
        config: "[model]\nthreads = 1\nslots = 1\n[limits]\nseconds = 2\nmax_tokens = 1900\n".to_owned(),
        ..Options::default()
    };
    let mut device = Device::new("patient", &smollm2()?, options)?;
    device.restart(&broker)?;
    let answers = broker.subscribe(&device.topic("res/#"))?;
    let next = || -> Result<(String, Value)> {
        let message = answers.next(PATIENCE)?;
        let id = message.topic.rsplit('/').next().context("no id")?.to_owned();
        Ok((id, serde_json::from_str(&message.payload)?))
    };
    let began = Instant::now();
    device.send(&broker, "long", "Write a very long story about a wagtail.", 1900)?;
    device.send(&broker, "short", "Say hello.", 4)?;
    let (id, ended) = next()?;
    ensure!(
        id == "long" && ended["error"]["code"] == "expired",
        "{id}: {ended}"
    );
    ensure!(
        ended["error"]["message"] == "the work took longer than 2 s" && began.elapsed().as_secs() >= 2,
        "{ended} after {:?}",
        began.elapsed()
    );
    let (id, answer) = next()?;
    ensure!(
        id == "short" && answer["usage"]["completion_tokens"] == 4,
        "{id}: {answer}"
    );
    Ok(())
}
