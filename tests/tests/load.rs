//! More than the device can do: every request is answered or told so, memory stays bounded, nobody starves.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pipit_tests::broker::{Broker, free_port};
use pipit_tests::client::{Client, Outgoing};
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::process;
use serde_json::{Value, json};

const MIB: u64 = 1024 * 1024;

fn options(more: &str) -> Options {
    Options {
        config: format!("[model]\nthreads = 1\n[metrics]\ninterval_s = 1\n{more}"),
        ..Options::default()
    }
}

fn request(device: &Device, id: &str, reply: &str, max_tokens: u32) -> Outgoing {
    let body = json!({
        "id": id, "messages": [{"role": "user", "content": format!("This is {id}.")}],
        "max_tokens": max_tokens, "reply_to": reply,
    });
    Outgoing {
        topic: device.topic("req"),
        payload: body.to_string().into_bytes(),
        ..Outgoing::default()
    }
}

/// Runs `work` and looks at the resident memory of a process meanwhile; returns the least and the most of it.
fn while_watching(id: u32, work: impl FnOnce() -> Result<()>) -> Result<(u64, u64)> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let (mut least, mut most) = (u64::MAX, 0);
            while !done.load(Ordering::Relaxed) {
                if let Ok((now, _)) = process::resident(id) {
                    (least, most) = (least.min(now), most.max(now));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            (least, most)
        });
        let worked = work();
        done.store(true, Ordering::Relaxed);
        worked?;
        watcher
            .join()
            .map_err(|_| anyhow::anyhow!("the watcher panicked"))
    })
}

