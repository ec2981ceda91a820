//! A pool behind one mosquitto: its members share the requests in proportion to their speed, and none is lost or answered
//! twice when a member is killed, told to leave, or broken from the start.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::{Client, Outgoing, Seen};
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::process;
use serde_json::{Value, json};

const ANSWERS: &str = "pipit/v1/pool/p/res/#";
/// Requests by which the speed of a member is measured, before the pool's and after them.
const OWN: usize = 120;
/// Tokens of an answer that takes far longer than its way through the pool: those of the random model take 0.2 ms each.
const LONG: u32 = 384;
/// Requests that a member takes at most before one is answered: two slots and two ahead.
const PLACES: usize = 4;

fn options(more: &str) -> Options {
    Options {
        config: format!(
            "grace_s = 60\n[model]\nthreads = 1\nslots = 2\n[pool]\nname = \"p\"\nhold = 4\n\
             [metrics]\ninterval_s = 1\n[admin]\nover_mqtt = true\n{more}"
        ),
        ..Options::default()
    }
}

fn members(broker: &Broker, model: &Tiny, names: &[&str]) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for name in names {
        let mut device = Device::new(name, &model.path(), options(""))?;
        device.restart(broker)?;
        devices.push(device);
    }
    Ok(devices)
}

/// Sampled without a seed: two runs of one request differ.
fn ask(client: &Client, numbers: std::ops::Range<usize>, max_tokens: u32) {
    for number in numbers {
        let id = format!("r{number}");
        let body = json!({
            "id": id, "messages": [{"role": "user", "content": format!("This is {id}.")}],
            "max_tokens": max_tokens, "temperature": 1,
        });
        client.ask(&id, to_pool("req", &body));
    }
}

fn to_pool(leaf: &str, body: &Value) -> Outgoing {
    Outgoing {
        topic: format!("pipit/v1/pool/p/{leaf}"),
        payload: body.to_string().into_bytes(),
        ..Outgoing::default()
    }
}

/// How many requests each member has answered.
fn shares(seen: &Seen) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for answer in seen.answers.values().map(|all| &all[0]) {
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
        let device = answer["device"].as_str().unwrap_or("nobody").to_owned();
        *shares.entry(device).or_default() += 1;
    }
    shares
}

/// How many more each has answered than `before`.
fn more(seen: &Seen, before: &BTreeMap<String, usize>) -> BTreeMap<String, usize> {
    let mut shares = shares(seen);
    for (device, count) in &mut shares {
        *count -= before.get(device).copied().unwrap_or(0);
    }
    shares
}

/// Lets a worker run for a part of the time only, until `done`: a slow board.
fn slow_down(worker: u32, part: f64, done: &AtomicBool) {
    const PERIOD: Duration = Duration::from_millis(200);
    while !done.load(Ordering::Relaxed) {
        let _ = process::signal("CONT", worker);
        std::thread::sleep(PERIOD.mul_f64(part));
        let _ = process::signal("STOP", worker);
        std::thread::sleep(PERIOD.mul_f64(1.0 - part));
    }
    let _ = process::signal("CONT", worker);
}

/// How many requests of its own each member has answered when the first has answered all.
fn speeds(client: &Client, devices: &[Device], when: &str) -> Result<BTreeMap<String, usize>> {
    let before = client.see(shares);
    for number in 0..OWN {
        for device in devices {
            let id = format!("{}-{when}-{number}", device.topic("own").replace('/', "."));
            client.ask(&id, device.request(&id, "How fast?", LONG));
        }
    }
    let mut speeds = BTreeMap::new();
    client.wait(PATIENCE, "the first to be done", |seen| {
        speeds = more(seen, &before);
        speeds.values().any(|&count| count == OWN)
    })?;
    client.wait_answered(PATIENCE)?;
    Ok(speeds)
}

/// How many requests each member has answered, and when it was last seen to have answered one more.
type Shares = BTreeMap<String, (usize, Duration)>;

/// How a thousand requests to the pool were shared, and when all were answered.
fn thousand(client: &Client) -> Result<(Duration, Shares)> {
    let before = client.see(shares);
    let started = Instant::now();
    ask(client, 0..1000, LONG);
    let mut last = Shares::new();
    client.wait(PATIENCE, "a thousand answers", |seen| {
        for (device, count) in more(seen, &before) {
            let entry = last.entry(device).or_default();
            if count > entry.0 {
                *entry = (count, started.elapsed());
            }
        }
        seen.unanswered().is_empty()
    })?;
    Ok((started.elapsed(), last))
}

