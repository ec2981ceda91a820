//! What a report says of distillations: how far students are from their teachers, as they were trained and as the GGUF
//! files that they become, and what they are worth as draft models.

use serde_json::Value;

use super::html::table;
use super::{Run, head, mebibytes, number, row};

/// The figures of an evaluation: the key, and what it is called.
const FIGURES: [(&str, &str); 6] = [
    ("forward_kl", "KL(teacher‖student), nats a token"),
    ("reverse_kl", "KL(student‖teacher), nats a token"),
    ("acceptance_rate", "1 − TV: accepted as a draft of the teacher"),
    ("top1_agreement", "the same most probable token"),
    ("cross_entropy", "cross-entropy of the answers, nats a token"),
    ("teacher_cross_entropy", "the same of the teacher"),
];

/// The table; nothing where no run is a distillation.
pub(super) fn distillation(runs: &[Run]) -> String {
    let config = |run: &Run, key: &str| {
        let value = run.config.get(key)?;
        Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    };
    if runs.iter().all(|run| config(run, "on_policy_fraction").is_none()) {
        return String::new();
    }
    let summary =
        |run: &Run, part: &str, key: &str| -> Option<f64> { run.summary.as_ref()?[part][key].as_f64() };
    let last = |run: &Run, key: &str| {
        let lines = run.metrics.iter().filter(|line: &&Value| line["kind"] == "eval");
        lines.filter_map(|line| line[key].as_f64()).next_back()
    };
    let mut rows = vec![
        row("teacher", runs, |run| {
            config(run, "teacher").or_else(|| config(run, "teachers"))
        }),
        row("loss", runs, |run| config(run, "loss")),
        row("on-policy fraction", runs, |run| {
            config(run, "on_policy_fraction")
        }),
        row("through", runs, |run| config(run, "through")),
    ];
    for (key, name) in FIGURES {
        rows.push(row(name, runs, |run| last(run, key).map(number)));
    }
    rows.push(row("GGUF file", runs, |run| {
        let gguf = &run.summary.as_ref()?["gguf"];
        let bytes = mebibytes(gguf["bytes"].as_u64()?);
        Some(format!("{}, {bytes}", gguf["type"].as_str()?))
    }));
    for (key, name) in FIGURES {
        let what = name.split(',').next().unwrap_or(name);
        let name = format!("{what} of the GGUF file");
        rows.push(row(&name, runs, |run| summary(run, "gguf", key).map(number)));
    }
    let whole = |run: &Run, key: &str| summary(run, "draft", key).map(|value| format!("{value:.0}"));
    rows.push(row("draft: time of a token, of the teacher's", runs, |run| {
        summary(run, "draft", "cost").map(number)
    }));
    rows.push(row("draft: tokens at a time", runs, |run| {
        whole(run, "draft_tokens")
    }));
    rows.push(row("draft: expected speed-up of the teacher", runs, |run| {
        summary(run, "draft", "speed_up").map(number)
    }));
    rows.retain(|row| row.iter().skip(1).any(|value| value != "–"));
    format!(
        "<h2>Distillation</h2>\n<p>On the evaluation data, at temperature 1.</p>\n{}",
        table(&head(runs), &rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_was_measured_stands_side_by_side_and_nothing_else() {
        let run = |name: &str, kl: f64, summary: Value| Run {
            name: name.into(),
            config: toml::from_str("on_policy_fraction = 1.0\nteacher = 'large'").unwrap(),
            metrics: vec![json!({"kind": "eval", "step": 5, "forward_kl": kl})],
            summary: Some(summary),
            ..Run::default()
        };
        let measured = json!({"gguf": {"type": "Q4_0", "bytes": 2 << 20, "forward_kl": 0.25},
            "draft": {"cost": 0.25, "draft_tokens": 3, "speed_up": 1.5}});
        let page = distillation(&[run("a", 0.125, measured), run("b", 0.5, json!({}))]);
        for text in [
            "<td>0.1250</td><td>0.5000</td>",
            "<td>KL(teacher‖student) of the GGUF file</td><td>0.2500</td><td>–</td>",
            "<td>Q4_0, 2 MiB</td><td>–</td>",
            "speed-up of the teacher</td><td>1.500</td>",
        ] {
            assert!(page.contains(text), "{text}: {page}");
        }
        assert!(!page.contains("KL(student‖teacher)"));
        assert_eq!(distillation(&[Run::default()]), "");
    }
}
