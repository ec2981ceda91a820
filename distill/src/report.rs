//! `report.html`: one file that shows runs without a network and without scripts.
//!
//! A report is made of the files in the run's folder and of nothing else, so it can be made while a run trains,
//! after it, and of several runs side by side.

mod chart;
mod files;
mod html;

use std::collections::BTreeSet;
use std::fmt::Write as _;

pub use chart::{Chart, Series};
pub use files::{ReportError, Run};
use html::{details, escape, table};
use serde_json::Value;

const STYLE: &str = include_str!("report/style.css");
/// Seconds after which a browser loads the report of a run again that is not done.
const RELOAD_SECONDS: u32 = 15;

/// The measures that a curve is drawn of: the key in `metrics.jsonl`, the title, the unit.
const CURVES: [(&str, &str, &str); 3] = [
    ("learning_rate", "Learning rate", ""),
    ("grad_norm", "Gradient norm, before clipping", ""),
    ("tokens_per_second", "Speed", "tokens/s"),
];

/// The page of one run, or of several to compare. Well-formed XML as well as HTML.
pub fn page(runs: &[Run]) -> String {
    let title = match runs {
        [run] => run.name.clone(),
        runs => format!("{} runs", runs.len()),
    };
    let mut out = String::from("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n");
    out += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n";
    if runs.iter().any(|run| run.summary.is_none()) {
        let _ = writeln!(out, "<meta http-equiv=\"refresh\" content=\"{RELOAD_SECONDS}\"/>");
    }
    let _ = writeln!(out, "<title>{}</title>", escape(&title));
    let _ = writeln!(
        out,
        "<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{}</h1>",
        escape(&title)
    );
    out += &figures(runs);
    out += &curves(runs);
    for run in runs {
        out += &samples(run, runs.len() > 1);
    }
    out += &data(runs);
    out += &plan(runs);
    out += &configuration(runs);
    out += "<footer>pipit-distill ";
    out += env!("CARGO_PKG_VERSION");
    out += ". This file needs no network.</footer>\n</body>\n</html>\n";
    out
}

/// The names of the runs as the head of a table, after an empty corner.
fn head(runs: &[Run]) -> Vec<String> {
    let names = runs.iter().map(|run| run.name.clone());
    std::iter::once(String::new()).chain(names).collect()
}

/// A row of a table: a name, then what every run has to say.
fn row(name: &str, runs: &[Run], value: impl Fn(&Run) -> Option<String>) -> Vec<String> {
    let values = runs.iter().map(|run| value(run).unwrap_or_else(|| "–".into()));
    std::iter::once(name.to_owned()).chain(values).collect()
}

fn figures(runs: &[Run]) -> String {
    let last = |run: &Run, kind: &str, key: &str| {
        let lines = run.metrics.iter().filter(|line| line["kind"] == kind);
        lines.filter_map(|line| line[key].as_f64()).next_back()
    };
    let state = |run: &Run| match (&run.summary, run.plan["steps"].as_u64()) {
        (Some(_), _) => "done".to_owned(),
        (None, Some(steps)) => {
            format!("step {} of {steps}", last(run, "train", "step").unwrap_or(0.0))
        }
        (None, None) => "not done".to_owned(),
    };
    let best = |run: &Run| {
        let lines = run.metrics.iter().filter(|line| line["kind"] == "eval");
        let losses = lines.filter_map(|line| Some((line["eval_loss"].as_f64()?, line["step"].as_u64()?)));
        let (loss, step) = losses.min_by(|a, b| a.0.total_cmp(&b.0))?;
        Some(format!("{} (step {step})", number(loss)))
    };
    let peak = |run: &Run| run.summary.as_ref()?["peak_memory_bytes"].as_u64();
    let text = |run: &Run, key: &str| run.plan[key].as_str().map(str::to_owned);
    let rows = [
        row("state", runs, |run| Some(state(run))),
        row("model", runs, |run| text(run, "model")),
        row("method", runs, |run| text(run, "method")),
        row("loss", runs, |run| last(run, "train", "loss").map(number)),
        row("evaluation loss", runs, |run| {
            last(run, "eval", "eval_loss").map(number)
        }),
        row("best evaluation loss", runs, best),
        row("tokens", runs, |run| last(run, "train", "tokens").map(thousands)),
        row("time of training", runs, |run| {
            last(run, "train", "seconds").map(duration)
        }),
        row("tokens/s", runs, |run| {
            let tokens = last(run, "train", "tokens")?;
            Some(thousands(tokens / last(run, "train", "seconds")?))
        }),
        row("peak memory", runs, |run| peak(run).map(mebibytes)),
    ];
    table(&head(runs), &rows)
}

