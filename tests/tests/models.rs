//! Models as installable things: signed, tried, switched while requests go on, and rolled back. Whatever ends in the
//! middle, the device serves a model that was verified.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::{Client, Outgoing};
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::http::Server;
use pipit_tests::model::{Tiny, smollm2};
use pipit_tests::package::{Maker, Package};
use pipit_tests::process::{self, Finished, Running};
use pipit_tests::program;
use serde_json::{Value, json};

const CONFIG: &str = "[model]\nthreads = 1\nn_ctx = 256\nslots = 2\n[metrics]\ninterval_s = 1\n";
const ADMIN: &str = "[admin]\nover_mqtt = true\n";
const GOLDEN: &[&str] = &["Say hello."];

/// A device that trusts `maker` and does not run yet; its configuration file is there for `pipit model`.
fn device(name: &str, maker: &Maker, more: &str) -> Result<Device> {
    let config = format!("{CONFIG}{}{more}", maker.trusted());
    let device = Device::of_store(
        name,
        Options {
            config: config.clone(),
            ..Options::default()
        },
    )?;
    std::fs::write(device.config(), config)?;
    Ok(device)
}

/// Two models of one maker that answer otherwise.
fn two_versions(maker: &Maker, golden: &[&str]) -> Result<(Package, Package)> {
    Ok((
        maker.pack(&Tiny::make()?.path(), "1", golden)?,
        maker.pack(&Tiny::of_type("BF16")?.path(), "2", golden)?,
    ))
}

/// `pipit model VERB …` for this device, not yet started.
fn model_command(device: &Device, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program::path("pipit")?);
    command.arg("model").args(arguments);
    command.arg("--config").arg(device.config());
    command.arg("--state-dir").arg(device.state());
    Ok(command)
}

/// Runs it to its end; `fault` is where it is to kill itself.
fn model(device: &Device, arguments: &[&str], fault: Option<&str>) -> Result<Finished> {
    let mut command = model_command(device, arguments)?;
    if let Some(fault) = fault {
        command.env("PIPIT_FAULT", fault);
    }
    Running::start(&mut command)?.finish(PATIENCE)
}

