//! What the daemon makes of what Linux says of the machine: heat, and cores of two kinds. The test plays parts of /sys, which
//! the daemon sees in a mount namespace of its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::Client;
use pipit_tests::device::{Device, Options, PATIENCE};
use pipit_tests::model::{self, Tiny};
use pipit_tests::process;
use serde_json::Value;

/// A device that sees `folder` in place of this folder of /sys; none where this user may mount nothing.
fn device(model: &Path, folder: &Path, place: &str, config: &str) -> Result<Option<Device>> {
    if !process::may_mount() {
        eprintln!("not looked at: this user may mount nothing, not even in a namespace of its own");
        return Ok(None);
    }
    let options = Options {
        config: config.to_owned(),
        before: format!("mount --bind '{}' {place} || exit 99", folder.display()),
        under: process::OWN_MOUNTS.map(String::from).to_vec(),
    };
    Device::new("hot", model, options).map(Some)
}

/// A sensor that says what the test wants.
struct Zone<'a>(&'a Path);

impl Zone<'_> {
    fn set(&self, degrees: i64) -> Result<()> {
        let (file, new) = (self.0.join("temp"), self.0.join("new"));
        fs::write(&new, format!("{degrees}000\n"))?;
        Ok(fs::rename(new, file)?)
    }
}

/// Seconds that each thread of a process has computed, by its number.
fn computed(id: u32) -> Result<BTreeMap<String, f64>> {
    let mut all = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{id}/task"))? {
        let task = task?;
        let stat = fs::read_to_string(task.path().join("stat"))?;
        // After the name, which may have spaces: utime is the twelfth field, stime the one after it.
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let ticks = fields.split_whitespace().skip(11).take(2);
        let seconds = ticks.map(|field| field.parse().unwrap_or(0.0)).sum::<f64>() / 100.0;
        all.insert(task.file_name().to_string_lossy().into_owned(), seconds);
    }
    Ok(all)
}

/// What one answer of 48 tokens took: seconds of each thread of the worker, the busiest first, and of the clock.
fn answer(device: &Device, client: &Client, id: &str) -> Result<(Vec<f64>, f64)> {
    let worker = device.worker()?;
    let (before, started) = (computed(worker)?, Instant::now());
    client.ask(id, device.request(id, "Tell me a story about a house.", 48));
    client.wait_answered(PATIENCE)?;
    let took = started.elapsed().as_secs_f64();
    let said = client.see(|seen| serde_json::from_slice::<Value>(&seen.answers[id][0].payload))?;
    ensure!(said["usage"]["completion_tokens"].as_u64() > Some(0), "{said}");
    let after = computed(worker)?.into_iter();
    let mut each: Vec<f64> = after
        .map(|(task, seconds)| seconds - before.get(&task).unwrap_or(&0.0))
        .collect();
    each.sort_by(|one, other| other.total_cmp(one));
    Ok((each, took))
}

#[test]
fn a_hot_machine_works_with_fewer_threads_then_slower_then_refuses() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("thermal/thermal_zone0");
    fs::create_dir_all(&path)?;
    fs::write(path.join("trip_point_0_type"), "passive\n")?;
    fs::write(path.join("trip_point_0_temp"), "80000\n")?;
    let zone = Zone(&path);
    zone.set(40)?;
    let config = "[model]\nthreads = 2\nslots = 1\nn_ctx = 512\n[metrics]\ninterval_s = 1\n";
    let Some(mut device) = device(&model::smollm2()?, folder.path(), "/sys/class", config)? else {
        return Ok(());
    };
    let broker = Broker::forgetful()?;
    device.restart(&broker)?;
    let metrics = device.topic("metrics");
    let client = Client::connect(broker.port(), "client", &[&device.topic("res/#"), &metrics])?;
    let reach = |degrees: i64, step: &str| -> Result<()> {
        zone.set(degrees)?;
        client.wait(PATIENCE, step, |seen| {
            let said = seen.json(&metrics);
            said["thermal"] == step && said["temperature_c"].as_f64() == Some(degrees as f64)
        })
    };

    let works_with_both = |id: &str| -> Result<()> {
        reach(40, "cool")?;
        let (each, took) = answer(&device, &client, id)?;
        println!("cool: {each:.2?} s in {took:.2} s");
        ensure!(
            each[1] > each[0] / 2.0,
            "{id}: cool, and the second thread waits: {each:?}"
        );
        Ok(())
    };

    works_with_both("cool")?;

    reach(76, "fewer_threads")?;
    let (each, took) = answer(&device, &client, "fewer")?;
    println!("fewer_threads: {each:.2?} s in {took:.2} s");
    ensure!(each[1] < each[0] / 5.0, "hot, and two threads compute: {each:?}");

    reach(81, "slower")?;
    let (each, took) = answer(&device, &client, "slower")?;
    println!("slower: {each:.2?} s in {took:.2} s");
    let sum: f64 = each.iter().sum();
    ensure!(sum < took * 0.65, "no rest: {sum} s of {took} s");

    // What is under way is finished, and nothing more is taken.
    client.ask(
        "long",
        device.request("long", "Tell me a story about a lake.", 200),
    );
    client.wait(PATIENCE, "it is accepted", |seen| {
        seen.json(&metrics)["accepted"] == 4
    })?;
    reach(86, "refuse")?;
    client.ask("refused", device.request("refused", "And one about a wood.", 8));
    client.wait_answered(PATIENCE)?;
    let of = |id: &str| client.see(|seen| serde_json::from_slice::<Value>(&seen.answers[id][0].payload));
    ensure!(
        of("refused")?["error"]["code"] == "queue_full",
        "{}",
        of("refused")?
    );
    ensure!(
        of("long")?["usage"]["completion_tokens"].is_u64(),
        "{}",
        of("long")?
    );

    works_with_both("again")
}

/// CPUs that a process may use.
fn allowed(id: &str) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    Ok(line.context("no Cpus_allowed_list")?.trim().to_owned())
}

#[test]
fn the_fast_cores_compute() -> Result<()> {
    // Of "0-3" or "0,2" the last is the one that is fast.
    let all = allowed("self")?;
    let last = all.rsplit(['-', ',']).next().unwrap_or_default().to_owned();
    if last == all {
        eprintln!("not looked at: there is one CPU only");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    for cpu in 0..=last.parse::<u32>()? {
        let path = folder.path().join(format!("cpu{cpu}"));
        fs::create_dir_all(path.join("topology"))?;
        fs::write(path.join("topology/thread_siblings_list"), format!("{cpu}\n"))?;
        let capacity = if cpu.to_string() == last { 1024 } else { 400 };
        fs::write(path.join("cpu_capacity"), format!("{capacity}\n"))?;
    }
    let tiny = Tiny::make()?;
    let Some(mut device) = device(&tiny.path(), folder.path(), "/sys/devices/system/cpu", "")? else {
        return Ok(());
    };
    let broker = Broker::forgetful()?;
    device.restart(&broker)?;
    let worker = device.worker()?.to_string();
    ensure!(
        allowed(&worker)? == last,
        "the worker may use {}",
        allowed(&worker)?
    );
    ensure!(
        allowed(&device.id()?.to_string())? == all,
        "the daemon itself waits on any core"
    );

    // Who says how many threads it takes has them on all cores.
    let count = last.parse::<u32>()? + 1;
    device.stop()?;
    device.configure(&format!("[model]\nthreads = {count}\n"));
    device.restart(&broker)?;
    let worker = device.worker()?.to_string();
    ensure!(
        allowed(&worker)? == all,
        "the worker may use {}",
        allowed(&worker)?
    );
    Ok(())
}
