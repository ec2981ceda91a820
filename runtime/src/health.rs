//! Health: what the device says about itself, to the broker (status, card, metrics) and to systemd.
//!
//! In: counters and facts. Out: JSON payloads, and sd_notify messages when systemd started us. What cannot be
//! measured on this board is absent, never guessed.

use std::path::Path;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

use crate::config::Config;
use crate::reply::Author;
use crate::thermal::{self, Step};
pub use crate::wire::State;
use crate::wire::device::{Board, ModelCard, Versions};
use crate::wire::{Card, Metrics, Status};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the device is doing.
pub fn status(device: &str, state: State, reason: Option<&str>) -> Status {
    Status {
        state,
        device: device.to_owned(),
        version: VERSION.to_owned(),
        reason: reason.map(ToOwned::to_owned),
    }
}

/// What this device is and serves; `id` is the model's among the installed ones.
pub fn card(config: &Config, author: &Author, id: Option<&str>, energy_sensor: Option<&str>) -> Card {
    let model = &author.model;
    Card {
        wire: 1,
        device: config.device.clone(),
        versions: Versions {
            pipit: VERSION.to_owned(),
        },
        model: ModelCard {
            id: id.map(ToOwned::to_owned),
            name: model.name.clone(),
            architecture: model.architecture.clone(),
            quantisation: model.quantisation.clone(),
            sha256: author.sha256.clone(),
            bytes: model.bytes,
            parameters: model.parameters,
            context: model.context,
            context_trained: model.context_trained,
            chat_template: model.chat_template,
            slots: model.slots,
        },
        adapters: model.adapters.clone(),
        limits: config.limits.clone(),
        reply_prefixes: config.reply.prefixes.clone(),
        pool: config.pool.name.clone(),
        board: Board {
            energy_sensor: energy_sensor.map(ToOwned::to_owned),
            ..board()
        },
    }
}

fn board() -> Board {
    Board {
        arch: std::env::consts::ARCH.to_owned(),
        os: std::env::consts::OS.to_owned(),
        name: std::fs::read_to_string("/proc/device-tree/model")
            .ok()
            .map(|name| name.trim_end_matches('\0').to_owned()),
        cpus: std::thread::available_parallelism()
            .ok()
            .map(|threads| threads.get() as u64),
        memory_bytes: proc_kib("/proc/meminfo", "MemTotal:").map(|kib| kib * 1024),
        energy_sensor: None,
    }
}

/// Counters since the start.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Requests taken.
    pub accepted: u64,
    /// Answers that are no errors.
    pub answered: u64,
    /// Answers that are errors.
    pub errors: u64,
    /// Requests that came again.
    pub duplicates: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Those of them that were computed before, for another request.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Workers that ended by themselves.
    pub worker_ends: u64,
    /// Decode speed of the last answer.
    pub tokens_per_second: f64,
    /// What the board draws now.
    pub power_w: Option<f64>,
    /// What it drew since the start.
    pub energy_j: Option<f64>,
    /// What it drew for answers.
    pub answers_j: f64,
    /// Tokens generated in answers whose energy is known.
    pub answers_j_tokens: u64,
}

/// Counters, and what is measured now.
pub fn metrics(
    counters: &Counters,
    started: Instant,
    waiting: usize,
    running: usize,
    journal_bytes: u64,
    worker: Option<u32>,
    thermal: Option<Step>,
) -> Metrics {
    let resident = |file: &str| proc_kib(file, "VmRSS:").map(|kib| kib * 1024);
    Metrics {
        uptime_s: started.elapsed().as_secs(),
        waiting: waiting as u64,
        running: running as u64,
        accepted: counters.accepted,
        answered: counters.answered,
        errors: counters.errors,
        duplicates: counters.duplicates,
        prompt_tokens: counters.prompt_tokens,
        cached_tokens: counters.cached_tokens,
        completion_tokens: counters.completion_tokens,
        tokens_per_second: (counters.tokens_per_second * 100.0).round() / 100.0,
        worker_ends: counters.worker_ends,
        journal_bytes,
        daemon_resident_bytes: resident("/proc/self/status"),
        worker_resident_bytes: worker.and_then(|pid| resident(&format!("/proc/{pid}/status"))),
        temperature_c: thermal::hottest(Path::new("/")).map(|reading| reading.millidegrees as f64 / 1000.0),
        thermal,
        power_w: counters.power_w.map(round),
        energy_j: counters.energy_j.map(round),
        joules_per_token: (counters.answers_j_tokens > 0)
            .then(|| round(counters.answers_j / counters.answers_j_tokens as f64)),
    }
}

/// Millijoules and milliwatts are as fine as sensors are.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// The payload of a message that says one of them.
pub fn payload(value: &impl serde::Serialize) -> Vec<u8> {
    // Structs of strings and numbers: this cannot fail.
    serde_json::to_vec(value).unwrap_or_default()
}

/// A number of KiB behind a label in a file of /proc.
fn proc_kib(file: &str, label: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(label))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The most memory that a process ever had resident, in bytes.
pub fn peak_resident(process: u32) -> Option<u64> {
    proc_kib(&format!("/proc/{process}/status"), "VmHWM:").map(|kib| kib * 1024)
}

/// Speaks with systemd; silent when there is none.
#[derive(Debug)]
pub struct Systemd {
    /// Half of systemd's patience.
    interval: Option<Duration>,
    last: Instant,
}

impl Systemd {
    /// Looks whether systemd wants a watchdog fed.
    pub fn new() -> Self {
        Self {
            interval: sd_notify::watchdog_enabled().map(|patience| patience / 2),
            last: Instant::now(),
        }
    }

    /// The daemon takes requests.
    pub fn ready(&self) {
        tell(&[NotifyState::Ready]);
    }

    /// A line for `systemctl status`.
    pub fn status(&self, text: &str) {
        tell(&[NotifyState::Status(text)]);
    }

    /// The daemon ends.
    pub fn stopping(&self) {
        tell(&[NotifyState::Stopping]);
    }

    /// Feeds the watchdog when it is time; to be called at least once a second, while all is well.
    pub fn alive(&mut self) {
        if self
            .interval
            .is_some_and(|interval| self.last.elapsed() >= interval)
        {
            self.last = Instant::now();
            tell(&[NotifyState::Watchdog]);
        }
    }
}

impl Default for Systemd {
    fn default() -> Self {
        Self::new()
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("systemd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_the_wires_types() {
        let said = payload(&status("d", State::Degraded, Some("why")));
        let status: Status = serde_json::from_slice(&said).unwrap();
        assert_eq!(
            (status.state, status.reason.as_deref()),
            (State::Degraded, Some("why"))
        );
        let said = payload(&card(&Config::default(), &Author::default(), None, None));
        let card: Card = serde_json::from_slice(&said).unwrap();
        assert_eq!((card.wire, card.limits.queue), (1, 1024));
        assert!(card.board.memory_bytes.unwrap() > 1 << 20);
        let said = payload(&metrics(
            &Counters::default(),
            Instant::now(),
            1,
            2,
            3,
            Some(std::process::id()),
            Some(Step::Slower),
        ));
        let metrics: Metrics = serde_json::from_slice(&said).unwrap();
        assert_eq!(
            (metrics.waiting, metrics.running, metrics.journal_bytes),
            (1, 2, 3)
        );
        assert_eq!(metrics.thermal, Some(Step::Slower));
        assert!(metrics.worker_resident_bytes.unwrap() > 1_000_000);
    }
}
