//! What a run writes down while it trains: `plan.json`, `metrics.jsonl`, `samples.jsonl`, and `report.html` of them.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pipit_convert::output::write_file;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::evaluate::Answer;
use crate::plan::Plan;
use crate::report::{Run, page};
use crate::trainer::Metrics;

/// The report is not made anew more often than this.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// The growing files of a run's folder.
#[derive(Debug)]
pub(super) struct RunLog {
    dir: PathBuf,
    /// The run's name in the report.
    name: String,
    metrics: File,
    samples: File,
    reported: Option<Instant>,
}

impl RunLog {
    /// Starts the files, or goes on with them where a run is taken up again after `done` steps: what was written
    /// of later steps will be written again.
    pub(super) fn start(dir: &Path, name: &str, plan: &Plan, done: usize) -> io::Result<Self> {
        write_json(&dir.join("plan.json"), plan)?;
        Ok(Self {
            dir: dir.to_path_buf(),
            name: name.to_owned(),
            metrics: kept(&dir.join("metrics.jsonl"), done)?,
            samples: kept(&dir.join("samples.jsonl"), done)?,
            reported: None,
        })
    }

    /// The figures of the last steps.
    pub(super) fn metrics(&mut self, metrics: &Metrics) -> io::Result<()> {
        append(&mut self.metrics, ("kind", "train".into()), metrics)?;
        if self.reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
            self.report(None)?;
        }
        Ok(())
    }

    /// An evaluation: nats a token on held-out rows, and answers to some of them.
    pub(super) fn evaluation(&mut self, step: usize, loss: f64, answers: &[Answer]) -> io::Result<()> {
        let line = json!({"step": step, "eval_loss": loss, "eval_perplexity": loss.exp()});
        append(&mut self.metrics, ("kind", "eval".into()), &line)?;
        for answer in answers {
            append(&mut self.samples, ("step", step.into()), answer)?;
        }
        self.report(None)
    }

    /// Writes the last report, then `summary.json`: a folder that has one is whole.
    pub(super) fn finish(mut self, summary: &impl Serialize) -> io::Result<()> {
        let value = serde_json::to_value(summary)?;
        self.report(Some(value))?;
        self.metrics.sync_all()?;
        self.samples.sync_all()?;
        write_json(&self.dir.join("summary.json"), summary)
    }

    fn report(&mut self, summary: Option<Value>) -> io::Result<()> {
        let mut run = Run::read(&self.dir).map_err(io::Error::other)?;
        run.name.clone_from(&self.name);
        run.summary = summary;
        write_file(&self.dir.join("report.html"), page(&[run]).as_bytes())?;
        self.reported = Some(Instant::now());
        Ok(())
    }
}

/// A file of lines, without those of steps after `done`, to append to.
fn kept(path: &Path, done: usize) -> io::Result<File> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(e),
    };
    let is_kept = |line: &&str| {
        let value: Option<Value> = serde_json::from_str(line).ok();
        value.is_some_and(|value| value["step"].as_u64().is_some_and(|step| step <= done as u64))
    };
    let lines: String = text.split_inclusive('\n').filter(is_kept).collect();
    write_file(path, lines.as_bytes())?;
    File::options().append(true).open(path)
}

fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write_file(path, text.as_bytes())
}

/// Appends an object as a line, with one more key at its beginning.
fn append(file: &mut File, first: (&str, Value), object: &impl Serialize) -> io::Result<()> {
    let mut line: Map<String, Value> = Map::from_iter([(first.0.to_owned(), first.1)]);
    if let Value::Object(object) = serde_json::to_value(object)? {
        line.extend(object);
    }
    // One write: a reader never sees half a line of a run that goes on.
    file.write_all(format!("{}\n", Value::Object(line)).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_is_taken_up_again_writes_later_steps_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":10}\n{\"step\":20}\n{\"step\":30}\n{\"st").unwrap();
        let mut file = kept(&path, 20).unwrap();
        append(
            &mut file,
            ("kind", "train".into()),
            &json!({"step": 30, "loss": 1.5}),
        )
        .unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"step\":10}\n{\"step\":20}\n{\"kind\":\"train\",\"step\":30,\"loss\":1.5}\n"
        );
    }
}
