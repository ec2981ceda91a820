//! Our own programs, as cargo built them beside the test.

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{self, Finished, Running};

/// The path of one of our programs: `pipit`, `pipit-convert` or `pipit-distill`.
///
/// A test lies in `target/PROFILE/deps`, the programs lie in `target/PROFILE`.
///
/// # Errors
/// When it was not built.
pub fn path(name: &str) -> Result<PathBuf> {
    let test = env::current_exe()?;
    let folder = test
        .parent()
        .and_then(|deps| deps.parent())
        .context("the test lies in no target folder")?;
    let program = folder.join(name);
    if !program.is_file() {
        bail!(
            "{} is not there\n  hint: cargo build --workspace --bins",
            program.display()
        );
    }
    Ok(program)
}

/// Runs one of our programs to its end.
///
/// # Errors
/// When it was not built, cannot be started, or takes longer than `limit`.
pub fn run<S: AsRef<OsStr>>(
    name: &str,
    arguments: impl IntoIterator<Item = S>,
    limit: Duration,
) -> Result<Finished> {
    process::run(path(name)?, arguments, limit)
}

/// Starts one of our programs beside the test.
///
/// # Errors
/// When it was not built or cannot be started.
pub fn start<S: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = S>) -> Result<Running> {
    Running::start(Command::new(path(name)?).args(arguments))
}