fn curves(runs: &[Run]) -> String {
    let points = |run: &Run, kind: &str, key: &str| -> Vec<(f64, f64)> {
        let lines = run.metrics.iter().filter(|line| line["kind"] == kind);
        lines
            .filter_map(|line| Some((line["step"].as_f64()?, line[key].as_f64()?)))
            .collect()
    };
    let named = |run: &Run, what: &str| match runs {
        [_] => what.to_owned(),
        _ => format!("{}, {what}", run.name),
    };
    let mut loss = Vec::new();
    for (colour, run) in runs.iter().enumerate() {
        loss.push(Series {
            name: named(run, "training"),
            points: points(run, "train", "loss"),
            colour,
            dashed: false,
        });
        loss.push(Series {
            name: named(run, "evaluation"),
            points: points(run, "eval", "eval_loss"),
            colour,
            dashed: true,
        });
    }
    let mut charts = vec![("Loss", "nats a token", loss)];
    for (key, title, unit) in CURVES {
        let series = runs.iter().enumerate().map(|(colour, run)| Series {
            name: run.name.clone(),
            points: points(run, "train", key),
            colour,
            dashed: false,
        });
        charts.push((title, unit, series.collect()));
    }
    let mut out = String::from("<div class=\"charts\">\n");
    for (title, unit, series) in charts {
        let chart = Chart {
            title,
            unit,
            legend: series.iter().filter(|series| !series.points.is_empty()).count() > 1,
            series: &series,
        };
        out += &chart.figure();
    }
    out + "</div>\n"
}

/// The answers to held-out rows: those of the last evaluation at once, earlier ones behind a click.
fn samples(run: &Run, with_name: bool) -> String {
    let steps: BTreeSet<u64> = run
        .samples
        .iter()
        .filter_map(|line| line["step"].as_u64())
        .collect();
    let Some(newest) = steps.last() else {
        return String::new();
    };
    let text = |line: &Value, key: &str| line[key].as_str().unwrap_or_default().to_owned();
    let of_step = |step: u64| {
        let lines = run.samples.iter().filter(|line| line["step"] == step);
        let rows: Vec<Vec<String>> = lines
            .map(|line| {
                let mark = if line["exact"] == true { "✓" } else { "" };
                vec![
                    text(line, "question"),
                    text(line, "expected"),
                    text(line, "answer"),
                    mark.to_owned(),
                ]
            })
            .collect();
        table(
            &["question", "expected", "answer", "right"].map(str::to_owned),
            &rows,
        )
    };
    let of = if with_name {
        format!(" of {}", run.name)
    } else {
        String::new()
    };
    let mut out = format!("<h2>Answers{} at step {newest}</h2>\n", escape(&of));
    out += &of_step(*newest);
    for step in steps.iter().rev().skip(1) {
        out += &details(&format!("Answers{of} at step {step}"), &of_step(*step));
    }
    out
}

