//! `--controls`: the same distillation three ways from the same start, so that what each part gives can be seen.

use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use pipit_convert::output::write_file;
use serde_json::{Value, json};

use super::{Asked, opd};
use crate::cli::Output;
use crate::cli::options::{OpdSettings, RolloutSource};
use crate::cli::resume::Resume;
use crate::report::{Run, page};

/// Runs the three, each in a folder of its own, and shows them side by side in `report.html`. What an earlier call has
/// finished is kept, and what it has left is gone on with.
pub(super) fn run(
    settings: &OpdSettings,
    method_is_given: bool,
    output: Output,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let folder = &settings.training.output_dir;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let quiet = Output {
        json: false,
        ..output
    };
    let mut runs = Vec::new();
    for (name, arm) in arms(settings) {
        let dir = folder.join(name);
        let mut settings = arm;
        settings.distillation.controls = false;
        settings.training.output_dir.clone_from(&dir);
        if !output.quiet {
            eprintln!("\n{name}");
        }
        if !dir.join("summary.json").is_file() {
            let asked = Asked {
                resume: dir.is_dir().then(|| Resume::find(&dir)).transpose()?,
                settings,
                method_is_given,
            };
            opd(asked, quiet, stop)?;
        }
        runs.push(Run::read(&dir)?);
    }
    let report = folder.join("report.html");
    write_file(&report, page(&runs).as_bytes())
        .with_context(|| format!("cannot write {}", report.display()))?;
    let summaries: Vec<Value> = runs
        .iter()
        .map(|run| json!({"name": run.name, "summary": run.summary}))
        .collect();
    let summary = serde_json::to_string_pretty(&json!({"controls": summaries}))?;
    write_file(&folder.join("summary.json"), format!("{summary}\n").as_bytes())?;
    if output.json {
        println!("{}", json!({"report": report, "controls": summaries}));
    } else {
        println!("{}", report.display());
    }
    Ok(())
}

/// Off-policy, on-policy, and on-policy through quantisation as it was asked for.
fn arms(settings: &OpdSettings) -> [(&'static str, OpdSettings); 3] {
    let mut off = settings.clone();
    off.distillation.on_policy_fraction = 0.0;
    off.distillation.rollouts = RolloutSource::Student;
    off.distillation.through.clear();
    let mut on = settings.clone();
    on.distillation.through.clear();
    on.distillation.rollouts = RolloutSource::Student;
    [
        ("off-policy", off),
        ("on-policy", on),
        ("through", settings.clone()),
    ]
}
