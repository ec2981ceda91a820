//! `GET /metrics`: the figures of the metrics topic, in Prometheus' text format.
//!
//! Source: Prometheus, "Exposition formats", version 0.0.4; its advice on names and units.

use std::fmt::Write as _;

use crate::daemon::service::door::View;
use crate::wire::{Metrics, State};

/// The format's name.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All figures. What this board has no sensor for is absent.
pub(super) fn text(view: &View) -> String {
    // Every field by name: one that is added does not compile until it is here.
    let Metrics {
        uptime_s,
        waiting,
        running,
        accepted,
        answered,
        errors,
        duplicates,
        prompt_tokens,
        cached_tokens,
        completion_tokens,
        tokens_per_second,
        worker_ends,
        journal_bytes,
        daemon_resident_bytes,
        worker_resident_bytes,
        temperature_c,
        thermal,
        power_w,
        energy_j,
        joules_per_token,
    } = &view.metrics;
    let mut page = Page(String::new());
    let (model, card) = (&view.card.model, &view.card);
    let labels = [
        ("device", card.device.as_str()),
        ("version", &card.versions.pipit),
        ("model", &model.name),
        ("sha256", &model.sha256),
    ];
    page.family("pipit_info", "gauge", "What answers.");
    page.sample("pipit_info", &labels, 1.0);
    page.family("pipit_state", "gauge", "1 for the state that the device is in.");
    for (state, name) in [
        (State::Online, "online"),
        (State::Loading, "loading"),
        (State::Ready, "ready"),
        (State::Degraded, "degraded"),
    ] {
        let value = f64::from(u8::from(view.status.state == state));
        page.sample("pipit_state", &[("state", name)], value);
    }
    for (name, help, value) in [
        ("requests_accepted", "Requests taken.", accepted),
        ("answers", "Answers that are no errors.", answered),
        ("errors", "Answers that are errors.", errors),
        ("duplicates", "Requests that came again.", duplicates),
        ("prompt_tokens", "Tokens of prompts.", prompt_tokens),
        (
            "cached_tokens",
            "Tokens of prompts that were computed before.",
            cached_tokens,
        ),
        ("completion_tokens", "Tokens generated.", completion_tokens),
        ("worker_ends", "Workers that ended by themselves.", worker_ends),
    ] {
        page.single(&format!("pipit_{name}_total"), "counter", help, *value as f64);
    }
    for (name, help, value) in [
        (
            "uptime_seconds",
            "Since the daemon began.",
            Some(*uptime_s as f64),
        ),
        ("requests_waiting", "Requests that wait.", Some(*waiting as f64)),
        (
            "requests_running",
            "Requests that the worker has.",
            Some(*running as f64),
        ),
        (
            "tokens_per_second",
            "Decode speed of the last answer.",
            Some(*tokens_per_second),
        ),
        (
            "journal_bytes",
            "Size of the journal.",
            Some(*journal_bytes as f64),
        ),
        ("temperature_celsius", "The hottest thermal zone.", *temperature_c),
        ("power_watts", "What the board draws.", *power_w),
        (
            "joules_per_token",
            "Joules for each token generated since the start.",
            *joules_per_token,
        ),
    ] {
        if let Some(value) = value {
            page.single(&format!("pipit_{name}"), "gauge", help, value);
        }
    }
    if let Some(joules) = *energy_j {
        let help = "What the board drew since the start.";
        page.single("pipit_energy_joules_total", "counter", help, joules);
    }
    page.family(
        "pipit_resident_bytes",
        "gauge",
        "Resident memory; the worker's with the mapped model.",
    );
    for (process, bytes) in [
        ("daemon", daemon_resident_bytes),
        ("worker", worker_resident_bytes),
    ] {
        if let Some(bytes) = bytes {
            page.sample("pipit_resident_bytes", &[("process", process)], *bytes as f64);
        }
    }
    if let Some(step) = thermal {
        let step = serde_json::to_value(step).unwrap_or_default();
        page.family(
            "pipit_thermal",
            "gauge",
            "What is done against heat: 1 for the step that is taken.",
        );
        page.sample(
            "pipit_thermal",
            &[("step", step.as_str().unwrap_or_default())],
            1.0,
        );
    }
    page.0
}

struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Into a string: this cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let escaped = |text: &str| {
            text.replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n")
        };
        let labels: Vec<String> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
            .collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::health;
    use crate::reply::Author;

    #[test]
    fn what_is_measured_is_there_and_what_is_not_is_not() {
        let mut author = Author::default();
        author.model.name = "a \"model\"\n".to_owned();
        let config = Config {
            device: "porch".to_owned(),
            ..Config::default()
        };
        let mut view = View {
            status: health::status("porch", State::Ready, None),
            card: health::card(&config, &author, None, None),
            metrics: Metrics {
                accepted: 7,
                tokens_per_second: 12.5,
                ..Metrics::default()
            },
        };
        let page = text(&view);
        for line in [
            "pipit_requests_accepted_total 7",
            "pipit_tokens_per_second 12.5",
            "# TYPE pipit_answers_total counter",
            "pipit_state{state=\"ready\"} 1",
            "pipit_state{state=\"degraded\"} 0",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}: {page}");
        }
        assert!(
            page.contains(r#"device="porch""#) && page.contains(r#"model="a \"model\"\n""#),
            "{page}"
        );
        assert!(
            !page.contains("watts") && !page.contains("joules") && !page.contains("celsius"),
            "{page}"
        );
        view.metrics.power_w = Some(2.5);
        view.metrics.energy_j = Some(40.5);
        let page = text(&view);
        assert!(
            page.contains("\npipit_power_watts 2.5\n") && page.contains("\npipit_energy_joules_total 40.5\n")
        );
    }
}
