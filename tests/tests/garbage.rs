//! Garbage of every kind on every topic that the device listens to: it is refused or dropped, memory stays flat, and
//! a good request is answered as before.

use std::time::Instant;

use anyhow::{Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::{Client, Outgoing};
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::process;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

const FLOOD: usize = 10_000;
const PORTION: usize = 1_000;
const PORTIONS: usize = 20;

fn bytes(random: &mut ChaCha8Rng, most: u64) -> Vec<u8> {
    let length = random.next_u64() % most;
    // Never text: a prompt is no garbage.
    let mut bytes: Vec<u8> = (0..length).map(|_| random.next_u64() as u8).collect();
    bytes.push(0xff);
    bytes
}

/// The `kind`-th kind of garbage. None of it is a request that could be answered.
fn garbage(device: &Device, kind: usize, random: &mut ChaCha8Rng) -> Outgoing {
    let topic = device.topic("req");
    let cancel = device.topic("cancel");
    let text = |text: &str| text.as_bytes().to_vec();
    let message = |topic: &str, payload: Vec<u8>| Outgoing {
        topic: topic.to_owned(),
        payload,
        at_most_once: kind.is_multiple_of(2),
        ..Outgoing::default()
    };
    let number = random.next_u64();
    match kind % 20 {
        0 => message(&topic, bytes(random, 200)),
        1 => message(&cancel, bytes(random, 200)),
        2 => message(&topic, Vec::new()),
        3 => message(&cancel, Vec::new()),
        // An emoji without its last byte, and JSON that ends in the middle.
        4 => message(&topic, [&b"a prompt "[..], &[0xf0, 0x9f, 0x98]].concat()),
        5 => message(&topic, text(r#"{"id":"x","messages":[{"role":"user","content":"#)),
        6 => message(&topic, text(&"[{\"a\":".repeat(2000))),
        7 => message(
            &topic,
            text(&format!(
                "{{\"messages\":{}1{}}}",
                "[".repeat(500),
                "]".repeat(500)
            )),
        ),
        8 => Outgoing {
            content_type: Some("application/json".to_owned()),
            ..message(&topic, text("this is no JSON"))
        },
        9 => Outgoing {
            content_type: Some("text/plain".to_owned()),
            ..message(&topic, bytes(random, 50))
        },
        // Where an answer must never go.
        10 => message(
            &topic,
            text(&format!(
                r#"{{"id":"g{number}","reply_to":"reply/+/x","messages":[]}}"#
            )),
        ),
        11 => message(
            &topic,
            text(r##"{"reply_to":"#","messages":[{"role":"user","content":"x"}]}"##),
        ),
        12 => Outgoing {
            response_topic: Some("$SYS/broker/uptime".to_owned()),
            ..message(&topic, text("a prompt"))
        },
        13 => Outgoing {
            response_topic: Some(device.topic("req")),
            ..message(&topic, text("an answer to myself"))
        },
        // As long as MQTT allows.
        14 => Outgoing {
            response_topic: Some("reply/".repeat(5000)),
            ..message(&topic, text("a prompt"))
        },
        15 => Outgoing {
            correlation: Some([vec![0; 1024], bytes(random, 3000)].concat()),
            ..message(&topic, text("a prompt"))
        },
        16 => message(&cancel, text(&format!("{{\"id\":\"unknown-{number}\"}}"))),
        17 => message(
            &topic,
            text(&format!(
                r#"{{"id":"g{number}","messages":[{{"role":"nobody"}}],"x":1}}"#
            )),
        ),
        18 => message(
            &topic,
            text(&format!(
                r#"{{"id":"{}","messages":[],"seed":1e999}}"#,
                "x".repeat(500)
            )),
        ),
        // Larger than a request may be, and larger than the device lets the broker send.
        _ => message(
            &topic,
            vec![
                b'x';
                if number.is_multiple_of(8) {
                    800_000
                } else {
                    270_000
                }
            ],
        ),
    }
}

#[test]
fn garbage_on_every_topic_leaves_the_device_as_it_was() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let options = Options {
        config: "[model]\nthreads = 1\n[metrics]\ninterval_s = 1\n".to_owned(),
        ..Options::default()
    };
    let mut device = Device::new("garbage", &model.path(), options)?;
    let (answers, metrics) = (device.topic("res/good"), device.topic("metrics"));
    let client = Client::connect(broker.port(), "client", &[&answers, &metrics, "reply/#"])?;
    device.restart(&broker)?;
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let started = Instant::now();
    let mut resident = Vec::new();
    // First one flood that the broker has to hold back, then as much again and more in portions.
    let portions: Vec<usize> = std::iter::once(FLOOD).chain([PORTION; PORTIONS]).collect();
    for (number, &messages) in portions.iter().enumerate() {
        for at in 0..messages {
            // The large ones are dear: one in a hundred.
            let kind = if at % 100 == 0 { 19 } else { at % 19 };
            client.send(Outgoing {
                retain: at % 50 == 7,
                ..garbage(&device, kind, &mut random)
            });
        }
        // Behind all of it: the broker keeps the order of one publisher.
        let id = format!("good{number}");
        let good = Outgoing {
            response_topic: Some(format!("reply/{id}")),
            ..device.request(&id, "A good request.", 8)
        };
        client.ask(&id, good);
        client.wait_answered(PATIENCE)?;
        ensure!(
            client.see(|seen| seen.answers[&id][0].error.is_none()),
            "{id} is answered"
        );
        resident.push(process::resident(device.id()?)?.0 / 1024);
    }
    let all: usize = portions.iter().sum();
    let errors = |least: u64| {
        client.wait(PATIENCE, "refusals", |seen| {
            seen.json(&metrics)["errors"]
                .as_u64()
                .is_some_and(|count| count >= least)
        })
    };
    // Three kinds of twenty are cancels, some are dropped by the broker: the others are refused.
    errors(all as u64 / 2)?;
    println!(
        "{all} messages in {:.1} s; the daemon's memory after the flood, and after each portion: {resident:?} KiB",
        started.elapsed().as_secs_f64()
    );
    // Until then the allocator finds its size.
    let grown = resident[PORTIONS].saturating_sub(resident[PORTIONS / 3]);
    ensure!(
        grown < 2048,
        "the daemon's memory grew by {grown} KiB after the flood and a third of the portions"
    );
    Ok(())
}
