//! The command line: what is common to all subcommands.

mod adapter;
mod archs;
mod arguments;
mod bar;
mod compare;
mod imatrix;
mod import;
mod inspect;
mod model;
mod text;

use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::filter::LevelFilter;

/// What the shell sees of a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;
/// A model is farther from its reference than the user allows.
const TOO_FAR: u8 = 3;

/// Checkpoints and LoRA adapters to quantised GGUF files, and back.
#[derive(Debug, Parser)]
#[command(name = "pipit-convert", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// One JSON object on stdout instead of text
    #[arg(long, global = true)]
    json: bool,
    /// Tell more (-v, -vv)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Tell only what went wrong
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Import(import::Args),
    Model(model::Args),
    Adapter(adapter::Args),
    Inspect(inspect::Args),
    Imatrix(imatrix::Args),
    Compare(compare::Args),
    Archs(archs::Args),
}

/// What every subcommand gets besides its own arguments.
struct Context {
    json: bool,
    quiet: bool,
    /// What is written into a result of how it was made.
    arguments: Vec<String>,
}

/// Parses the command line and runs it. Exit codes: 0 done, 1 failed, 2 usage, 3 beyond `--max-kl`,
/// 130 interrupted.
pub(crate) fn main() -> ExitCode {
    let command = Cli::command();
    let matches = command.clone().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => LevelFilter::ERROR,
        (_, 0) => LevelFilter::WARN,
        (_, 1) => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
    bar::stop_on_signals();
    let context = Context {
        json: cli.json,
        quiet: cli.quiet,
        arguments: arguments::recorded(&command, &matches),
    };
    let done = match cli.command {
        Command::Import(args) => import::run(&args, &context),
        Command::Model(args) => model::run(&args, &context),
        Command::Adapter(args) => adapter::run(&args, &context),
        Command::Inspect(args) => inspect::run(&args, &context),
        Command::Imatrix(args) => imatrix::run(&args, &context),
        Command::Compare(args) => compare::run(&args, &context),
        Command::Archs(args) => archs::run(&args, &context),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e)
            if e.downcast_ref::<std::io::Error>()
                .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) =>
        {
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("error: {}", pipit_convert::report::describe(e.chain()));
            if bar::stopped() {
                ExitCode::from(INTERRUPTED)
            } else if e.is::<compare::TooFar>() {
                ExitCode::from(TOO_FAR)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Refuses to write over something, unless told to, and to write where there is no folder.
fn check_output(path: &Path, force: bool) -> anyhow::Result<()> {
    if path.file_name().is_none() {
        bail!(
            "{} is no place for a result\nhint: name the file or folder that is to be written",
            path.display()
        );
    }
    if path.symlink_metadata().is_ok() && !force {
        bail!("{} exists already\nhint: --force replaces it", path.display());
    }
    let above = path.parent().filter(|above| !above.as_os_str().is_empty());
    if above.is_some_and(|above| !above.is_dir()) {
        bail!(
            "the folder for {} does not exist\nhint: mkdir -p makes it",
            path.display()
        );
    }
    Ok(())
}

/// `1.2 MiB`.
fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
