//! The network is cut under a device that has answers to give, and comes back: a network namespace of the test's own,
//! two ends of a cable, and the device behind it.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::Client;
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::process::{self, Running};

const CONFIG: &str = "[model]\nthreads = 1\n[metrics]\ninterval_s = 1\n[broker]\nkeep_alive_s = 5\n[sampling]\ntemperature = 1.0\n";
const SHORT: Duration = Duration::from_secs(10);
/// Addresses of the two ends, in namespaces where there is nothing else.
const BROKER_END: &str = "10.88.0.1";
const DEVICE_END: &str = "10.88.0.2";

fn ip(arguments: &str) -> Result<()> {
    process::run("ip", arguments.split(' '), SHORT)?.success()?;
    Ok(())
}

/// What cuts the link, and mends it.
enum Cut {
    /// Our end of the cable is taken down.
    Cable,
    /// Where no namespace may be made: the broker's process stands still, which no packet passes either.
    Broker,
}

impl Cut {
    fn cut(&self, broker: &Broker) -> Result<()> {
        match self {
            Self::Cable => ip("link set near down"),
            Self::Broker => broker.pause(),
        }
    }

    fn mend(&self, broker: &Broker) -> Result<()> {
        match self {
            Self::Cable => ip("link set near up"),
            Self::Broker => broker.resume(),
        }
    }
}

fn cut_and_mend(cut: &Cut, broker: &Broker, broker_url: &str, under: Vec<String>) -> Result<()> {
    let model = Tiny::make()?;
    let options = Options {
        config: CONFIG.to_owned(),
        under,
        ..Options::default()
    };
    let mut device = Device::new("cut-off", &model.path(), options)?;
    let (answers, metrics) = (device.topic("res/#"), device.topic("metrics"));
    let client = Client::connect(
        broker.port(),
        "client",
        &[&answers, &metrics, &device.topic("status")],
    )?;
    device.launch(broker_url, None)?;
    let status = device.topic("status");
    client.wait(PATIENCE, "a device that is ready", |seen| {
        seen.json(&status)["state"] == "ready"
    })?;
    let worker = device.worker()?;
    for round in 0..2 {
        process::signal("STOP", worker)?;
        for number in 0..30 {
            let id = format!("n{round}-{number}");
            client.ask(&id, device.request(&id, "Say something.", 32));
        }
        let accepted = 30 * (round + 1);
        client.wait(PATIENCE, "accepted requests", |seen| {
            seen.json(&metrics)["accepted"].as_u64() == Some(accepted)
        })?;
        let since = Instant::now();
        cut.cut(broker)?;
        process::signal("CONT", worker)?;
        device.wait_for_line(Duration::from_secs(20), |line| {
            line.contains("no connection to the broker")
        })?;
        println!("the cut was noticed after {:.1} s", since.elapsed().as_secs_f64());
        cut.mend(broker)?;
        client.wait_answered(PATIENCE)?;
        println!(
            "all answered {:.1} s after the cut",
            since.elapsed().as_secs_f64()
        );
    }
    println!("{} came again", client.check_promise()?);
    client.wait(PATIENCE, "the counter", |seen| {
        seen.json(&metrics)["answered"].as_u64() == Some(60)
    })?;
    Ok(())
}

#[test]
fn a_network_that_is_cut_costs_no_answer() -> Result<()> {
    let may = Command::new("unshare")
        .args([
            "-rn", "ip", "link", "add", "near", "type", "veth", "peer", "name", "far",
        ])
        .output()
        .is_ok_and(|it| it.status.success());
    if !may {
        println!("no network namespace may be made here: the broker stands still instead");
        let broker = Broker::forgetful()?;
        return cut_and_mend(&Cut::Broker, &broker, &broker.url(), Vec::new());
    }
    // This very test program, in a network of its own.
    let program = std::env::current_exe()?;
    let mut command = Command::new("unshare");
    command.arg("-rn").arg(program);
    command.args([
        "--exact",
        "inside_a_network_of_its_own",
        "--ignored",
        "--nocapture",
    ]);
    let said = Running::start(&mut command)?.finish(PATIENCE)?.success()?;
    println!("{said}");
    ensure!(said.contains("1 passed"), "{said}");
    Ok(())
}

#[test]
#[ignore = "takes over its network: a_network_that_is_cut_costs_no_answer runs it in one of its own"]
fn inside_a_network_of_its_own() -> Result<()> {
    let links = process::run("ip", ["-brief", "link"], SHORT)?.success()?;
    ensure!(
        links.lines().count() <= 1,
        "this is the machine's own network: {links}"
    );
    ip("link set lo up")?;
    let behind =
        Running::start(Command::new("unshare").args(["-n", "sh", "-c", "echo up; exec sleep 1000"]))?;
    behind.wait_for_line(SHORT, |line| line == "up")?;
    let id = behind.id().to_string();
    ip(&format!("link add near type veth peer name far netns {id}"))?;
    ip(&format!("address add {BROKER_END}/24 dev near"))?;
    ip("link set near up")?;
    let under = ["nsenter", "-t", &id, "-n"].map(ToOwned::to_owned).to_vec();
    for arguments in [
        "link set lo up".to_owned(),
        format!("address add {DEVICE_END}/24 dev far"),
        "link set far up".to_owned(),
    ] {
        let words = under[1..].iter().map(String::as_str).chain(["ip"]);
        process::run("nsenter", words.chain(arguments.split(' ')), SHORT)?
            .success()
            .with_context(|| arguments.clone())?;
    }
    let broker = Broker::on_every_address()?;
    let url = format!("mqtt://{BROKER_END}:{}", broker.port());
    cut_and_mend(&Cut::Cable, &broker, &url, under)
}
