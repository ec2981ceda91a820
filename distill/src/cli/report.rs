//! `pipit-distill report`: one HTML file of a run, or of several side by side.

use std::path::PathBuf;

use anyhow::Context as _;
use pipit_convert::output::write_file;
use serde_json::json;

use super::Output;
use crate::report::{Run, page};

/// Show runs, or compare them, in one HTML file that needs no network
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    pipit-distill report run -o run.html\n  \
    pipit-distill report run-r8 run-r16 run-full -o compared.html")]
pub struct Args {
    /// Folders that `sft -o` made, or is making
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The file to write
    #[arg(short, long, value_name = "F.html")]
    output: PathBuf,
}

/// Runs the subcommand.
pub fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    let runs: Vec<Run> = args
        .runs
        .iter()
        .map(|dir| Run::read(dir))
        .collect::<Result<_, _>>()?;
    write_file(&args.output, page(&runs).as_bytes())
        .with_context(|| format!("cannot write {}", args.output.display()))?;
    if output.json {
        println!("{}", json!({"report": args.output, "runs": args.runs}));
    } else {
        println!("{}", args.output.display());
    }
    Ok(())
}
