//! A broker that lets in only whom it knows: the access list of examples/access-lists on a real mosquitto, and TLS with
//! certificates on both sides.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pipit_tests::authority::Authority;
use pipit_tests::broker::Broker;
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::process::{self, Finished, Running};
use pipit_tests::program;

const CONFIG: &str =
    "[model]\nthreads = 1\nn_ctx = 256\n[admin]\nover_mqtt = true\n[pool]\nname = \"house\"\n";
const SHORT: Duration = Duration::from_secs(20);

fn examples(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../examples/access-lists")
        .join(file)
}

/// A mosquitto with the example's access list; everybody's password is their name.
fn guarded() -> Result<Broker> {
    let acl = std::fs::canonicalize(examples("mosquitto/acl"))?;
    Broker::with(|folder| {
        let passwords = folder.join("passwords");
        for (at, user) in ["kitchen", "hall", "app", "other", "admin"]
            .into_iter()
            .enumerate()
        {
            let mut words = vec!["-b".to_owned()];
            if at == 0 {
                words.push("-c".to_owned());
            }
            words.push(passwords.display().to_string());
            words.extend([user.to_owned(), user.to_owned()]);
            process::run("mosquitto_passwd", words, SHORT)?.success()?;
        }
        Ok(format!(
            "allow_anonymous false\npassword_file {}\nacl_file {}\n",
            passwords.display(),
            acl.display()
        ))
    })
}

