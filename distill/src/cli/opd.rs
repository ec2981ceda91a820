//! `pipit-distill opd`: on-policy distillation of a teacher into a student.

mod controls;
mod prepare;
mod teacher;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use prepare::{Prepared, prepare};
use serde::Serialize;
use serde_json::Value;

use super::log::RunLog;
use super::options::{OpdGiven, OpdSettings, RolloutSource};
use super::plan;
use super::resume::Resume;
use super::run::{RunDir, refuse_existing};
use super::sft::{Summary, check_space, done};
use super::show::Show;
use super::{Output, interruptible};
use crate::card::Card;
use crate::opd::deployed::Deployed;
use crate::opd::draft::Draft;
use crate::opd::{Cast, Divergence, Event, OpdError, Source, distil, preflight};
use crate::plan::Plan;
use crate::trainer::checkpoint::Cause;
use crate::trainer::{Checkpoints, Outcome, TrainError};

/// Distil a teacher into a student, on the student's own answers
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The student answers prompts, the teacher says how probable it finds every token of the answers, and the student learns\n\
    from the difference. Every flag can stand in the TOML file of --config, with _ for -.\n\nExamples:\n  \
    pipit-distill opd --student small --teacher large --prompts train.jsonl --method full -o run\n  \
    pipit-distill opd --student small --teacher large.gguf --prompts train.jsonl --on-policy-fraction 1 --loss reverse-kl -o run\n  \
    pipit-distill opd --student small --teacher large --prompts train.jsonl --eval-data dev.jsonl --through Q4_K_M --controls -o runs\n  \
    pipit-distill opd --resume-from-checkpoint run"
)]
pub struct Args {
    /// A TOML file with options; flags win over it
    #[arg(long, value_name = "F.toml")]
    config: Option<PathBuf>,
    #[command(flatten)]
    given: OpdGiven,
}

/// What is asked for.
struct Asked {
    settings: OpdSettings,
    /// The run that goes on.
    resume: Option<Resume>,
    /// Whether the method was chosen, and is not the default.
    method_is_given: bool,
}

/// `summary.json`: what any training says, and beside it.
#[derive(Debug, Serialize)]
struct OpdSummary<'a> {
    #[serde(flatten)]
    training: Summary<'a>,
    teacher: &'a str,
    /// Student and teacher on the evaluation data; through quantised weights where the student computes so.
    divergence: Option<Divergence>,
    /// The result as a GGUF file in llama.cpp.
    gguf: Option<GgufFigures<'a>>,
    /// What the student is worth as a draft model of the teacher.
    draft: Option<Draft>,
}

/// What was measured on the GGUF file that the student becomes.
#[derive(Debug, Serialize)]
struct GgufFigures<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    bytes: u64,
    #[serde(flatten)]
    divergence: Divergence,
}

impl Args {
    pub(super) fn new(config: Option<PathBuf>, given: OpdGiven) -> Self {
        Self { config, given }
    }

    fn resolve(self, output: Output) -> anyhow::Result<Asked> {
        let file = self.config.as_deref().map(OpdGiven::read).transpose()?;
        let given = self.given.or(file.unwrap_or_default());
        let method_is_given = given.training.method.is_some();
        let Some(run) = &given.training.resume_from_checkpoint else {
            given.check()?;
            return Ok(Asked {
                settings: given.resolve(),
                resume: None,
                method_is_given,
            });
        };
        let resume = Resume::find(run)?;
        let (settings, changes) = resume.opd_settings(given)?;
        output.changed(&changes);
        Ok(Asked {
            settings,
            resume: Some(resume),
            method_is_given,
        })
    }
}

/// Runs the subcommand.
pub fn run(args: Args, output: Output) -> anyhow::Result<()> {
    let asked = args.resolve(output)?;
    asked.settings.check()?;
    asked.settings.training.check_output()?;
    interruptible(
        |stop| match asked.settings.distillation.controls && asked.resume.is_none() {
            true => controls::run(&asked.settings, asked.method_is_given, output, stop),
            false => opd(asked, output, stop),
        },
    )
}

