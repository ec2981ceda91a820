//! `pipit check`: the doctor.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use pipit::board::Board;
use pipit::config::Key;
use pipit::doctor::board::{Forecast, recommend};
use pipit::doctor::{self, Finding, State};
use pipit::plan::{Plan, available};
use serde_json::json;

use super::code;
use super::serve::Flags;

const EXAMPLES: &str = "\
Examples:
  pipit check --model model.gguf
  pipit check --config /etc/pipit/config.toml
  pipit check --model model.gguf --ctx 8192 --broker mqtt://broker.local --json | jq .plan
  pipit check --model model.gguf --sha256 9e4f0c…
  pipit check --model model.gguf --board raspberry-pi-5              on a workstation, before anything is flashed
  pipit check --model model.gguf --board ./my-board.toml --memory-mib 2048 --ctx 1024

Exit codes: 0 nothing fails, 1 something does, 3 the model's sha256 is another one, 78 bad configuration";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Compute the model's sha256 and, with HEX, compare it
    #[arg(long, value_name = "HEX", num_args = 0..=1)]
    sha256: Option<Option<String>>,
    /// Look at another machine than this one: a board of firmware-configs/boards by name, or a file like those
    #[arg(long, value_name = "NAME|FILE")]
    board: Option<String>,
    /// Memory of that board [default: each size that it is sold with]
    #[arg(long, value_name = "MIB", requires = "board")]
    memory_mib: Option<u64>,
    /// Print one object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(name) = &args.board {
        return elsewhere(args, name);
    }
    let config = args.flags.layers()?.config;
    let root = Path::new("/");
    let mut findings = doctor::look(&config, root);
    let mut verified = true;
    if let (Some(expected), Ok(Some(served))) = (&args.sha256, doctor::model::served(&config))
        && served.path.is_file()
    {
        let (finding, same) = doctor::model::sha256(&served.path, expected.as_deref())
            .with_context(|| format!("model {}", served.path.display()))?;
        findings.push(finding);
        verified = same;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?;
    let daemon_runs = doctor::storage::State::of(&config).in_use();
    findings.push(runtime.block_on(doctor::broker::finding(&config, daemon_runs)));
    let plan = doctor::model::plan(&config);
    if args.json {
        let ok = findings.iter().all(|finding| finding.state != State::Fail);
        let report = json!({
            "ok": ok,
            "version": env!("CARGO_PKG_VERSION"),
            "device": config.device,
            "findings": findings,
            "plan": plan,
            "worker_bytes": plan.as_ref().map(Plan::worker_bytes),
            "bytes": plan.as_ref().map(Plan::bytes),
            "available": available(root, config.model.memory_bytes),
        });
        println!("{report}");
    } else {
        print(&findings, plan.as_ref());
    }
    if !verified {
        return Ok(ExitCode::from(code::VERIFICATION));
    }
    Ok(if findings.iter().any(|finding| finding.state == State::Fail) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// A model on a board that is not here.
fn elsewhere(args: &Args, name: &str) -> anyhow::Result<ExitCode> {
    let board = Board::find(name)?;
    let layers = args.flags.layers()?;
    let mut config = layers.config.clone();
    recommend(&board, &mut config, |key| {
        layers.settings.contains_key(&Key::parse(key))
    });
    let path = config
        .model
        .path
        .as_ref()
        .context("no model is named; hint: --model FILE.gguf")?;
    let forecast = Forecast::of(&board, &config, path, args.memory_mib)?;
    let findings = forecast.findings(&board);
    let ok = findings.iter().all(|finding| finding.state != State::Fail);
    if args.json {
        let report = json!({
            "ok": ok,
            "version": env!("CARGO_PKG_VERSION"),
            "board": board,
            "kernels": board.soc.kernels(),
            "settings": config.model,
            "findings": findings,
            "forecast": forecast,
        });
        println!("{report}");
    } else {
        print(&findings, Some(&forecast.plan));
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(findings: &[Finding], plan: Option<&Plan>) {
    for finding in findings {
        let state = match finding.state {
            State::Ok => "ok",
            State::Info => "--",
            State::Warn => "warn",
            State::Fail => "FAIL",
        };
        println!("{state:<5}{:<13} {}", finding.what, finding.says);
        if finding.what == "memory"
            && let Some(plan) = plan
        {
            for line in plan.table().lines() {
                println!("{:19}{line}", "");
            }
        }
        if let Some(hint) = &finding.hint {
            println!("{:19}hint: {hint}", "");
        }
    }
}