fn data(runs: &[Run]) -> String {
    let mut out = String::from("<h2>Data</h2>\n");
    for (what, file, sums) in [
        ("data", "data_file", "training"),
        ("eval_data", "eval_file", "evaluation"),
    ] {
        if runs.iter().all(|run| !run.plan[what].is_object()) {
            continue;
        }
        let count = |run: &Run, key: &str| run.plan[what][key].as_f64().map(thousands);
        let mut rows = vec![row(&format!("{sums} data"), runs, |run| {
            run.plan[file]["path"].as_str().map(str::to_owned)
        })];
        rows.push(row("sha256", runs, |run| {
            run.plan[file]["sha256"].as_str().map(str::to_owned)
        }));
        for (key, name) in [
            ("rows", "rows read"),
            ("used", "rows used"),
            ("beyond_limit", "rows not asked for"),
            ("tokens", "tokens"),
            ("trained_tokens", "tokens trained on"),
            ("longest", "tokens of the longest row"),
        ] {
            rows.push(row(name, runs, |run| count(run, key)));
        }
        out += &table(&head(runs), &rows);
        for run in runs {
            for (what, count, lines) in run.report(what).findings() {
                let summary = format!("{}: {what}: {count}", run.name);
                out += &details(&summary, &format!("<p>{}</p>\n", escape(&lines.join("; "))));
            }
        }
    }
    out
}

fn plan(runs: &[Run]) -> String {
    if runs.iter().all(|run| !run.plan["memory"].is_object()) {
        return String::new();
    }
    let mut keys: Vec<&String> = Vec::new();
    let memory = runs.iter().filter_map(|run| run.plan["memory"].as_object());
    for key in memory.flat_map(|memory| memory.keys()) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let rows: Vec<_> = keys
        .into_iter()
        .map(|key| {
            let name = key.trim_end_matches("_bytes").replace('_', " ");
            row(&name, runs, |run| run.plan["memory"][key].as_u64().map(mebibytes))
        })
        .collect();
    format!("<h2>Memory, as planned</h2>\n{}", table(&head(runs), &rows))
}

/// All settings; those that differ between runs come first.
fn configuration(runs: &[Run]) -> String {
    let keys: BTreeSet<&String> = runs.iter().flat_map(|run| run.config.keys()).collect();
    let value = |run: &Run, key: &str| run.config.get(key).map(ToString::to_string);
    let differs = |key: &&String| {
        runs.windows(2)
            .any(|pair| value(&pair[0], key) != value(&pair[1], key))
    };
    let rows = |keys: &[&String]| -> Vec<Vec<String>> {
        keys.iter()
            .map(|key| row(key, runs, |run| value(run, key)))
            .collect()
    };
    let (different, same): (Vec<_>, Vec<_>) = keys.into_iter().partition(differs);
    let mut out = String::from("<h2>Settings</h2>\n");
    if runs.len() > 1 {
        out += "<h3>That differ</h3>\n";
        out += &table(&head(runs), &rows(&different));
        return out + &details("Settings that are the same", &table(&head(runs), &rows(&same)));
    }
    out + &table(&head(runs), &rows(&same))
}

/// A number with four digits that count.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if size != 0.0 && !(1e-3..1e5).contains(&size) {
        return format!("{value:.3e}");
    }
    let whole = if size >= 1.0 {
        size.log10().floor() as usize + 1
    } else {
        0
    };
    format!("{value:.*}", 4usize.saturating_sub(whole))
}

/// A whole number with spaces between thousands.
pub fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    if value < 0.0 { format!("−{out}") } else { out }
}

/// Seconds as hours, minutes and seconds.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

/// Bytes in MiB.
pub fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", thousands(bytes as f64 / f64::from(1 << 20)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        let shown = [0.0, 1.234_56, 123.456, 0.012_345, 2e-4, 123_456.0].map(number);
        assert_eq!(
            shown,
            ["0.0000", "1.235", "123.5", "0.0123", "2.000e-4", "1.235e5"]
        );
        assert_eq!(thousands(1_234_567.0), "1\u{202f}234\u{202f}567");
        assert_eq!(thousands(12.0), "12");
        assert_eq!(
            [59.6, 3599.0, 7384.0].map(duration),
            ["1 min 0 s", "59 min 59 s", "2 h 3 min"]
        );
        assert_eq!(mebibytes(3 << 20), "3 MiB");
    }
}