/// What a run would train, and what memory it would take; opens what it would open, and writes nothing.
pub(super) fn plan(args: Args, output: Output) -> anyhow::Result<Plan> {
    let Asked {
        mut settings,
        method_is_given,
        ..
    } = args.resolve(output)?;
    settings.check()?;
    let prepared = prepare(&mut settings, method_is_given, output)?;
    let options = prepared.options(&settings);
    let teacher = teacher::open(&settings, &prepared, &options)?;
    let facts = prepared.facts(&options, teacher.bytes, prepared.through.as_ref());
    let plan = plan::of(&settings.training, &facts, &options.train)?;
    plan::warn(&plan, output);
    Ok(plan)
}

fn opd(asked: Asked, output: Output, stop: &AtomicBool) -> anyhow::Result<()> {
    let Asked {
        mut settings,
        resume,
        method_is_given,
    } = asked;
    if resume.is_none() {
        refuse_existing(&settings.training.output_dir)?;
    }
    let mut prepared = prepare(&mut settings, method_is_given, output)?;
    let settings = &settings;
    let config = &settings.training;
    let options = prepared.options(settings);
    let through = prepared.through.take();
    let mut teacher = teacher::open(settings, &prepared, &options)?;
    let plan = plan::of(
        config,
        &prepared.facts(&options, teacher.bytes, through.as_ref()),
        &options.train,
    )?;
    check_space(config, &options.train, plan.parameters.trained)?;
    plan::warn(&plan, output);
    if !output.quiet {
        eprint!("{}", plan.text());
        eprintln!("teacher   {}", teacher.teacher.name());
    }
    let export = |dir: &Path| prepared.student.export(&config.model, dir);
    let deployed = prepared.recipe.as_ref().map(|recipe| Deployed {
        base: prepared.student.adapter.as_ref().map(|_| config.model.as_path()),
        export: &export,
        recipe,
    });
    let name = teacher.teacher.name();
    let mut cast = Cast {
        student: &prepared.student.model,
        eos: prepared.student.encoder.eos(),
        teacher: teacher.teacher.as_mut(),
        source: match deployed.filter(|_| settings.distillation.rollouts == RolloutSource::Gguf) {
            Some(deployed) => Source::Gguf(deployed),
            None => Source::Student,
        },
        through,
    };
    preflight::check(&mut cast, &prepared.tasks, &options)?;
    let text = toml::to_string(&settings.resolved()?)?;
    let run = RunDir::open(&config.output_dir, &text, resume.as_ref(), output)?;
    let job = Job {
        settings,
        text: &text,
        prepared: &prepared,
        plan: &plan,
        teacher: &name,
        draft_cost: teacher.draft_cost,
        deployed,
        export: &export,
    };
    let done = job.distil_and_save(cast, &options, resume, output, stop, &run);
    run.end(done)
}

/// A run that is ready to start.
struct Job<'a> {
    settings: &'a OpdSettings,
    /// `config.resolved.toml`.
    text: &'a str,
    prepared: &'a Prepared,
    plan: &'a Plan,
    teacher: &'a str,
    draft_cost: Option<f64>,
    deployed: Option<Deployed<'a>>,
    export: &'a dyn Fn(&Path) -> Result<(), Cause>,
}

