//! `pipit check`: the doctor.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
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

Exit codes: 0 nothing fails, 1 something does, 3 the model's sha256 is another one, 78 bad configuration";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Compute the model's sha256 and, with HEX, compare it
    #[arg(long, value_name = "HEX", num_args = 0..=1)]
    sha256: Option<Option<String>>,
    /// Print one object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
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
