//! What people wrote: nothing of it is in the log, transcripts are only kept where that was said, and an erasure leaves
//! nothing of one client anywhere in the state folder.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::{Client, Outgoing};
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::process;
use serde_json::{Value, json};

const CONFIG: &str = "[model]\nthreads = 1\nn_ctx = 1024\nslots = 2\n[admin]\nover_mqtt = true\n\
                      [prefix]\ndisk_tokens = 8\n[metrics]\ninterval_s = 1\n";
/// A word that stands nowhere but in prompts.
const SECRET: &str = "xylophonistically";

fn device(name: &str, broker: &Broker, model: &Tiny, more: &str) -> Result<(Device, Client)> {
    let options = Options {
        config: format!("{CONFIG}{more}"),
        ..Options::default()
    };
    let mut device = Device::new(name, &model.path(), options)?;
    device.restart(broker)?;
    let filters = [
        device.topic("res/#"),
        device.topic("metrics"),
        "reply/#".to_owned(),
    ];
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    let client = Client::connect(broker.port(), &format!("of-{name}"), &filters)?;
    Ok((device, client))
}

/// A request of `who` with a prompt of its own words.
fn ask(device: &Device, client: &Client, who: &str, id: &str, words: &str) {
    let body = json!({"id": id, "messages": [{"role": "user", "content": words}], "max_tokens": 4});
    let message = Outgoing {
        topic: device.topic("req"),
        payload: body.to_string().into_bytes(),
        response_topic: Some(format!("reply/{who}/{id}")),
        ..Outgoing::default()
    };
    client.ask(id, message);
}

fn command(device: &Device, client: &Client, id: &str, body: &Value) -> Result<Value> {
    let mut body = body.clone();
    body["id"] = id.into();
    let message = Outgoing {
        topic: device.topic("cmd/erase"),
        payload: body.to_string().into_bytes(),
        ..Outgoing::default()
    };
    client.ask(id, message);
    client.wait_answered(PATIENCE)?;
    client.see(|seen| Ok(serde_json::from_slice(&seen.answers[id][0].payload)?))
}

/// Files below a folder that hold the word.
fn holding(folder: &Path, word: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(holding(&path, word)?);
        } else if std::fs::read(&path)?
            .windows(word.len())
            .any(|part| part == word.as_bytes())
        {
            found.push(path.display().to_string());
        }
    }
    Ok(found)
}

