//! Energy with a sensor that the test plays: a counter of 20 W that begins anew every two seconds, as RAPL's does.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::Client;
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::Tiny;
use pipit_tests::process;
use serde_json::Value;

const WATTS: f64 = 20.0;
const RANGE_MICROJOULES: u64 = 40_000_000;
const REQUESTS: usize = 40;

/// Writes the counter until `done`, as the kernel does: whole.
fn play(file: &Path, done: &AtomicBool) -> Result<()> {
    let started = Instant::now();
    let new = file.with_extension("new");
    while !done.load(Ordering::Relaxed) {
        let microjoules = (started.elapsed().as_secs_f64() * WATTS * 1e6) as u64;
        std::fs::write(&new, format!("{}\n", microjoules % RANGE_MICROJOULES))?;
        std::fs::rename(&new, file)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[test]
fn joules_are_shared_by_the_requests_that_took_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let counter = folder.path().join("energy_uj");
    std::fs::write(&counter, "0\n")?;
    std::fs::write(
        folder.path().join("max_energy_range_uj"),
        format!("{RANGE_MICROJOULES}\n"),
    )?;
    let model = Tiny::make()?;
    let broker = Broker::forgetful()?;
    let options = Options {
        config: format!(
            "[model]\nthreads = 1\nslots = 4\n[metrics]\ninterval_s = 1\nenergy_sensor = \"{}\"\n",
            counter.display()
        ),
        ..Options::default()
    };
    let mut device = Device::new("metered", &model.path(), options)?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let player = scope.spawn(|| play(&counter, &done));
        let result = measured(&broker, &mut device);
        done.store(true, Ordering::Relaxed);
        let played = player.join();
        ensure!(
            played.is_ok_and(|played| played.is_ok()),
            "the counter was not written"
        );
        result
    })
}

fn measured(broker: &Broker, device: &mut Device) -> Result<()> {
    let begun = Instant::now();
    device.restart(broker)?;
    let (metrics, card) = (device.topic("metrics"), device.topic("card"));
    let client = Client::connect(
        broker.port(),
        "client",
        &[&device.topic("res/#"), &metrics, &card],
    )?;
    // Slow enough that the counter begins anew meanwhile: the worker stands still for a while with all of them.
    let started = Instant::now();
    let worker = device.worker()?;
    for number in 0..REQUESTS {
        let id = format!("e{number}");
        client.ask(&id, device.request(&id, "Tell me something.", 24));
        if number == REQUESTS / 2 {
            process::signal("STOP", worker)?;
            std::thread::sleep(Duration::from_secs(5));
            process::signal("CONT", worker)?;
        }
    }
    client.wait_answered(PATIENCE)?;
    let most = started.elapsed().as_secs_f64() * WATTS;
    let usages: Vec<Value> = client.see(|seen| {
        let answers = seen.answers.values();
        let parse = |payload: &[u8]| serde_json::from_slice::<Value>(payload).unwrap_or_default();
        answers
            .map(|all| parse(&all[0].payload)["usage"].clone())
            .collect()
    });
    let (mut joules, mut tokens) = (0.0, 0.0);
    for usage in &usages {
        let (own, of_it) = (usage["energy_j"].as_f64(), usage["completion_tokens"].as_f64());
        let (Some(own), Some(of_it)) = (own, of_it) else {
            anyhow::bail!("no energy in {usage}");
        };
        let each = usage["joules_per_token"].as_f64().unwrap_or(-1.0);
        ensure!((each - own / of_it).abs() < 0.002, "{usage}");
        joules += own;
        tokens += of_it;
    }
    println!("{joules:.1} J for {REQUESTS} answers of {most:.1} J that were drawn, {tokens} tokens");
    // All that was drawn while there was work, the five seconds among it, and no more.
    ensure!(
        joules > 4.5 * WATTS && joules <= most * 1.02,
        "{joules} J of {most} J"
    );

    client.wait(PATIENCE, "metrics after the work", |seen| {
        seen.json(&metrics)["answered"].as_u64() == Some(REQUESTS as u64)
    })?;
    let said = client.see(|seen| seen.json(&metrics));
    let all = said["energy_j"].as_f64().unwrap_or(-1.0);
    ensure!(
        all >= joules - 0.1 && all <= begun.elapsed().as_secs_f64() * WATTS * 1.02,
        "{said} beside {joules} J"
    );
    let each = said["joules_per_token"].as_f64().unwrap_or(-1.0);
    ensure!(
        (each - joules / tokens).abs() < 0.01,
        "{said} beside {joules} J / {tokens}"
    );
    let watts = said["power_w"].as_f64().unwrap_or(-1.0);
    ensure!((watts - WATTS).abs() < 0.2 * WATTS, "{said}");
    let sensor = client.see(|seen| seen.json(&card)["board"]["energy_sensor"].clone());
    ensure!(
        sensor.as_str().is_some_and(|name| name.ends_with("energy_uj")),
        "{sensor}"
    );
    Ok(())
}
