//! The HTTP door with OpenAI's own client for Python, and with Prometheus' reader of metrics pages.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use pipit_tests::broker::{Broker, free_port};
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::example::{Example, source};
use pipit_tests::model::smollm2;
use pipit_tests::process::Running;
use serde_json::Value;

/// A device with a door at `listen`, a key and little room.
fn device(broker: &Broker, listen: &str) -> Result<(Device, tempfile::TempDir)> {
    let folder = tempfile::tempdir()?;
    let key = folder.path().join("key");
    std::fs::write(&key, "s3cret\n")?;
    let options = Options {
        config: format!(
            "[model]\nthreads = 1\nslots = 1\n[limits]\nqueue = 2\nmax_tokens = 2000\n\
             [http]\nlisten = {listen:?}\nkey_file = {key:?}\n"
        ),
        ..Options::default()
    };
    let mut device = Device::new("door", &smollm2()?, options)?;
    device.restart(broker)?;
    Ok((device, folder))
}

#[test]
fn every_answer_is_what_the_openai_package_wants() -> Result<()> {
    let broker = Broker::forgetful()?;
    let address = format!("127.0.0.1:{}", free_port()?);
    let (_device, _key) = device(&broker, &address)?;
    let check = Path::new(env!("CARGO_MANIFEST_DIR")).join("openai/check.py");
    let mut command = Command::new(Example::openai()?.interpreter());
    command.arg(check).args([&format!("http://{address}"), "s3cret"]);
    let seen = Running::start(&mut command)?.finish(PATIENCE)?.success()?;
    println!("{seen}");
    ensure!(seen.contains("RateLimitError queue_full"), "{seen}");
    Ok(())
}

#[test]
fn the_example_asks_through_a_socket() -> Result<()> {
    let broker = Broker::forgetful()?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("http.sock");
    let socket = socket.to_str().unwrap_or_default();
    let (_device, _key) = device(&broker, &format!("unix:{socket}"))?;
    let example = Example::openai()?;
    let ask = |more: &[&str]| {
        let mut command = example.command("ask.py");
        command.args([
            "Say hello in one sentence.",
            "--socket",
            socket,
            "--max-tokens",
            "60",
        ]);
        Running::start(command.args(more))?.finish(PATIENCE)
    };
    let whole = ask(&["--key", "s3cret"])?.success()?;
    ensure!(!whole.trim().is_empty(), "an empty answer");
    let streamed = ask(&["--key", "s3cret", "--stream"])?.success()?;
    assert_eq!(streamed, whole);
    let schema = source("light.schema.json");
    let light = ask(&["--key", "s3cret", "--schema", &schema.to_string_lossy()])?.success()?;
    ensure!(
        serde_json::from_str::<Value>(&light)?["on"].is_boolean(),
        "{light}"
    );
    for (arguments, code) in [
        (&["--key", "s3cret", "--deadline-ms", "0"][..], "expired: "),
        (&[], "invalid_api_key: "),
    ] {
        let refused = ask(arguments)?;
        ensure!(
            refused.code == Some(1) && refused.stderr.starts_with(code),
            "{code}: {refused:?}"
        );
    }
    Ok(())
}