/// The device `kitchen`, with its own name and a password in a file.
fn kitchen(broker: &Broker, model: &Tiny) -> Result<Device> {
    let options = Options {
        config: format!("{CONFIG}[broker]\nusername = \"kitchen\"\npassword_file = \"state/password\"\n"),
        before: "printf 'kitchen\\n' >\"$STATE/password\"; chmod 600 \"$STATE/password\"".to_owned(),
        ..Options::default()
    };
    let mut device = Device::new("kitchen", &model.path(), options)?;
    device.launch(&broker.url(), None)?;
    // In either order.
    let since = Instant::now();
    while !["is loaded", "connected to the broker"]
        .iter()
        .all(|line| device.said().contains(line))
    {
        ensure!(since.elapsed() < PATIENCE, "{}", device.said());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(device)
}

/// What a mosquitto client is called with: MQTT 5, QoS 1, a user, who is also its password, or nobody, and `more`.
fn client(broker: &Broker, user: &str, more: &[&str]) -> Vec<String> {
    let port = broker.port().to_string();
    let mut words = vec!["-V", "5", "-q", "1", "-h", "127.0.0.1", "-p", &port];
    if !user.is_empty() {
        words.extend(["-u", user, "-P", user]);
    }
    words.extend(more);
    words.into_iter().map(str::to_owned).collect()
}

/// mosquitto_rr as a user.
fn ask(
    broker: &Broker,
    user: &str,
    topic: &str,
    reply: &str,
    payload: &str,
    seconds: &str,
) -> Result<Finished> {
    let more = ["-W", seconds, "-t", topic, "-e", reply, "-m", payload];
    process::run("mosquitto_rr", client(broker, user, &more), SHORT + PATIENCE)
}

/// Whether a user hears anything on a topic within the time that it takes to ask once.
fn hears(broker: &Broker, user: &str, topic: &str, meanwhile: impl FnOnce() -> Result<()>) -> Result<bool> {
    let mut command = std::process::Command::new("stdbuf");
    command
        .args(["-oL", "mosquitto_sub", "-d"])
        .args(client(broker, user, &["-t", topic, "-F", "heard %p"]));
    let listener = Running::start(&mut command)?;
    listener.wait_for_line(SHORT, |line| {
        line.starts_with("Subscribed") || line.contains("SUBACK")
    })?;
    meanwhile()?;
    std::thread::sleep(Duration::from_millis(300));
    Ok(listener.said().contains("heard "))
}

#[test]
fn who_has_no_right_gets_nothing() -> Result<()> {
    let model = Tiny::make()?;
    let broker = guarded()?;
    let device = kitchen(&broker, &model)?;
    let (req, cmd) = (device.topic("req"), device.topic("cmd/model"));
    let list = r#"{"action": "list"}"#;

    // What is meant to work.
    let answer = ask(&broker, "app", &req, "reply/app/1", "Hello", "120")?;
    ensure!(
        answer.code == Some(0) && !answer.stdout.trim().is_empty(),
        "{answer:?}"
    );
    let answer = ask(&broker, "admin", &cmd, "reply/admin/1", list, "60")?;
    ensure!(
        answer.code == Some(0) && answer.stdout.contains("\"models\":[]"),
        "{answer:?}"
    );

    let house = "pipit/v1/pool/house/req";
    let answer = ask(&broker, "app", house, "reply/app/pool", "Hello", "120")?;
    ensure!(
        answer.code == Some(0) && !answer.stdout.trim().is_empty(),
        "{answer:?}"
    );
    let refused = ask(&broker, "other", house, "reply/other/pool", "Hello", "2")?;
    ensure!(
        refused.code != Some(0) && refused.stdout.is_empty(),
        "{refused:?}"
    );

    // Nobody comes in without a name, or with somebody else's.
    let nobody = ask(&broker, "", &req, "reply/app/2", "Hello", "2")?;
    ensure!(nobody.code != Some(0) && nobody.stdout.is_empty(), "{nobody:?}");

    // A client without the right to administer is not answered, and the device hears nothing of it.
    let refused = ask(&broker, "app", &cmd, "reply/app/3", list, "2")?;
    ensure!(
        refused.code != Some(0) && refused.stdout.is_empty(),
        "{refused:?}"
    );
    let refused = ask(&broker, "other", &req, "reply/other/1", "Hello", "2")?;
    ensure!(
        refused.code != Some(0) && refused.stdout.is_empty(),
        "{refused:?}"
    );
    let commands = device.said().matches("command: model").count();
    ensure!(commands == 1, "{commands} commands arrived");

    // Answers are for whom they are meant; requests are for the device.
    let again = || -> Result<()> {
        let answer = ask(&broker, "app", &req, "reply/app/4", "Hello", "120")?;
        ensure!(answer.code == Some(0), "{answer:?}");
        Ok(())
    };
    for (user, topic, may) in [
        ("app", "reply/app/#", true),
        ("other", "reply/app/#", false),
        ("other", "reply/#", false),
        ("other", "pipit/v1/#", false),
        ("app", "pipit/v1/kitchen/req", false),
        ("hall", "pipit/v1/kitchen/req", false),
        ("kitchen", "pipit/v1/kitchen/req", true),
    ] {
        ensure!(hears(&broker, user, topic, again)? == may, "{user} on {topic}");
    }

    // Nobody speaks in the device's name.
    let status = device.topic("status");
    let forged = client(&broker, "app", &["-t", &status, "-r", "-m", "forged"]);
    process::run("mosquitto_pub", forged, SHORT)?;
    let last = client(&broker, "app", &["-C", "1", "-W", "10", "-t", &status]);
    let said = process::run("mosquitto_sub", last, SHORT)?.success()?;
    ensure!(said.contains("\"state\""), "{said}");
    Ok(())
}

#[test]
fn tls_with_certificates_on_both_sides() -> Result<()> {
    let model = Tiny::make()?;
    let (authority, stranger) = (Authority::new("kitchen")?, Authority::new("kitchen")?);
    let broker = Broker::with(|_| {
        Ok(authority
            .listener("require_certificate true\nuse_identity_as_username true\nallow_anonymous false\n"))
    })?;
    let url = format!("mqtts://localhost:{}", broker.port());
    let config = |ca: &Authority, client: &Authority| {
        let path = |authority: &Authority, name: &str| authority.file(name).display().to_string();
        format!(
            "{CONFIG}[broker]\nca = \"{}\"\ncertificate = \"{}\"\nkey = \"{}\"\n",
            path(ca, "ca.pem"),
            path(client, "client.pem"),
            path(client, "client.key")
        )
    };
    let device = |name: &str, config: String| -> Result<Device> {
        let options = Options {
            config,
            ..Options::default()
        };
        let mut device = Device::new(name, &model.path(), options)?;
        device.launch(&url, None)?;
        Ok(device)
    };
    let refused = device("no-trust", config(&stranger, &authority))?;
    let said = refused.wait_for_line(PATIENCE, |line| line.contains("no connection to the broker"))?;
    ensure!(said.to_lowercase().contains("certificate"), "{said}");
    let refused = device("not-known", config(&authority, &stranger))?;
    refused.wait_for_line(PATIENCE, |line| line.contains("no connection to the broker"))?;

    let good = device("kitchen", config(&authority, &authority))?;
    good.wait_for_line(PATIENCE, |line| line.contains("connected to the broker"))?;
    ensure!(!good.said().contains("is not encrypted"), "{}", good.said());
    // `pipit ask` with the same certificate, through its configuration.
    let file = authority.file("client.toml");
    std::fs::write(&file, config(&authority, &authority))?;
    let file = file.to_str().context("a path that is not UTF-8")?;
    let mut waits = Vec::new();
    for _ in 0..5 {
        let words = [
            "ask",
            "Hello",
            "--config",
            file,
            "--broker",
            &url,
            "--device",
            "kitchen",
            "--max-tokens",
            "2",
            "--timeout",
            "60s",
        ];
        let since = Instant::now();
        let answer = program::run("pipit", words, PATIENCE)?.success()?;
        ensure!(!answer.trim().is_empty(), "{answer}");
        waits.push(since.elapsed());
    }
    println!("pipit ask over mTLS, connection included: {waits:.0?}");
    Ok(())
}
