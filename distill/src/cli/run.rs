//! The folder of a run. It stands under its name from the start, with the checkpoints to go on from in it;
//! `summary.json` comes last, so that a folder that has one is whole.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use pipit_convert::output::{OutputDir, write_file};
use serde_json::json;

use super::Output;
use super::resume::Resume;
use crate::data::Sample;
use crate::trainer::{TrainError, checkpoint};

const CONFIG: &str = "config.resolved.toml";
const BAD_BATCH: &str = "bad-batch.json";
const SUMMARY: &str = "summary.json";
/// What a run writes before it has a result: none of it is worth keeping for itself.
const BEFORE_RESULT: [&str; 6] = [
    CONFIG,
    "plan.json",
    "metrics.jsonl",
    "samples.jsonl",
    "report.html",
    BAD_BATCH,
];

/// Refuses a folder that holds work: it may be the work of hours. What a run has left that came to no checkpoint is
/// none.
pub(super) fn refuse_existing(path: &Path) -> anyhow::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    if path.is_dir()
        && !path.join(SUMMARY).exists()
        && let Some((step, _)) = checkpoint::list(path)?.pop()
    {
        anyhow::bail!(
            "{} is a run that was stopped; its last checkpoint is of step {step}\nhint: --resume-from-checkpoint {} goes on with it; for another run name another folder with -o",
            path.display(),
            path.display()
        );
    }
    let is_work = |name: &str| !BEFORE_RESULT.contains(&name) && !is_part(name);
    let holds_work = !path.is_dir()
        || std::fs::read_dir(path)?
            .flatten()
            .any(|entry| entry.file_name().to_str().is_none_or(is_work));
    if holds_work {
        anyhow::bail!(
            "{} exists already\nhint: name another folder with -o, or remove it first",
            path.display()
        );
    }
    Ok(())
}

/// Whether a name is that of a result that was being written.
fn is_part(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".part")
}

/// A run's folder while the run goes on: `config.resolved.toml`, what [`RunLog`](super::log::RunLog) writes,
/// `checkpoint-N/`, then the result.
#[derive(Debug)]
pub(super) struct RunDir {
    path: PathBuf,
    /// The folder itself, locked: two runs do not write into one.
    _lock: File,
}

impl RunDir {
    /// Starts the folder, or goes on with that of the run that is resumed.
    pub(super) fn open(
        path: &Path,
        settings: &str,
        resume: Option<&Resume>,
        output: Output,
    ) -> anyhow::Result<Self> {
        let Some(resume) = resume else {
            return Self::create(path, settings);
        };
        if !output.quiet {
            let checkpoint = resume.checkpoint.display();
            eprintln!("going on after step {} of {checkpoint}", resume.step);
        }
        Self::resume(path, settings)
    }

    /// Starts the folder. What an earlier run has left that came to no checkpoint is removed.
    fn create(path: &Path, settings: &str) -> anyhow::Result<Self> {
        let cannot = || format!("cannot make {}", path.display());
        match std::fs::create_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.with_context(cannot)?,
        }
        let lock = lock(path)?;
        refuse_existing(path)?;
        Self::start(path, lock, settings, &BEFORE_RESULT).with_context(cannot)
    }

    /// Goes on with a folder.
    fn resume(path: &Path, settings: &str) -> anyhow::Result<Self> {
        let lock = lock(path)?;
        Self::start(path, lock, settings, &[BAD_BATCH])
            .with_context(|| format!("cannot go on in {}", path.display()))
    }

    fn start(path: &Path, lock: File, settings: &str, old: &[&str]) -> io::Result<Self> {
        clear(path, old)?;
        write_file(&path.join(CONFIG), settings.as_bytes())?;
        Ok(Self {
            path: path.to_path_buf(),
            _lock: lock,
        })
    }

    /// The folder.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What the run is called.
    pub(super) fn name(&self) -> Cow<'_, str> {
        self.path.file_name().unwrap_or_default().to_string_lossy()
    }

    /// Says what a run that stopped has left, and how to go on. The batch that broke the numbers is written down, to look
    /// at and to train on again.
    pub(super) fn explain(&self, command: &str, data: &Path, error: TrainError) -> anyhow::Error {
        let run = self.path.display();
        match &error {
            TrainError::Interrupted {
                checkpoint: Some(checkpoint),
                ..
            } => anyhow::anyhow!(
                "{error}; they are saved in {}\nhint: pipit-distill {command} --resume-from-checkpoint {run} goes on",
                checkpoint.display()
            ),
            TrainError::NotFinite {
                step,
                what,
                value,
                learning_rate,
                samples,
            } => {
                let row = |s: &Sample| json!({"line": s.line, "ids": s.ids, "labels": s.labels});
                let report = json!({
                    "data": data, "step": step, "what": what, "value": value.to_string(),
                    "learning_rate": learning_rate, "samples": samples.iter().map(row).collect::<Vec<_>>(),
                });
                let path = self.path.join(BAD_BATCH);
                let note = match write_file(&path, format!("{report}\n").as_bytes()) {
                    Ok(()) => format!("its batch is in {}", path.display()),
                    Err(e) => format!("{} cannot be written: {e}", path.display()),
                };
                let last = checkpoint::list(&self.path).unwrap_or_default().pop();
                let last = last.map_or_else(String::new, |(step, _)| {
                    format!("; --resume-from-checkpoint {run} goes on after step {step}")
                });
                anyhow::anyhow!("{error}\n{note}{last}")
            }
            _ => error.into(),
        }
    }

    /// Lets `write` fill a folder, and moves what is in it into the run when it is synced.
    pub(super) fn publish(&self, write: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let staging = OutputDir::create(&self.path.join("result"))?;
        write(staging.path())?;
        let entries: Vec<_> = std::fs::read_dir(staging.path())?.collect::<io::Result<_>>()?;
        for entry in &entries {
            File::open(entry.path())?.sync_all()?;
        }
        for entry in &entries {
            std::fs::rename(entry.path(), self.path.join(entry.file_name()))?;
        }
        Ok(File::open(&self.path)?.sync_all()?)
    }

    /// Hands on what the run came to, and tidies up after an error.
    pub(super) fn end(self, done: anyhow::Result<()>) -> anyhow::Result<()> {
        if done.is_err() {
            let cannot = format!("cannot tidy {} up", self.path.display());
            self.leave().context(cannot)?;
        }
        done
    }

    /// Removes the folder after an error, unless there is something in it to look at or to go on from.
    fn leave(self) -> io::Result<()> {
        let bad = self.path.join(BAD_BATCH).exists();
        if bad || !checkpoint::list(&self.path)?.is_empty() {
            return Ok(());
        }
        clear(&self.path, &BEFORE_RESULT)?;
        std::fs::remove_dir(&self.path)
    }
}

fn lock(path: &Path) -> anyhow::Result<File> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    // Where the file system has no locks, nobody is kept out.
    if let Err(std::fs::TryLockError::WouldBlock) = file.try_lock() {
        anyhow::bail!("{}: another process is training this run", path.display());
    }
    Ok(file)
}

/// Removes these files, and whatever was being written when a process was killed.
fn clear(path: &Path, files: &[&str]) -> io::Result<()> {
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| files.contains(name) || is_part(name)) else {
            continue;
        };
        tracing::debug!("removed {name}, which an earlier run had left");
        match entry.file_type()?.is_dir() {
            true => std::fs::remove_dir_all(entry.path())?,
            false => std::fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}