#[test]
fn an_erasure_leaves_nothing_of_one_client_and_everything_of_the_others() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let (mut device, client) = device("erases", &broker, &model, "[content]\nhours = 2\n")?;
    let story =
        format!("{SECRET} is the word that begins this story about a house on a hill with many windows.");
    for number in 0..4 {
        ask(
            &device,
            &client,
            "kitchen",
            &format!("k{number}"),
            &format!("{story} {number}"),
        );
        ask(
            &device,
            &client,
            "hall",
            &format!("h{number}"),
            &format!("Something else, hallmarked {number}."),
        );
    }
    client.wait_answered(PATIENCE)?;
    ensure!(
        !holding(&device.state(), SECRET)?.is_empty(),
        "journal and transcript hold it before"
    );
    // Two that are not answered yet go, too.
    process::signal("STOP", device.worker()?)?;
    let worker = device.worker()?;
    for number in 4..6 {
        let id = format!("k{number}");
        let body = json!({"id": id, "messages": [{"role": "user", "content": story}], "max_tokens": 4});
        client.send(Outgoing {
            topic: device.topic("req"),
            payload: body.to_string().into_bytes(),
            response_topic: Some(format!("reply/kitchen/{id}")),
            ..Outgoing::default()
        });
    }
    let metrics = device.topic("metrics");
    client.wait(PATIENCE, "accepted requests", |seen| {
        seen.json(&metrics)["accepted"].as_u64() == Some(10)
    })?;
    process::signal("CONT", worker)?;
    // A request that a clumsy client left at the broker.
    broker.publish(&device.topic("req"), "Words that were retained.", &["-r"])?;
    let report = command(&device, &client, "erase", &json!({"client": "reply/kitchen"}))?;
    println!("{report}");
    let result = &report["result"];
    ensure!(result["entries"] == 6 && result["problems"].is_null(), "{report}");
    ensure!(result["retained_topics"] == 1, "{report}");
    let kept = broker.subscribe(&device.topic("req"))?;
    broker.publish(&device.topic("req"), "Not retained.", &[])?;
    assert_eq!(kept.next(PATIENCE)?.payload, "Not retained.");
    let left = holding(&device.state(), SECRET)?;
    ensure!(left.is_empty(), "{left:?}");
    ensure!(
        !holding(&device.state(), "hallmarked")?.is_empty(),
        "the others' is still there"
    );

    // The others' answers are still known, the erased ones are asked anew; also after a restart.
    for round in 0..2 {
        let before = client.see(|seen| seen.answers["h0"].len());
        let again = json!({"id": "h0", "messages": [{"role": "user", "content": "Something else, hallmarked 0."}], "max_tokens": 4});
        client.send(Outgoing {
            topic: device.topic("req"),
            payload: again.to_string().into_bytes(),
            response_topic: Some("reply/hall/h0".to_owned()),
            ..Outgoing::default()
        });
        client.wait(PATIENCE, "the stored answer", |seen| {
            seen.answers["h0"].len() > before
        })?;
        let same = client.see(|seen| {
            seen.answers["h0"]
                .iter()
                .all(|answer| answer.payload == seen.answers["h0"][0].payload)
        });
        ensure!(same, "round {round}: another answer");
        device.stop()?;
        device.restart(&broker)?;
    }
    let one = command(&device, &client, "one", &json!({"request": "h1"}))?;
    ensure!(one["result"]["entries"] == 1, "{one}");
    let none = command(&device, &client, "none", &json!({"request": "nobody-asked"}))?;
    ensure!(none["result"]["entries"] == 0, "{none}");
    for (at, wrong) in [
        json!({}),
        json!({"client": "a", "request": "b"}),
        json!({"everything": true}),
    ]
    .iter()
    .enumerate()
    {
        let refused = command(&device, &client, &format!("wrong{at}"), wrong)?;
        ensure!(refused["error"]["code"] == "invalid_request", "{refused}");
    }
    Ok(())
}

#[test]
fn no_word_of_a_prompt_or_an_answer_is_in_the_log_and_no_transcript_is_kept_unasked() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let (mut device, client) = device("quiet", &broker, &model, "")?;
    // Of an earlier configuration.
    let old = device.state().join("content");
    std::fs::create_dir_all(&old)?;
    std::fs::write(old.join("400000.jsonl"), SECRET)?;
    for number in 0..3 {
        ask(
            &device,
            &client,
            "kitchen",
            &format!("q{number}"),
            &format!("{SECRET} {number}"),
        );
    }
    ask(&device, &client, "kitchen", "bad", "");
    client.wait_answered(PATIENCE)?;
    let said = device.said();
    ensure!(said.contains("answered") && !said.contains(SECRET), "{said}");
    device.stop()?;
    device.restart(&broker)?;
    let left = holding(&device.state(), SECRET)?;
    ensure!(left.iter().all(|file| file.ends_with("journal")), "{left:?}");
    ensure!(!device.said().contains(SECRET));
    let answer: Value = client
        .see(|seen| serde_json::from_slice(&seen.answers["q0"][0].payload))
        .context("JSON")?;
    ensure!(
        answer["ai_generated"] == true
            && answer["model_sha256"]
                .as_str()
                .is_some_and(|hash| hash.len() == 64)
    );
    Ok(())
}

#[test]
fn commands_are_not_listened_to_unless_the_owner_says_so() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let options = Options {
        config: CONFIG.replace("over_mqtt = true", "over_mqtt = false"),
        ..Options::default()
    };
    let mut device = Device::new("deaf-to-commands", &model.path(), options)?;
    device.restart(&broker)?;
    let answers = device.topic("res/#");
    let client = Client::connect(broker.port(), "admin", &[&answers])?;
    client.send(Outgoing {
        topic: device.topic("cmd/erase"),
        payload: br#"{"id": "c", "request": "x"}"#.to_vec(),
        ..Outgoing::default()
    });
    client.ask("after", device.request("after", "Hello", 4));
    client.wait_answered(PATIENCE)?;
    ensure!(
        client.see(|seen| !seen.answers.contains_key("c")),
        "a command was answered"
    );
    ensure!(!device.said().contains("command:"), "{}", device.said());
    Ok(())
}
