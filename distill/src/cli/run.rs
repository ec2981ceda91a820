//! The folder of a run, which appears whole when the run is done.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::Context as _;
use pipit_convert::output::OutputDir;
use serde::Serialize;

use super::options::SftConfig;

/// Refuses a folder that exists: it may be the work of hours.
pub(super) fn refuse_existing(path: &Path) -> anyhow::Result<()> {
    if path.exists() {
        anyhow::bail!(
            "{} exists already\nhint: name another folder with -o, or remove it first",
            path.display()
        );
    }
    Ok(())
}

/// A run's folder while it is being made: `config.resolved.toml`, `metrics.jsonl`, `samples.jsonl`,
/// `summary.json` and the result.
#[derive(Debug)]
pub(super) struct RunDir {
    dir: OutputDir,
    metrics: File,
}

impl RunDir {
    /// Starts the folder, which must not exist.
    pub(super) fn create(path: &Path, config: &SftConfig) -> anyhow::Result<Self> {
        refuse_existing(path)?;
        let cannot = || format!("cannot make {}", path.display());
        let dir = OutputDir::create(path).with_context(cannot)?;
        let text = toml::to_string(&config.resolved().with_context(cannot)?).with_context(cannot)?;
        std::fs::write(dir.path().join("config.resolved.toml"), text).with_context(cannot)?;
        let metrics = File::create(dir.path().join("metrics.jsonl")).with_context(cannot)?;
        Ok(Self { dir, metrics })
    }

    /// Where the files are written until [`RunDir::commit`].
    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Appends a line to `metrics.jsonl`.
    pub(super) fn metrics(&mut self, value: &impl Serialize) -> io::Result<()> {
        write_line(&mut self.metrics, value)
    }

    /// Writes `samples.jsonl`.
    pub(super) fn samples(&self, answers: &[impl Serialize]) -> io::Result<()> {
        let mut file = File::create(self.path().join("samples.jsonl"))?;
        answers
            .iter()
            .try_for_each(|answer| write_line(&mut file, answer))
    }

    /// Writes `summary.json`.
    pub(super) fn summary(&self, summary: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(summary)?;
        text.push('\n');
        std::fs::write(self.path().join("summary.json"), text)
    }

    /// Gives the folder its name.
    pub(super) fn commit(self) -> io::Result<()> {
        drop(self.metrics);
        self.dir.commit()
    }
}

fn write_line(file: &mut File, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    file.write_all(&line)
}