impl Job<'_> {
    /// The run itself, from the first step to `summary.json`.
    fn distil_and_save(
        &self,
        mut cast: Cast<'_>,
        options: &crate::opd::OpdOptions,
        resume: Option<Resume>,
        output: Output,
        stop: &AtomicBool,
        run: &RunDir,
    ) -> anyhow::Result<()> {
        let (config, prepared) = (&self.settings.training, self.prepared);
        let cannot = || format!("cannot write {}", config.output_dir.display());
        let name = run.name();
        let before = resume.as_ref().map_or(0, |resume| resume.step);
        let mut log = RunLog::start(run.path(), &name, self.plan, before).with_context(cannot)?;
        let checkpoints = Checkpoints {
            dir: run.path().to_path_buf(),
            export: self.export,
            weights_in_export: prepared.student.adapter.is_none(),
            save_total_limit: config.save_total_limit,
            load_best_model_at_end: config.load_best_model_at_end,
            resume_from: resume.map(|resume| resume.checkpoint),
        };
        let show = Show::new(output, options.train.steps);
        let tell = |event: Event| match event {
            Event::Step(step, loss, speed) => {
                show.step(step, loss, speed);
                Ok(())
            }
            Event::Metrics(metrics) => {
                show.metrics(&metrics.metrics);
                log.metrics(&metrics)
            }
            Event::Evaluation(step, divergence) => {
                show.say(&format!("step {step}  {}", in_words(&divergence)));
                let answers = prepared.student.answers(&prepared.prompts);
                let answers = answers.map_err(std::io::Error::other)?;
                log.evaluation(step, &figures(&divergence)?, &answers)
            }
            Event::Saved(step) => {
                show.saved(step);
                Ok(())
            }
            Event::Stopped(step) => {
                show.stopped(step);
                Ok(())
            }
        };
        let (tasks, eval_tasks) = (&prepared.tasks, &prepared.eval_tasks);
        let result = distil(
            &mut cast,
            tasks,
            eval_tasks,
            options,
            Some(&checkpoints),
            stop,
            tell,
        );
        show.finish();
        let (outcome, divergence) = match result {
            Ok(outcome) => outcome,
            Err(OpdError::Train(TrainError::Tell(e))) => return Err(e).with_context(cannot),
            Err(OpdError::Train(error)) => return Err(run.explain("opd", &config.data, error)),
            Err(error) => return Err(error.into()),
        };
        let gguf = match self.deployed.filter(|_| !eval_tasks.is_empty()) {
            Some(deployed) => {
                let batch_size = config.per_device_train_batch_size;
                let (divergence, bytes) = deployed.measure(cast.teacher, eval_tasks, batch_size)?;
                Some(GgufFigures {
                    kind: &self.settings.distillation.gguf_type,
                    bytes,
                    divergence,
                })
            }
            None => None,
        };
        let measured = gguf.as_ref().map(|gguf| gguf.divergence).or(divergence);
        let acceptance = measured.and_then(|divergence| divergence.acceptance_rate);
        let summary = OpdSummary {
            training: Summary::of(config, self.plan, &outcome),
            teacher: self.teacher,
            divergence,
            draft: acceptance
                .zip(self.draft_cost)
                .map(|(rate, cost)| Draft::best(rate, cost)),
            gguf,
        };
        self.publish(run, &name, &outcome).with_context(cannot)?;
        log.finish(&summary).with_context(cannot)?;
        if output.json {
            println!("{}", serde_json::to_string(&summary)?);
        } else {
            println!("{}", summary.text(&outcome));
        }
        Ok(())
    }

    fn publish(&self, run: &RunDir, name: &str, outcome: &Outcome) -> anyhow::Result<()> {
        let card = Card {
            name,
            base: &self.prepared.base,
            adapter: self.prepared.student.adapter.is_some(),
            languages: &self.prepared.languages,
            plan: self.plan,
            outcome,
            teacher: Some(self.teacher),
            settings: self.text,
        };
        run.publish(|dir| {
            std::fs::write(dir.join("README.md"), card.markdown())?;
            (self.export)(dir).map_err(anyhow::Error::from_boxed)
        })
    }
}

/// What an evaluation writes down.
fn figures(divergence: &Divergence) -> serde_json::Result<Value> {
    let mut figures = serde_json::to_value(divergence)?;
    figures["eval_loss"] = divergence.eval_loss().into();
    Ok(figures)
}

fn in_words(divergence: &Divergence) -> String {
    match (divergence.forward_kl, divergence.acceptance_rate) {
        (Some(kl), Some(rate)) => format!("KL to the teacher {kl:.4}, accepted as its draft {rate:.3}"),
        _ => format!("eval loss {:.4}", divergence.cross_entropy),
    }
}

impl OpdSummary<'_> {
    /// A few lines for people.
    fn text(&self, outcome: &Outcome) -> String {
        let evaluation = self
            .divergence
            .as_ref()
            .map(|found| format!(", {}", in_words(found)));
        let mut lines = vec![done(
            self.training.output_dir,
            outcome,
            &evaluation.unwrap_or_default(),
        )];
        if let Some(gguf) = &self.gguf {
            let mebibytes = gguf.bytes as f64 / f64::from(1 << 20);
            lines.push(format!(
                "as {} ({mebibytes:.1} MiB) in llama.cpp: {}",
                gguf.kind,
                in_words(&gguf.divergence)
            ));
        }
        if let Some(draft) = &self.draft {
            lines.push(format!(
                "as a draft of the teacher: {:.0} % accepted, {} tokens at a time, expected speed-up {:.2}",
                100.0 * draft.acceptance_rate,
                draft.draft_tokens,
                draft.speed_up
            ));
        }
        lines.join("\n")
    }
}
