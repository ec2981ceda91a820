//! A thousand prompts through random faults: a thousand final answers, none missing, no id with two that differ.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::Broker;
use pipit_tests::client::Client;
use pipit_tests::device::{Device, Options};
use pipit_tests::model::Tiny;
use pipit_tests::process;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

const PROMPTS: usize = 1000;
const ROUNDS: usize = 40;
/// For the answers that are still missing, after the longest absence of any of them.
const LIMIT: Duration = Duration::from_secs(30);
const CONFIG: &str = "[model]\nthreads = 1\n[broker]\nkeep_alive_s = 5\n[sampling]\ntemperature = 1.0\n";
const FAULTS: [&str; 7] = [
    "worker killed",
    "daemon killed",
    "broker killed",
    "daemon and broker killed",
    "worker stands still",
    "daemon stands still",
    "broker stands still",
];

struct World {
    broker: Broker,
    device: Device,
    random: ChaCha8Rng,
}

impl World {
    fn below(&mut self, most: u64) -> u64 {
        self.random.next_u64() % most
    }

    /// For as long as a process stands still, the time itself is the fault.
    fn stand_still(&mut self, id: u32) -> Result<()> {
        process::signal("STOP", id)?;
        std::thread::sleep(Duration::from_millis(50 + self.below(300)));
        process::signal("CONT", id)
    }

    fn strike(&mut self, fault: &str) -> Result<()> {
        match fault {
            "worker killed" => {
                // It may just be starting.
                if let Ok(worker) = self.device.worker() {
                    process::signal("KILL", worker).ok();
                }
            }
            "daemon killed" => {
                self.device.kill()?;
                self.device.launch(&self.broker.url(), None)?;
            }
            "broker killed" => {
                self.broker.kill()?;
                self.broker.restart()?;
            }
            "daemon and broker killed" => {
                self.device.kill()?;
                self.broker.kill()?;
                self.device.launch(&self.broker.url(), None)?;
                self.broker.restart()?;
            }
            "worker stands still" => {
                if let Ok(worker) = self.device.worker() {
                    self.stand_still(worker).ok();
                }
            }
            "daemon stands still" => self.stand_still(self.device.id()?)?,
            _ => {
                self.broker.pause()?;
                std::thread::sleep(Duration::from_millis(50 + self.below(300)));
                self.broker.resume()?;
            }
        }
        Ok(())
    }
}

fn a_thousand_prompts(broker: Broker, seed: u64) -> Result<()> {
    let model = Tiny::make()?;
    let options = Options {
        config: CONFIG.to_owned(),
        ..Options::default()
    };
    let mut device = Device::new("chaos", &model.path(), options)?;
    let client = Client::connect(broker.port(), "client", &[&device.topic("res/#")])?;
    device.restart(&broker)?;
    let mut world = World {
        broker,
        device,
        random: ChaCha8Rng::seed_from_u64(seed),
    };
    let started = Instant::now();
    let each = PROMPTS / ROUNDS;
    let mut struck: BTreeMap<&str, usize> = BTreeMap::new();
    // Every fault at least five times, in an order of chance.
    let mut faults: Vec<&str> = FAULTS.into_iter().cycle().take(ROUNDS).collect();
    for at in (1..faults.len()).rev() {
        let other = world.below(at as u64 + 1) as usize;
        faults.swap(at, other);
    }
    for (round, fault) in faults.into_iter().enumerate() {
        for number in 0..each {
            let id = format!("c{}", round * each + number);
            client.ask(
                &id,
                world
                    .device
                    .request(&id, &format!("Prompt {id}."), 4 + number as u32),
            );
        }
        // In the middle of the work: some of this round's are answered, the others are somewhere on their way.
        let before = round * each + world.below(each as u64) as usize;
        client
            .wait(LIMIT, "answers before the next fault", |seen| {
                seen.answers.len() >= before
            })
            .with_context(|| {
                format!(
                    "round {round}, before: {fault}; {struck:?}\n{}",
                    world.device.said()
                )
            })?;
        world
            .strike(fault)
            .with_context(|| format!("round {round}: {fault}"))?;
        *struck.entry(fault).or_default() += 1;
    }
    client.wait_answered(LIMIT)?;
    client.ask("last", world.device.request("last", "Say goodbye.", 4));
    client.wait_answered(LIMIT)?;
    let again = client.check_promise()?;
    let (answered, errors, sessions) = client.see(|seen| {
        let all = seen.answers.values().flatten();
        (
            seen.answers.len(),
            all.filter(|answer| answer.error.is_some()).count(),
            seen.sessions,
        )
    });
    println!(
        "{answered} answered in {:.1} s, {again} of them came again, {errors} errors; the client connected {sessions} \
         times; {struck:?}",
        started.elapsed().as_secs_f64()
    );
    ensure!(answered == PROMPTS + 1, "{answered} answers");
    ensure!(errors == 0, "{errors} errors instead of answers");
    Ok(())
}

#[test]
fn a_thousand_prompts_through_faults_with_a_broker_that_forgets() -> Result<()> {
    a_thousand_prompts(Broker::forgetful()?, 1)
}

#[test]
fn a_thousand_prompts_through_faults_with_a_broker_that_remembers() -> Result<()> {
    a_thousand_prompts(Broker::persistent()?, 2)
}
