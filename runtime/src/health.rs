//! Health: what the device says about itself, to the broker (status, card, metrics) and to systemd.
//!
//! In: counters and facts. Out: JSON payloads, and sd_notify messages when systemd started us. What cannot be
//! measured on this board is absent, never guessed.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::Config;
use crate::reply::Author;

/// State of the device, on the status topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Connected; no worker yet.
    Online,
    /// The worker loads the model.
    Loading,
    /// Requests are answered.
    Ready,
    /// No model can be loaded.
    Degraded,
    /// Gone; also the will.
    Offline,
}

/// Payload of the status topic.
pub fn status(device: &str, state: State, reason: Option<&str>) -> Vec<u8> {
    let mut status = json!({ "state": state, "device": device, "version": env!("CARGO_PKG_VERSION") });
    if let Some(reason) = reason {
        status["reason"] = Value::from(reason);
    }
    status.to_string().into_bytes()
}

/// Payload of the card: what this device is and serves.
pub fn card(config: &Config, author: &Author) -> Vec<u8> {
    let model = &author.model;
    let mut board = json!({ "arch": std::env::consts::ARCH, "os": std::env::consts::OS });
    if let Ok(name) = std::fs::read_to_string("/proc/device-tree/model") {
        board["name"] = Value::from(name.trim_end_matches('\0'));
    }
    if let Ok(threads) = std::thread::available_parallelism() {
        board["cpus"] = Value::from(threads.get());
    }
    if let Some(kib) = proc_kib("/proc/meminfo", "MemTotal:") {
        board["memory_bytes"] = Value::from(kib * 1024);
    }
    json!({
        "wire": 1,
        "device": config.device,
        "versions": { "pipit": env!("CARGO_PKG_VERSION") },
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "quantisation": model.quantisation,
            "sha256": author.sha256,
            "bytes": model.bytes,
            "parameters": model.parameters,
            "context": model.context,
            "context_trained": model.context_trained,
            "chat_template": model.chat_template,
        },
        "adapters": model.adapters,
        "slots": model.slots,
        "limits": config.limits,
        "reply_prefixes": config.reply.prefixes,
        "board": board,
    })
    .to_string()
    .into_bytes()
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
}

/// Payload of the metrics topic.
pub fn metrics(
    counters: &Counters,
    started: Instant,
    waiting: usize,
    running: usize,
    journal_bytes: u64,
    worker: Option<u32>,
) -> Vec<u8> {
    let mut metrics = json!({
        "uptime_s": started.elapsed().as_secs(),
        "waiting": waiting,
        "running": running,
        "accepted": counters.accepted,
        "answered": counters.answered,
        "errors": counters.errors,
        "duplicates": counters.duplicates,
        "prompt_tokens": counters.prompt_tokens,
        "cached_tokens": counters.cached_tokens,
        "completion_tokens": counters.completion_tokens,
        "tokens_per_second": (counters.tokens_per_second * 100.0).round() / 100.0,
        "worker_ends": counters.worker_ends,
        "journal_bytes": journal_bytes,
    });
    if let Some(kib) = proc_kib("/proc/self/status", "VmRSS:") {
        metrics["daemon_resident_bytes"] = Value::from(kib * 1024);
    }
    if let Some(kib) = worker.and_then(|pid| proc_kib(&format!("/proc/{pid}/status"), "VmRSS:")) {
        metrics["worker_resident_bytes"] = Value::from(kib * 1024);
    }
    if let Some(millidegrees) = hottest() {
        metrics["temperature_c"] = Value::from(millidegrees as f64 / 1000.0);
    }
    metrics.to_string().into_bytes()
}

/// A number of KiB behind a label in a file of /proc.
fn proc_kib(file: &str, label: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(label))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The hottest thermal zone, in thousandths of a degree Celsius.
fn hottest() -> Option<i64> {
    (0..16)
        .filter_map(|zone| {
            std::fs::read_to_string(format!("/sys/class/thermal/thermal_zone{zone}/temp")).ok()
        })
        .filter_map(|text| text.trim().parse().ok())
        .max()
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
    fn payloads_are_json() {
        let status: Value = serde_json::from_slice(&status("d", State::Degraded, Some("why"))).unwrap();
        assert_eq!(
            (status["state"].as_str(), status["reason"].as_str()),
            (Some("degraded"), Some("why"))
        );
        let card: Value = serde_json::from_slice(&card(&Config::default(), &Author::default())).unwrap();
        assert_eq!(card["limits"]["queue"], 1024);
        let payload = metrics(
            &Counters::default(),
            Instant::now(),
            1,
            2,
            3,
            Some(std::process::id()),
        );
        let metrics: Value = serde_json::from_slice(&payload).unwrap();
        assert_eq!(metrics["waiting"], 1);
        assert!(metrics["worker_resident_bytes"].as_u64().unwrap() > 1000);
    }
}