fn install(device: &Device, package: &Package) -> Result<Finished> {
    model(device, &["install", text(package.path())?], None)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

fn listener(broker: &Broker, device: &Device) -> Result<Client> {
    let filters = [
        device.topic("res/#"),
        device.topic("metrics"),
        device.topic("status"),
    ];
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    Client::connect(
        broker.port(),
        &format!("of-{}", device.topic("x").replace('/', "-")),
        &filters,
    )
}

/// Asks once and returns the sha256 of the model that answered.
fn who_answers(device: &Device, client: &Client, id: &str) -> Result<String> {
    client.ask(id, device.request(id, "Say something.", 4));
    client.wait_answered(PATIENCE)?;
    client.see(|seen| {
        let answer: Value = serde_json::from_slice(&seen.answers[id][0].payload)?;
        Ok(answer["model_sha256"]
            .as_str()
            .context(answer.to_string())?
            .to_owned())
    })
}

/// Sends a command and returns what the device says to it.
fn command(device: &Device, client: &Client, id: &str, mut body: Value) -> Result<Value> {
    body["id"] = id.into();
    let message = Outgoing {
        topic: device.topic("cmd/model"),
        payload: body.to_string().into_bytes(),
        ..Outgoing::default()
    };
    client.ask(id, message);
    client.wait_answered(PATIENCE)?;
    client.see(|seen| Ok(serde_json::from_slice(&seen.answers[id][0].payload)?))
}

#[test]
fn requests_are_answered_while_the_model_is_switched_and_switched_back() -> Result<()> {
    let maker = Maker::new()?;
    let first = maker.pack(&smollm2()?, "1", &["Say hello."])?;
    let tiny = Tiny::of_type("BF16")?;
    let second = maker.pack(&tiny.path(), "2", GOLDEN)?;
    let broker = Broker::forgetful()?;
    let mut device = device("switch", &maker, "")?;
    install(&device, &first)?.success()?;
    device.restart(&broker)?;
    let client = listener(&broker, &device)?;
    ensure!(who_answers(&device, &client, "before")? == first.sha256()?);

    // One request after the other, all the while: how long was the longest wait?
    let (mut longest, mut gaps) = (Duration::ZERO, Vec::new());
    for (round, (package, verb)) in [(&second, "install"), (&first, "rollback")]
        .into_iter()
        .enumerate()
    {
        let path = text(package.path())?;
        let words: &[&str] = if verb == "install" {
            &["install", path]
        } else {
            &["rollback"]
        };
        let mut switch = Some(Running::start(&mut model_command(&device, words)?)?);
        for number in 0.. {
            let id = format!("r{round}-{number}");
            let since = Instant::now();
            let sha256 = who_answers(&device, &client, &id)?;
            longest = longest.max(since.elapsed());
            if sha256 == package.sha256()? {
                break;
            }
            if let Some(running) = &mut switch
                && running.ended()?
            {
                switch.take().context("it runs")?.finish(PATIENCE)?.success()?;
            }
        }
        gaps.push(std::mem::take(&mut longest));
    }
    println!("the longest wait for an answer at a switch to the new model and back: {gaps:.2?}");
    ensure!(client.check_promise()? == 0);
    ensure!(
        client.see(|seen| seen.answers.values().all(|all| all[0].error.is_none())),
        "an error instead of an answer"
    );
    Ok(())
}

#[test]
fn what_is_not_signed_tampered_with_or_answers_otherwise_is_not_installed() -> Result<()> {
    let (maker, stranger) = (Maker::new()?, Maker::new()?);
    let (good, other) = (Tiny::make()?, Tiny::of_type("BF16")?);
    let device = device("refusals", &maker, "")?;
    let refused = |package: &Package, why: &str| -> Result<()> {
        let finished = install(&device, package)?;
        ensure!(finished.code == Some(3), "{why}: {finished:?}");
        ensure!(finished.stderr.contains(why), "{why}: {}", finished.stderr);
        ensure!(
            !device.state().join("models/place.json").exists(),
            "{why}: it is installed"
        );
        Ok(())
    };
    let unsigned = maker.pack(&good.path(), "1", &[])?;
    std::fs::remove_file(unsigned.path().join("manifest.json.minisig"))?;
    refused(&unsigned, "is not signed")?;
    refused(
        &stranger.pack(&good.path(), "1", &[])?,
        "trusted_keys does not have",
    )?;

    let tampered = maker.pack(&good.path(), "1", &[])?;
    let manifest = std::fs::read_to_string(tampered.manifest_path())?;
    std::fs::write(tampered.manifest_path(), manifest.replace("\"1\"", "\"2\""))?;
    refused(&tampered, "changed after it was signed")?;

    // The right size, other bytes.
    let swapped = maker.pack(&good.path(), "1", &[])?;
    let file = swapped.path().join("tiny.gguf");
    let mut bytes = std::fs::read(&file)?;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::remove_file(&file)?;
    std::fs::write(&file, bytes)?;
    refused(&swapped, "its sha256 is")?;
    let verified = model(&device, &["verify", text(swapped.path())?], None)?;
    ensure!(verified.code == Some(3), "{verified:?}");

    // Signed and whole, and it does not say what it must.
    let wrong = maker.pack(&other.path(), "1", GOLDEN)?;
    let mut manifest = wrong.manifest()?;
    manifest["golden"][0]["text"] = "Something else.".into();
    std::fs::write(wrong.manifest_path(), manifest.to_string())?;
    maker.sign(&wrong.manifest_path())?;
    refused(&wrong, "golden prompt 1: it answers")?;

    // No GGUF at all: the canary is not even begun.
    let nonsense = device.state().join("nonsense.gguf");
    std::fs::write(&nonsense, "nonsense")?;
    let finished = model(&device, &["install", "--allow-unsigned", text(&nonsense)?], None)?;
    ensure!(
        finished.code == Some(3) && finished.stderr.contains("not a GGUF file"),
        "{finished:?}"
    );

    // And nothing of them stays.
    let left = std::fs::read_dir(device.state().join("models/files"))?.count();
    ensure!(left <= 1, "{left} files are left");
    let list = model(&device, &["list", "--json"], None)?.success()?;
    ensure!(list.contains("\"models\":[]"), "{list}");
    Ok(())
}

#[test]
fn an_installation_that_is_killed_at_any_step_leaves_a_verified_model() -> Result<()> {
    let maker = Maker::new()?;
    let (first, second) = two_versions(&maker, GOLDEN)?;
    let broker = Broker::forgetful()?;
    for point in [
        "model_fetching",
        "model_fetched",
        "model_stored",
        "model_written",
        "model_tried",
        "model_switched",
    ] {
        let mut device = device(&point.replace('_', "-"), &maker, "")?;
        install(&device, &first)?.success()?;
        let killed = model(&device, &["install", text(second.path())?], Some(point))?;
        ensure!(killed.code.is_none(), "{point} is never passed: {killed:?}");
        model(&device, &["verify"], None)?
            .success()
            .with_context(|| point.to_owned())?;
        device.launch(&broker.url(), None)?;
        let client = listener(&broker, &device)?;
        let expected = if point == "model_switched" {
            &second
        } else {
            &first
        };
        ensure!(
            who_answers(&device, &client, "after")? == expected.sha256()?,
            "{point}: another model answers"
        );
        // The next attempt goes through, with the daemon running.
        install(&device, &second)?
            .success()
            .with_context(|| point.to_owned())?;
        let since = Instant::now();
        while who_answers(
            &device,
            &client,
            &format!("again-{}", since.elapsed().as_micros()),
        )? != second.sha256()?
        {
            ensure!(since.elapsed() < PATIENCE, "{point}: the new model does not come");
        }
        device.kill()?;
    }
    Ok(())
}

#[test]
fn torn_and_damaged_files_of_the_store_do_not_serve_a_wrong_model() -> Result<()> {
    let maker = Maker::new()?;
    let (first, second) = two_versions(&maker, GOLDEN)?;
    let broker = Broker::forgetful()?;
    let mut device = device("torn", &maker, "")?;
    let client = listener(&broker, &device)?;
    install(&device, &first)?.success()?;
    let models = device.state().join("models");

    // What is on its way is torn: the next attempt finds out and fetches it again.
    std::fs::write(models.join(format!("files/{}.part", second.sha256()?)), "torn")?;
    let finished = install(&device, &second)?;
    ensure!(
        finished.code == Some(3),
        "a torn beginning is not used: {finished:?}"
    );
    install(&device, &second)?.success()?;
    device.restart(&broker)?;
    ensure!(who_answers(&device, &client, "a")? == second.sha256()?);
    device.stop()?;

    // One bit of the model that is served has turned: the one before answers.
    let file = models.join(format!("files/{}.gguf", second.sha256()?));
    let mut bytes = std::fs::read(&file)?;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes)?;
    device.launch(&broker.url(), None)?;
    ensure!(who_answers(&device, &client, "b")? == first.sha256()?);
    ensure!(device.said().contains("is damaged"), "{}", device.said());
    device.stop()?;

    // The place file is garbage.
    std::fs::write(models.join("place.json"), "{\"active\": \"m-")?;
    device.launch(&broker.url(), None)?;
    ensure!(who_answers(&device, &client, "c")? == first.sha256()?);
    Ok(())
}

