//! The command line of `pipit-distill`: one file a subcommand.

mod adapter;
pub mod eval;
pub mod generate;
mod log;
pub mod opd;
mod opened;
pub mod options;
pub mod plan;
pub mod report;
mod resume;
mod run;
pub mod sft;
mod show;
pub mod shrink;

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::data::DataReport;
use crate::device::{DeviceError, Place, Precision};
use crate::trainer::with_deep_stack;

/// Fine-tunes small language models on this machine.
#[derive(Debug, Parser)]
#[command(
    name = "pipit-distill",
    version,
    after_help = "Examples:\n  \
        pipit-distill plan --model smollm2 --data train.jsonl --method lora\n  \
        pipit-distill sft --model smollm2 --data train.jsonl --method lora -o run\n  \
        pipit-distill opd --student small --teacher large --prompts train.jsonl -o run\n  \
        pipit-distill eval --model smollm2 --adapter run --data dev.jsonl --by language"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Say more on standard error; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Say nothing on standard error but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Print one JSON object on standard output
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Sft(Box<sft::Args>),
    Opd(Box<opd::Args>),
    Plan(Box<plan::Args>),
    Eval(eval::Args),
    Shrink(shrink::Args),
    Generate(generate::Args),
    Report(report::Args),
}

/// How results and progress are shown.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// One JSON object instead of text.
    pub json: bool,
    /// No progress, no warnings.
    pub quiet: bool,
}

impl Output {
    /// A progress bar of so many steps: drawn on a terminal only.
    pub fn progress(self, length: u64, template: &str) -> indicatif::ProgressBar {
        if self.quiet || !std::io::stderr().is_terminal() {
            return indicatif::ProgressBar::hidden();
        }
        let bar = indicatif::ProgressBar::new(length);
        match indicatif::ProgressStyle::with_template(template) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    }
}

impl Output {
    /// Says on standard error what became of the rows of a file.
    pub fn warn(self, path: &Path, report: &DataReport) {
        if !self.quiet {
            for warning in report.warnings() {
                eprintln!("warning: {}: {warning}", path.display());
            }
        }
    }

    /// Says on standard error which settings make a run that goes on another one.
    fn changed(self, changes: &[String]) {
        if !self.quiet {
            for change in changes {
                eprintln!("warning: {change}: the result is not that of a run without a stop");
            }
        }
    }
}

/// Runs `work` on a thread with a deep stack, see [`with_deep_stack`]. Ctrl-C raises the flag that it gets.
fn interruptible(work: impl FnOnce(&AtomicBool) -> anyhow::Result<()> + Send) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let on_signal = stop.clone();
    ctrlc::set_handler(move || on_signal.store(true, Ordering::Relaxed))
        .context("cannot watch for Ctrl-C")?;
    with_deep_stack(|| work(&stop)).context("cannot start a thread")?
}

/// Opens `--device` to compute as `--bf16` and `--fp16` say.
fn place(device: &str, bf16: bool, fp16: bool) -> anyhow::Result<Place> {
    let place = Precision::of(bf16, fp16).and_then(|precision| Place::open(device, precision));
    place.map_err(|error| match error {
        DeviceError::Unusable { .. } => error.into(),
        _ => UsageError::Usage(error.to_string()).into(),
    })
}

/// A mistake in the call or in a configuration file, found before any work.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// Arguments that do not fit together. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// A configuration file that is wrong. Exit code 78.
    #[error("{path}: {why}", path = .0.display(), why = .1)]
    Config(std::path::PathBuf, String),
}

impl Cli {
    /// Runs the subcommand.
    pub fn run(self) -> ExitCode {
        let level = match (self.quiet, self.verbose) {
            (true, _) => LevelFilter::ERROR,
            (_, 0) => LevelFilter::WARN,
            (_, 1) => LevelFilter::INFO,
            _ => LevelFilter::DEBUG,
        };
        let asked = std::env::var("RUST_LOG")
            .ok()
            .and_then(|filter| filter.parse().ok());
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .without_time()
            .with_target(false);
        tracing_subscriber::registry()
            .with(asked.unwrap_or_else(|| Targets::new().with_default(level)))
            .with(lines)
            .init();
        let output = Output {
            json: self.json,
            quiet: self.quiet,
        };
        let result = match self.command {
            Command::Sft(args) => sft::run(*args, output),
            Command::Opd(args) => opd::run(*args, output),
            Command::Plan(args) => plan::run(*args, output),
            Command::Eval(args) => eval::run(&args, output),
            Command::Shrink(args) => shrink::run(&args, output),
            Command::Generate(args) => generate::run(&args, output),
            Command::Report(args) => report::run(&args, output),
        };
        let Err(error) = result else {
            return ExitCode::SUCCESS;
        };
        eprintln!("error: {}", pipit_convert::report::describe(error.chain()));
        match error.downcast_ref::<UsageError>() {
            Some(UsageError::Usage(_)) => ExitCode::from(2),
            Some(UsageError::Config(..)) => ExitCode::from(78),
            None => ExitCode::FAILURE,
        }
    }
}