#[test]
fn ten_thousand_prompts_from_a_hundred_clients_are_answered_or_told_queue_full() -> Result<()> {
    const CLIENTS: usize = 100;
    const EACH: usize = 100;
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let mut device = Device::new("burst", &model.path(), options(""))?;
    device.restart(&broker)?;
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let topic = format!("reply/c{number}");
        clients.push(Client::connect(broker.port(), &format!("c{number}"), &[&topic])?);
    }
    let started = Instant::now();
    let (least, most) = while_watching(device.id()?, || {
        for at in 0..EACH {
            for (number, client) in clients.iter().enumerate() {
                let id = format!("c{number}-{at}");
                client.ask(&id, request(&device, &id, &format!("reply/c{number}"), 4));
            }
        }
        clients
            .iter()
            .try_for_each(|client| client.wait_answered(PATIENCE))
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let (mut answered, mut full) = (0, 0);
    for client in &clients {
        client.check_promise()?;
        client.see(|seen| {
            for answer in seen.answers.values().map(|all| &all[0]) {
                match answer.error.as_deref() {
                    None => answered += 1,
                    Some("queue_full") => full += 1,
                    Some(other) => anyhow::bail!("{}: {other}", answer.id),
                }
            }
            Ok(())
        })?;
    }
    println!(
        "{answered} answered and {full} told queue_full in {seconds:.1} s; the daemon's memory grew from {} to {} KiB",
        least / 1024,
        most / 1024
    );
    ensure!(answered + full == CLIENTS * EACH, "{answered} + {full}");
    // What the queue holds (1024 by default) was answered, and then some.
    ensure!(answered >= 1024, "{answered} answered");
    // The journal's table is bounded by 16 MiB; the rest is buffers.
    ensure!(most - least < 32 * MIB, "grew by {} KiB", (most - least) / 1024);
    Ok(())
}

/// One client fills the queue before the others come. While they wait, none of them may get less than half of what
/// the clients get on average, but for one request that is under way.
#[test]
fn a_greedy_client_does_not_starve_the_others() -> Result<()> {
    const OTHERS: usize = 50;
    const EACH: usize = 6;
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let mut device = Device::new("fair", &model.path(), options(""))?;
    let metrics = device.topic("metrics");
    let observer = Client::connect(broker.port(), "observer", &["reply/#", &metrics])?;
    device.restart(&broker)?;
    let worker = device.worker()?;
    process::signal("STOP", worker)?;
    let accepted = |least: usize| {
        observer.wait(PATIENCE, "accepted requests", |seen| {
            seen.json(&metrics)["accepted"].as_u64() == Some(least as u64)
        })
    };
    // Fewer than one client may have waiting ([limits] client_queue).
    let greedy = 240;
    for at in 0..greedy {
        let id = format!("greedy-{at}");
        observer.ask(&id, request(&device, &id, "reply/greedy", 4));
    }
    accepted(greedy)?;
    for at in 0..EACH {
        for number in 0..OTHERS {
            let id = format!("c{number}-{at}");
            observer.ask(&id, request(&device, &id, &format!("reply/c{number}"), 4));
        }
    }
    accepted(greedy + OTHERS * EACH)?;
    process::signal("CONT", worker)?;
    observer.wait_answered(PATIENCE)?;
    observer.check_promise()?;

    let order = observer.see(|seen| seen.order.clone());
    let client_of = |id: &str| id.split('-').next().unwrap_or_default().to_owned();
    let mut asked: BTreeMap<String, usize> = BTreeMap::new();
    order
        .iter()
        .for_each(|id| *asked.entry(client_of(id)).or_default() += 1);
    let mut served: BTreeMap<String, usize> = asked.keys().map(|client| (client.clone(), 0)).collect();
    let (mut worst, mut last_other) = (1.0_f64, 0);
    for (at, id) in order.iter().enumerate() {
        *served.entry(client_of(id)).or_default() += 1;
        let mean = (at + 1) as f64 / asked.len() as f64;
        for (client, &count) in served.iter().filter(|(client, count)| asked[*client] > **count) {
            worst = worst.min((count as f64 + 1.0) / (mean / 2.0).max(1.0));
            ensure!(
                count as f64 + 1.0 >= mean / 2.0,
                "after {} answers {client} has {count}, the mean is {mean:.1}",
                at + 1
            );
        }
        if !id.starts_with("greedy") {
            last_other = at + 1;
        }
    }
    println!(
        "the others had all their {} answers among the first {last_other}; worst share {worst:.2}",
        OTHERS * EACH
    );
    Ok(())
}

/// Answers to a client whose connection takes nothing any more: 30 MB, far more than the sockets hold. The daemon's memory
/// must not grow with them.
fn deaf(port: u16, device: &Device, id: u32) -> Result<()> {
    const AGAIN: usize = 10_000;
    let status = device.topic("status");
    let client = Client::connect(port, "client", &["reply/good/#", &status])?;
    client.wait(PATIENCE, "a device that is ready", |seen| {
        seen.json(&status)["state"] == "ready"
    })?;
    let deaf = Client::deaf(port, "deaf", &["reply/deaf"])?;
    let mut long = request(device, "long", "reply/deaf", 512);
    let mut body: Value = serde_json::from_slice(&long.payload)?;
    body["temperature"] = Value::from(1);
    body["stream"] = Value::from(true);
    long.payload = body.to_string().into_bytes();
    let (least, most) = while_watching(id, || {
        for at in 0..AGAIN {
            // A request that comes again gets the stored answer: an answer costs nothing here but its way out.
            client.send(long.clone());
            if at % 500 == 0 {
                let id = format!("g{at}");
                client.ask(&id, request(device, &id, "reply/good/one", 4));
            }
        }
        client.wait_answered(PATIENCE)
    })?;
    client.check_promise()?;
    ensure!(
        deaf.see(|seen| seen.order.len()) < AGAIN,
        "it was to hear nothing"
    );
    println!("the daemon's memory: {} to {} KiB", least / 1024, most / 1024);
    ensure!(most - least < 32 * MIB, "grew by {} KiB", (most - least) / 1024);
    Ok(())
}

#[test]
fn a_subscriber_that_does_not_read_holds_nothing_up() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let mut device = Device::new("deaf", &model.path(), options(""))?;
    device.restart(&broker)?;
    deaf(broker.port(), &device, device.id()?)
}

#[test]
fn a_subscriber_that_does_not_read_holds_nothing_up_in_the_embedded_broker() -> Result<()> {
    let model = Tiny::make()?;
    let mut device = Device::new("deaf", &model.path(), options(""))?;
    let port = free_port()?;
    device.launch(&format!("embedded://127.0.0.1:{port}"), None)?;
    deaf(port, &device, device.id()?)
}