#[test]
fn a_model_that_ends_its_worker_again_and_again_is_given_up() -> Result<()> {
    let maker = Maker::new()?;
    let (first, second) = two_versions(&maker, &[])?;
    let broker = Broker::forgetful()?;
    let mut device = device("crash-loop", &maker, "")?;
    install(&device, &first)?.success()?;
    device.restart(&broker)?;
    let client = listener(&broker, &device)?;
    ensure!(who_answers(&device, &client, "first")? == first.sha256()?);
    install(&device, &second)?.success()?;
    device.wait_for_line(PATIENCE, |line| line.contains("changing to the model"))?;
    let since = Instant::now();
    let mut killed = 0;
    while !device.said().contains("is given up") {
        ensure!(since.elapsed() < PATIENCE, "{}", device.said());
        if let Ok(worker) = device.worker() {
            killed += usize::from(process::signal("KILL", worker).is_ok());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    println!(
        "given up after {killed} ends of the worker, {:.1} s",
        since.elapsed().as_secs_f64()
    );
    ensure!(who_answers(&device, &client, "back")? == first.sha256()?);
    let list: Value = serde_json::from_str(&model(&device, &["list", "--json"], None)?.success()?)?;
    ensure!(
        list["given_up"]["why"]
            .as_str()
            .is_some_and(|why| why.contains("signal")),
        "{list}"
    );

    // The machine goes down with it each time: the count is on the disk.
    let mut device = self::device("reboot-loop", &maker, "")?;
    install(&device, &first)?.success()?;
    install(&device, &second)?.success()?;
    let client = listener(&broker, &device)?;
    for start in 0..5 {
        device.launch(&broker.url(), None)?;
        device
            .wait_for_line(PATIENCE, |line| line.contains("is loaded"))
            .with_context(|| format!("start {start}"))?;
        device.kill()?;
    }
    device.launch(&broker.url(), None)?;
    ensure!(who_answers(&device, &client, "rebooted")? == first.sha256()?);
    Ok(())
}

#[test]
fn commands_over_mqtt_install_and_go_on_after_a_power_cut() -> Result<()> {
    let maker = Maker::new()?;
    let (first, second) = two_versions(&maker, GOLDEN)?;
    let broker = Broker::forgetful()?;
    for (point, most) in [("model_changing", u64::MAX), ("none", 10_000)] {
        let mut device = device(&format!("mqtt-{}", point.replace('_', "-")), &maker, ADMIN)?;
        install(&device, &first)?.success()?;
        device.launch(&broker.url(), Some(point).filter(|point| *point != "none"))?;
        device.wait_until_ready(&broker)?;
        let client = listener(&broker, &device)?;
        let server = Server::start(second.path(), most)?;
        let order = json!({"action": "install", "url": server.url("manifest.json"), "id": "order"});
        let message = Outgoing {
            topic: device.topic("cmd/model"),
            payload: order.to_string().into_bytes(),
            ..Outgoing::default()
        };
        client.ask("order", message);
        if point == "none" {
            // In the middle of the download.
            client.wait(PATIENCE, "a part", |_| server.asked().len() > 3)?;
            device.kill()?;
        } else {
            device.ended(PATIENCE)?;
        }
        device.launch(&broker.url(), None)?;
        client.wait_answered(PATIENCE)?;
        let since = Instant::now();
        while who_answers(&device, &client, &format!("q{}", since.elapsed().as_micros()))?
            != second.sha256()?
        {
            ensure!(
                since.elapsed() < PATIENCE,
                "{point}: the new model does not come: {}",
                device.said()
            );
        }
        if point == "none" {
            let asked = server.asked();
            ensure!(
                asked
                    .iter()
                    .any(|line| line.starts_with("tiny.gguf") && !line.ends_with(" 0")),
                "the download went on where it stopped: {asked:?}"
            );
            let back = command(&device, &client, "back", json!({"action": "rollback"}))?;
            ensure!(back["result"]["model"].as_str().is_some(), "{back}");
            let missing = command(
                &device,
                &client,
                "missing",
                json!({"action": "activate", "model": "m-x"}),
            )?;
            ensure!(
                missing["error"]["message"]
                    .as_str()
                    .is_some_and(|why| why.contains("not installed")),
                "{missing}"
            );
            let path = json!({"action": "install", "url": text(second.path())?});
            let refused = command(&device, &client, "path", path)?;
            ensure!(refused["error"]["code"] == "invalid_request", "{refused}");
            let listed = command(&device, &client, "list", json!({"action": "list"}))?;
            ensure!(
                listed["result"]["models"]
                    .as_array()
                    .is_some_and(|all| all.len() == 2),
                "{listed}"
            );
        }
        device.kill()?;
    }
    Ok(())
}

#[test]
fn a_model_that_does_not_fit_beside_the_one_that_is_served_gets_its_room() -> Result<()> {
    let maker = Maker::new()?;
    let (first, second) = two_versions(&maker, GOLDEN)?;
    let broker = Broker::forgetful()?;
    let mut device = device("room", &maker, "")?;
    install(&device, &first)?.success()?;
    device.restart(&broker)?;
    let client = listener(&broker, &device)?;
    ensure!(who_answers(&device, &client, "a")? == first.sha256()?);
    // Far too little for any model, also alone: the one that is served comes back.
    let config = std::fs::read_to_string(device.config())?;
    std::fs::write(
        device.config(),
        config.replace("[model]\n", "[model]\nmemory_bytes = 1000000\n"),
    )?;
    let tries = Running::start(&mut model_command(&device, &["install", text(second.path())?])?)?;
    device.wait_for_line(PATIENCE, |line| line.contains("an installation needs the memory"))?;
    client.wait(PATIENCE, "an unloaded model", |seen| {
        seen.json(&device.topic("status"))["state"] == "online"
    })?;
    let finished = tries.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(78) && finished.stderr.contains("does not fit"),
        "{finished:?}"
    );
    ensure!(who_answers(&device, &client, "b")? == first.sha256()?);
    Ok(())
}
