//! The program `pipit-distill`.

use std::process::ExitCode;

use clap::Parser as _;
use pipit_distill::cli::Cli;

fn main() -> ExitCode {
    Cli::parse().run()
}