#[test]
fn members_share_a_thousand_prompts_in_proportion_to_their_speed() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let devices = members(&broker, &model, &["fast", "half", "quarter"])?;
    let client = Client::connect(broker.port(), "client", &[ANSWERS, "pipit/v1/+/res/#"])?;
    let done = AtomicBool::new(false);
    let (speeds, took, last) = std::thread::scope(|scope| {
        for (device, part) in devices.iter().zip([1.0, 0.5, 0.25]) {
            let (worker, done) = (device.worker()?, &done);
            if part < 1.0 {
                scope.spawn(move || slow_down(worker, part, done));
            }
        }
        let result = speeds(&client, &devices, "before").and_then(|before| {
            let (took, last) = thousand(&client)?;
            // The machine may have become another one meanwhile.
            let mut speeds = speeds(&client, &devices, "after")?;
            for (device, count) in before {
                *speeds.entry(device).or_default() += count;
            }
            Ok((speeds, took, last))
        });
        done.store(true, Ordering::Relaxed);
        result
    })?;
    println!("1000 answers in {:.1} s", took.as_secs_f64());
    let all: usize = speeds.values().sum();
    for (device, (count, at)) in &last {
        let due = 1000.0 * speeds[device] as f64 / all as f64;
        println!(
            "{device}: {count}, by its speed {due:.0}, the last one after {:.1} s",
            at.as_secs_f64()
        );
    }
    ensure!(client.check_promise()? == 0, "no answer comes twice");
    ensure!(last.len() == 3, "{last:?}");
    // Nobody had nothing to do while others had: that is what in proportion to their speed means, also where the speeds
    // change with what else the machine has to do, as those above may have.
    for (device, (_, at)) in &last {
        ensure!(
            at.as_secs_f64() > 0.9 * took.as_secs_f64(),
            "{device} was idle at the end: {last:?} of {took:?}"
        );
    }
    let count = |name: &str| last[name].0;
    ensure!(
        count("fast") > count("half") && count("half") > count("quarter"),
        "{last:?}"
    );
    Ok(())
}

#[test]
fn a_member_that_is_killed_costs_no_answer_and_none_comes_twice() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let mut devices = members(&broker, &model, &["a", "b", "c"])?;
    let client = Client::connect(broker.port(), "client", &[ANSWERS, "pipit/v1/pool/p/member/+"])?;
    ask(&client, 0..1000, 16);
    client.wait(PATIENCE, "the first answers", |seen| seen.answers.len() > 100)?;
    devices[1].kill()?;
    let before = client.see(|seen| seen.answers.len());
    // The others answer what b has not taken, and what the broker holds for it: all but what is in its journal.
    let killed = Instant::now();
    client.wait(PATIENCE, "the answers of the others", |seen| {
        seen.unanswered().len() <= PLACES
            && seen
                .last
                .get("pipit/v1/pool/p/member/b")
                .is_some_and(Vec::is_empty)
    })?;
    let open = client.see(|seen| seen.unanswered().len());
    println!(
        "killed after {before} answers; {:.1} s later {open} were open, which b had taken",
        killed.elapsed().as_secs_f64()
    );
    devices[1].launch(&broker.url(), None)?;
    client.wait_answered(PATIENCE)?;
    let again = client.check_promise()?;
    println!(
        "{:?}; {again} that b had published came again",
        client.see(shares)
    );
    ensure!(client.see(|seen| seen.answers.len()) == 1000);
    // It is in again.
    ask(&client, 1000..1100, 16);
    client.wait_answered(PATIENCE)?;
    client.check_promise()?;
    let after = client.see(|seen| {
        let new = seen.answers.iter().filter(|(id, _)| id.len() == 5);
        new.filter(|(_, all)| String::from_utf8_lossy(&all[0].payload).contains("\"device\":\"b\""))
            .count()
    });
    ensure!(after > 0, "b has answered none of the last 100");
    Ok(())
}

