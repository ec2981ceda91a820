//! The models of the tests: the real one, and a random one that answers in milliseconds.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::program;

/// The path of SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB): `PIPIT_TEST_MODEL`, else the cache that
/// `scripts/fetch-model` fills.
///
/// # Errors
/// When there is no such file. A test without its model fails; it is not skipped.
pub fn smollm2() -> Result<PathBuf> {
    let path = match env::var_os("PIPIT_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => cache().join("SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    if !path.is_file() {
        bail!(
            "{} is not there\n  hint: scripts/fetch-model gets it",
            path.display()
        );
    }
    Ok(path)
}

/// A model of two layers with random weights, and so with random answers.
#[derive(Debug)]
pub struct Tiny {
    folder: TempDir,
}

impl Tiny {
    /// Makes it with `pipit-convert` from a checkpoint of the converter's tests, with tokenizer and chat template.
    ///
    /// # Errors
    /// When the program was not built or does not convert it.
    pub fn make() -> Result<Self> {
        Self::of_type("F16")
    }

    /// The same with weights of this type, and so another file with about the same answers.
    ///
    /// # Errors
    /// When the program was not built or does not convert it.
    pub fn of_type(kind: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let tiny = Self { folder };
        let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../convert/tests/fixtures/tied");
        let (checkpoint, out) = (checkpoint.to_str(), tiny.path());
        let arguments = [
            "model",
            checkpoint.context("a path that is not UTF-8")?,
            "-o",
            out.to_str().context("a path that is not UTF-8")?,
            "-t",
            kind,
        ];
        program::run("pipit-convert", arguments, Duration::from_secs(60))?.success()?;
        Ok(tiny)
    }

    /// The GGUF file.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("tiny.gguf")
    }
}

/// Where the scripts keep what they fetch: `PIPIT_CACHE`, else `~/.cache/pipit`.
pub(crate) fn cache() -> PathBuf {
    let set = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("PIPIT_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|base| base.join("pipit")))
        .unwrap_or_else(|| set("HOME").unwrap_or_default().join(".cache/pipit"))
}
