//! What a run's folder says: the files that a report is made of.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::data::DataReport;

/// Why no report can be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The folder is none of a run.
    #[error("{path} has no metrics.jsonl\nhint: name the folder that `pipit-distill sft -o` made")]
    NoRun {
        /// The folder.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what a run writes.
    #[error("{path}, line {line}: {why}")]
    Broken {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
}

/// A run as its folder tells it. What is not there yet is empty.
#[derive(Debug, Clone, Default)]
pub struct Run {
    /// The folder's name.
    pub name: String,
    /// `config.resolved.toml`.
    pub config: toml::Table,
    /// `plan.json`: what was known before the training.
    pub plan: Value,
    /// `metrics.jsonl`, where `kind` is `train` or `eval`.
    pub metrics: Vec<Value>,
    /// `samples.jsonl`.
    pub samples: Vec<Value>,
    /// `summary.json`, when the run is done.
    pub summary: Option<Value>,
}

impl Run {
    /// Reads the folder of a run, which may still be training.
    pub fn read(dir: &Path) -> Result<Self, ReportError> {
        let metrics = dir.join("metrics.jsonl");
        if !metrics.is_file() {
            return Err(ReportError::NoRun {
                path: dir.to_path_buf(),
            });
        }
        let name = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        let name = name
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let config = dir.join("config.resolved.toml");
        let config = match text(&config)? {
            Some(text) => toml::from_str(&text).map_err(|e| broken(&config, 1, &e))?,
            None => toml::Table::new(),
        };
        Ok(Self {
            name,
            config,
            plan: object(&dir.join("plan.json"))?.unwrap_or_default(),
            metrics: lines(&metrics)?,
            samples: lines(&dir.join("samples.jsonl"))?,
            summary: object(&dir.join("summary.json"))?,
        })
    }

    /// The plan's `data` or `eval_data`; an empty report where there is none.
    pub(super) fn report(&self, key: &str) -> DataReport {
        serde_json::from_value(self.plan[key].clone()).unwrap_or_default()
    }
}

fn broken(path: &Path, line: usize, why: &impl ToString) -> ReportError {
    ReportError::Broken {
        path: path.to_path_buf(),
        line,
        why: why.to_string(),
    }
}

/// The text of a file; none where there is no such file.
fn text(path: &Path) -> Result<Option<String>, ReportError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ReportError::Read {
            path: path.to_path_buf(),
            source,
        }),
    }
}

fn object(path: &Path) -> Result<Option<Value>, ReportError> {
    let Some(text) = text(path)? else {
        return Ok(None);
    };
    let object: Map<String, Value> = serde_json::from_str(&text).map_err(|e| broken(path, e.line(), &e))?;
    Ok(Some(object.into()))
}

/// The JSON lines of a file. The last one may be half written, by a run that goes on or was cut off: it is left out.
fn lines(path: &Path) -> Result<Vec<Value>, ReportError> {
    let Some(text) = text(path)? else {
        return Ok(Vec::new());
    };
    let mut out = Vec::new();
    for (i, line) in text.split_inclusive('\n').enumerate() {
        match serde_json::from_str::<Map<String, Value>>(line) {
            Ok(object) => out.push(object.into()),
            Err(_) if !line.ends_with('\n') || line.trim().is_empty() => {}
            Err(e) => return Err(broken(path, i + 1, &e)),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_still_writes_can_be_read_and_a_broken_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Run::read(dir.path()), Err(ReportError::NoRun { .. })));
        let metrics = dir.path().join("metrics.jsonl");
        std::fs::write(&metrics, "{\"kind\":\"train\",\"step\":1}\n{\"kind\":\"tr").unwrap();
        let run = Run::read(dir.path()).unwrap();
        assert_eq!((run.metrics.len(), run.summary.is_none()), (1, true));
        std::fs::write(&metrics, "{\"kind\":\"train\"}\n[1]\n{}\n").unwrap();
        let error = Run::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl, line 2"), "{error}");
    }
}