#[test]
fn a_member_that_is_stopped_or_told_to_leave_gives_back_what_it_has_not_begun() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let mut devices = members(&broker, &model, &["a", "b", "c"])?;
    let filters = [ANSWERS, "reply/admin", "pipit/v1/pool/p/member/+"];
    let client = Client::connect(broker.port(), "client", &filters)?;
    ask(&client, 0..400, 16);
    client.wait(PATIENCE, "the first answers", |seen| seen.answers.len() > 50)?;
    let ended = devices[2].stop()?;
    ensure!(ended.code == Some(0), "{ended:?}");
    println!("c: {}", last_line(&ended.stderr, "out of the pool")?);
    client.wait_answered(PATIENCE)?;

    let drain = |join: bool, id: &str| -> Result<Value> {
        client.ask(
            id,
            Outgoing {
                topic: devices[1].topic("cmd/drain"),
                payload: json!({"id": id, "reply_to": "reply/admin", "join": join})
                    .to_string()
                    .into_bytes(),
                ..Outgoing::default()
            },
        );
        client.wait(PATIENCE, "an answer to the command", |seen| {
            seen.answers.contains_key(id)
        })?;
        client.see(|seen| Ok(serde_json::from_slice(&seen.answers[id][0].payload)?))
    };
    ask(&client, 400..800, 16);
    client.wait(PATIENCE, "some answers", |seen| seen.answers.len() > 450)?;
    let left = drain(false, "leave")?;
    println!("{left}");
    ensure!(left["result"]["in_pool"] == false, "{left}");
    let of_b = client.see(|seen| shares(seen)["b"]);
    client.wait_answered(PATIENCE)?;
    ensure!(
        client.see(|seen| shares(seen)["b"]) == of_b,
        "b has taken more after it left"
    );
    ensure!(drain(true, "join")?["result"]["in_pool"] == true);
    client.wait(PATIENCE, "b is in again", |seen| {
        seen.json("pipit/v1/pool/p/member/b")["state"] == "in"
    })?;
    ask(&client, 800..900, 16);
    client.wait_answered(PATIENCE)?;
    ensure!(client.see(|seen| shares(seen)["b"]) > of_b);
    ensure!(client.check_promise()? == 0, "no answer comes twice");
    Ok(())
}

#[test]
fn a_member_without_a_model_takes_nothing() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let mut no_room = options("");
    no_room.config = no_room.config.replace("slots = 2", "slots = 2\nmemory_bytes = 1");
    let mut broken = Device::new("broken", &model.path(), no_room)?;
    broken.launch(&broker.url(), None)?;
    let status = broker.subscribe(&broken.topic("status"))?;
    status.wait_for(PATIENCE, |message| message.payload.contains("degraded"))?;
    let _sound = members(&broker, &model, &["sound"])?;
    let asked = pipit_tests::program::run(
        "pipit",
        ["ask", "Hello", "--broker", &broker.url(), "--pool", "p", "--json"],
        PATIENCE,
    )?;
    let answer: Value = serde_json::from_str(&asked.success()?)?;
    ensure!(answer["device"] == "sound", "{answer}");
    let client = Client::connect(broker.port(), "client", &[ANSWERS])?;
    ask(&client, 0..200, 8);
    client.wait_answered(PATIENCE)?;
    ensure!(client.check_promise()? == 0);
    let shares = client.see(shares);
    ensure!(
        shares == BTreeMap::from([("sound".to_owned(), 200)]),
        "{shares:?}"
    );
    Ok(())
}

#[test]
fn what_a_member_holds_can_be_cancelled_and_expires() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let devices = members(&broker, &model, &["solo"])?;
    let filters = [ANSWERS, "pipit/v1/pool/p/member/+"];
    let client = Client::connect(broker.port(), "client", &filters)?;
    process::signal("STOP", devices[0].worker()?)?;
    ask(&client, 0..PLACES + 2, 8);
    let body = json!({"id": "late", "messages": [{"role": "user", "content": "Hello"}], "deadline_ms": 300});
    client.ask("late", to_pool("req", &body));
    client.wait(PATIENCE, "what it does not take", |seen| {
        seen.json("pipit/v1/pool/p/member/solo")["held"] == 3 || seen.answers.contains_key("late")
    })?;
    let held = format!("r{}", PLACES + 1);
    client.send(to_pool("cancel", &json!({"id": held})));
    for (id, code) in [("late", "expired"), (held.as_str(), "cancelled")] {
        client.wait(PATIENCE, code, |seen| seen.answers.contains_key(id))?;
        let error = client.see(|seen| seen.answers[id][0].error.clone());
        ensure!(error.as_deref() == Some(code), "{id}: {error:?}");
    }
    process::signal("CONT", devices[0].worker()?)?;
    client.wait_answered(PATIENCE)?;
    ensure!(client.check_promise()? == 0);
    Ok(())
}

fn last_line<'a>(text: &'a str, with: &str) -> Result<&'a str> {
    text.lines()
        .rfind(|line| line.contains(with))
        .with_context(|| format!("no line with `{with}`: {text}"))
}
