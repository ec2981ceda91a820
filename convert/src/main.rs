//! The program `pipit-convert`.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
