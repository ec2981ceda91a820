//! `pipit config`: what the configuration is, whether it is right, and a file to begin with.

use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use pipit::config::{DEFAULT_TOML, Layers, Sources};
use serde_json::json;

use super::{code, serve};

const EXAMPLES: &str = "\
Examples:
  pipit config show --origin
  PIPIT_MODEL__N_CTX=1024 pipit config show --json | jq .model
  pipit config check /etc/pipit/config.toml
  pipit config generate | sudo tee /etc/pipit/config.toml

Layers, the later over the earlier: built-in defaults; /etc/pipit/config.toml; /etc/pipit/config.d/*.toml by name;
~/.config/pipit/config.toml; variables PIPIT_SECTION__KEY; flags. --config FILE replaces all files but itself.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Print the configuration that `pipit serve` with the same flags would have
    Show(Show),
    /// Find every mistake; exits with 78 when there is one
    Check(Check),
    /// Print a file with every key, its meaning and its default
    Generate,
}

#[derive(Debug, clap::Args)]
struct Show {
    /// Say of each value where it came from
    #[arg(long)]
    origin: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    flags: serve::Flags,
}

#[derive(Debug, clap::Args)]
struct Check {
    /// Check this file, as --config would read it [default: the files that are searched]
    file: Option<PathBuf>,
    /// Print one JSON object: {"problems": [...]}
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.verb {
        Verb::Show(show) => {
            let layers = show.flags.layers()?;
            if show.json {
                print(&format!("{}\n", layers.to_json(show.origin)))?;
            } else {
                print(&layers.to_toml(show.origin))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Check(args) => check(args),
        Verb::Generate => {
            print(DEFAULT_TOML)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn check(args: &Check) -> anyhow::Result<ExitCode> {
    let sources = Sources {
        file: args.file.clone(),
        ..Sources::of_process()
    };
    let result = Layers::read(&sources).and_then(|layers| layers.check_files().map(|()| layers));
    if args.json {
        let problems = match &result {
            Ok(_) => Vec::new(),
            Err(problems) => problems.0.iter().map(ToString::to_string).collect(),
        };
        print(&format!("{}\n", json!({ "problems": problems })))?;
        return Ok(result.map_or(ExitCode::from(code::CONFIG), |_| ExitCode::SUCCESS));
    }
    let layers = result?;
    for file in &layers.files {
        print(&format!("{}: good\n", file.display()))?;
    }
    if layers.files.is_empty() {
        print("no file of configuration is there: all is default; hint: pipit config generate\n")?;
    }
    if layers.config.model.path.is_none() {
        eprintln!("note: no model is named: `pipit serve` will need an installed one, or --model");
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints to standard output. Who closes it has read enough.
fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}
