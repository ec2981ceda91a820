//! The subscriber of examples/postgres beside a real device, a real mosquitto and a real PostgreSQL: every answer is one row,
//! also when the database or the subscriber was away, no word of an answer is in the database, and rows go when they are to.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::{Client, Outgoing};
use pipit_tests::database::Database;
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::process::Running;
use pipit_tests::program;
use serde_json::{Value, json};

/// `target/postgres/debug/pipit-postgres`, where ./check builds it.
fn example() -> Result<PathBuf> {
    let ours = program::path("pipit")?;
    let target = ours.parent().and_then(Path::parent).context("no target folder")?;
    let path = target.join("postgres/debug/pipit-postgres");
    ensure!(
        path.is_file(),
        "{} is not there\n  hint: cargo build --locked --manifest-path examples/postgres/Cargo.toml --target-dir {}",
        path.display(),
        target.join("postgres").display()
    );
    Ok(path)
}

fn command(database: &Database, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(example()?);
    command
        .env("PGPASSFILE", database.pass_file())
        .env("DATABASE_URL", database.url())
        .args(arguments);
    Ok(command)
}

fn subscriber(database: &Database, broker: &Broker) -> Result<Running> {
    let running = Running::start(&mut command(database, &["run", "--broker", &broker.url()])?)?;
    running.wait_for_line(PATIENCE, |line| line.contains("listening for answers"))?;
    Ok(running)
}

fn rows(database: &Database, condition: &str) -> Result<u64> {
    let count = database.query(&format!("select count(*) from answers where {condition}"))?;
    Ok(count.parse()?)
}

fn wait_for_rows(database: &Database, wanted: u64) -> Result<()> {
    let since = Instant::now();
    while rows(database, "true")? < wanted {
        ensure!(
            since.elapsed() < PATIENCE,
            "{} rows of {wanted}",
            rows(database, "true")?
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let count = rows(database, "true")?;
    ensure!(count == wanted, "{count} rows, and there are {wanted} answers");
    Ok(())
}

fn ask(device: &Device, client: &Client, who: &str, ids: std::ops::Range<u32>) -> Result<()> {
    for id in ids {
        let id = format!("{who}-{id}");
        let message = Outgoing {
            response_topic: Some(format!("reply/{who}/{id}")),
            ..device.request(&id, "Tell me something.", 24)
        };
        client.ask(&id, message);
    }
    client.wait_answered(PATIENCE)
}

/// Whether a file below a folder holds these bytes.
fn holds(folder: &Path, bytes: &[u8]) -> Result<bool> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let found = match path.is_dir() {
            true => holds(&path, bytes)?,
            false => std::fs::read(&path)?
                .windows(bytes.len())
                .any(|part| part == bytes),
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn every_answer_is_one_row_of_metadata() -> Result<()> {
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let mut database = Database::start()?;
    let options = Options {
        config: "[model]\nthreads = 1\n".to_owned(),
        ..Options::default()
    };
    let mut device = Device::new("kept", &model.path(), options)?;
    device.restart(&broker)?;
    let client = Client::connect(broker.port(), "client", &["reply/#"])?;
    let running = subscriber(&database, &broker)?;

    ask(&device, &client, "kitchen", 0..20)?;
    client.ask(
        "reply/hall/plain",
        Outgoing {
            topic: device.topic("req"),
            payload: b"Plain text".to_vec(),
            response_topic: Some("reply/hall/plain".to_owned()),
            ..Outgoing::default()
        },
    );
    client.ask(
        "hall-bad",
        Outgoing {
            topic: device.topic("req"),
            payload: json!({"id": "hall-bad", "messages": []}).to_string().into_bytes(),
            response_topic: Some("reply/hall/bad".to_owned()),
            ..Outgoing::default()
        },
    );
    client.wait_answered(PATIENCE)?;
    wait_for_rows(&database, 22)?;

    // What a row says is what the answer said.
    let answer: Value = client.see(|seen| serde_json::from_slice(&seen.answers["kitchen-7"][0].payload))?;
    let row = database.query(
        "select client, device, model_sha256, prompt_tokens, completion_tokens, finish_reason, error is null, \
         extract(epoch from answered_at)::bigint from answers where request_id = 'kitchen-7'",
    )?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let expected = [
        "reply/kitchen".to_owned(),
        text(&answer["device"]),
        text(&answer["model_sha256"]),
        answer["usage"]["prompt_tokens"].to_string(),
        answer["usage"]["completion_tokens"].to_string(),
        text(&answer["choices"][0]["finish_reason"]),
        "t".to_owned(),
        answer["created"].to_string(),
    ];
    ensure!(row == expected.join("|"), "{row} is not {expected:?}");
    ensure!(rows(&database, "error = 'invalid_request' and client = 'reply/hall'")? == 1);
    ensure!(rows(&database, "model_sha256 is not null and request_id is null")? == 1);
    // And nothing of what the answer said in words.
    let said = text(&answer["choices"][0]["message"]["content"]);
    database.query("checkpoint")?;
    ensure!(
        said.len() > 8 && !holds(&database.data(), said.as_bytes())?,
        "{said:?}"
    );
    ensure!(holds(&database.data(), text(&answer["model_sha256"]).as_bytes())?);

    // The same answer again is the same row.
    let message = Outgoing {
        response_topic: Some("reply/kitchen/kitchen-3".to_owned()),
        ..device.request("kitchen-3", "Tell me something.", 24)
    };
    client.send(message);
    client.wait(PATIENCE, "the same answer", |seen| {
        seen.answers["kitchen-3"].len() == 2
    })?;

    // The database dies and comes back; then the subscriber.
    database.kill()?;
    ask(&device, &client, "kitchen", 20..30)?;
    running.wait_for_line(PATIENCE, |line| line.contains("a row cannot be written"))?;
    database.restart()?;
    wait_for_rows(&database, 32)?;
    running.kill()?;
    ask(&device, &client, "kitchen", 30..40)?;
    let running = subscriber(&database, &broker)?;
    wait_for_rows(&database, 42)?;

    // A client's rows go, and the others' stay; then what is old.
    let erased = |arguments: &[&str]| -> Result<String> {
        let finished = Running::start(&mut command(&database, arguments)?)?.finish(PATIENCE)?;
        Ok(finished.success()?.trim().to_owned())
    };
    ensure!(erased(&["erase", "--request", "kitchen-1"])? == "1");
    ensure!(erased(&["erase", "--client", "reply/kitchen"])? == "39");
    ensure!(rows(&database, "client = 'reply/kitchen'")? == 0 && rows(&database, "true")? == 2);
    database.query("update answers set received_at = now() - interval '31 days' where error is null")?;
    ensure!(erased(&["prune", "--keep-days", "30"])? == "1");
    ensure!(rows(&database, "true")? == 1);
    // A subscriber that begins does so, too.
    database.query("update answers set received_at = now() - interval '31 days'")?;
    drop(running);
    let _running = subscriber(&database, &broker)?;
    let since = Instant::now();
    while rows(&database, "true")? > 0 {
        ensure!(since.elapsed() < PATIENCE, "an old row is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
