//! `pipit-distill sft`: supervised fine-tuning, loss on the answers only.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use serde::Serialize;
use serde_json::json;

use super::log::RunLog;
use super::opened::Opened;
use super::options::{Method, SftConfig, SftOptions, read_toml};
use super::plan::{self, Facts};
use super::resume::Resume;
use super::run::{RunDir, refuse_existing};
use super::show::Show;
use super::{Output, interruptible};
use crate::card::{Base, Card};
use crate::data::{DataReport, Encoder, Prompt, Rows, Sample, read_rows};
use crate::memory;
use crate::optimizer::AdamWOptions;
use crate::plan::{DataFile, Plan};
use crate::trainer::{
    Checkpoints, Event, LearnerOptions, Outcome, Sampler, Sampling, TrainError, TrainOptions, When, train,
};

/// Rows of the output layer at a time: 25 MB of logits for a vocabulary of 49,152.
pub(super) const LOSS_CHUNK: usize = 128;

/// Fine-tune a checkpoint on rows, loss on the answers only
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Every flag can stand in the TOML file of --config, with _ for -.\n\nExamples:\n  \
    pipit-distill sft --model smollm2 --data train.jsonl --method lora --r 16 --learning-rate 1e-3 -o run\n  \
    pipit-distill sft --config sft.toml --max-steps 100 -o run-short\n  \
    pipit-distill sft --resume-from-checkpoint run"
)]
pub struct Args {
    /// A TOML file with options; flags win over it
    #[arg(long, value_name = "F.toml")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: SftOptions,
}

/// `summary.json`.
#[derive(Debug, Serialize)]
pub(super) struct Summary<'a> {
    model: &'a Path,
    method: Method,
    pub(super) output_dir: &'a Path,
    trained_parameters: usize,
    parameters: usize,
    #[serde(flatten)]
    outcome: &'a Outcome,
    /// The most memory that the program took, in bytes; Linux only.
    peak_memory_bytes: Option<u64>,
    /// The same as it was estimated before.
    planned_memory_bytes: u64,
    data_file: &'a DataFile,
    data: &'a DataReport,
    eval_file: Option<&'a DataFile>,
    eval_data: Option<&'a DataReport>,
    version: &'a str,
}

impl<'a> Summary<'a> {
    pub(super) fn of(config: &'a SftConfig, plan: &'a Plan, outcome: &'a Outcome) -> Self {
        Self {
            model: &config.model,
            method: config.method,
            output_dir: &config.output_dir,
            trained_parameters: plan.parameters.trained,
            parameters: plan.parameters.model,
            outcome,
            peak_memory_bytes: memory::resident().map(|resident| resident.peak),
            planned_memory_bytes: plan.memory.peak_bytes,
            data_file: &plan.data_file,
            data: &plan.data,
            eval_file: plan.eval_file.as_ref(),
            eval_data: plan.eval_data.as_ref(),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// Everything that is read before training starts.
pub(super) struct Prepared {
    pub(super) opened: Opened,
    pub(super) samples: Vec<Sample>,
    pub(super) report: DataReport,
    eval_samples: Vec<Sample>,
    pub(super) eval_report: Option<DataReport>,
    prompts: Vec<Prompt>,
    /// The values of the column `language`.
    languages: Vec<String>,
    /// What the checkpoint says of itself.
    base: Base,
}

/// A run that is ready to start.
struct Job<'a> {
    config: &'a SftConfig,
    prepared: &'a Prepared,
    options: &'a TrainOptions,
    plan: &'a Plan,
}

/// What is asked for.
pub(super) struct Asked {
    pub(super) config: SftConfig,
    /// The run that goes on.
    resume: Option<Resume>,
    /// Whether the method was chosen, and is not the default.
    pub(super) method_is_given: bool,
}

impl Args {
    pub(super) fn new(config: Option<PathBuf>, options: SftOptions) -> Self {
        Self { config, options }
    }

    /// The options with the values of the file, of the run that goes on, and the defaults.
    pub(super) fn resolve(self, output: Output) -> anyhow::Result<Asked> {
        let file = self.config.as_deref().map(read_toml).transpose()?;
        let given = self.options.or(file.unwrap_or_default());
        let method_is_given = given.method.is_some();
        let Some(run) = &given.resume_from_checkpoint else {
            given.check()?;
            return Ok(Asked {
                config: given.resolve(SftOptions::default()),
                resume: None,
                method_is_given,
            });
        };
        let resume = Resume::find(run)?;
        let (config, changes) = resume.settings(given)?;
        output.changed(&changes);
        Ok(Asked {
            config,
            resume: Some(resume),
            method_is_given,
        })
    }
}

/// Runs the subcommand.
pub fn run(args: Args, output: Output) -> anyhow::Result<()> {
    let Asked {
        mut config,
        resume,
        method_is_given,
    } = args.resolve(output)?;
    config.check()?;
    config.check_output()?;
    interruptible(|stop| sft(&mut config, method_is_given, resume, output, stop))
}

fn sft(
    config: &mut SftConfig,
    method_is_given: bool,
    resume: Option<Resume>,
    output: Output,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    if resume.is_none() {
        refuse_existing(&config.output_dir)?;
    }
    let prepared = prepare(config, method_is_given, output)?;
    let config = &*config;
    let options = train_options(config, prepared.lengths());
    let plan = plan::of(config, &prepared.facts(), &options)?;
    check_space(config, &options, plan.parameters.trained)?;
    plan::warn(&plan, output);
    if !output.quiet {
        eprint!("{}", plan.text());
    }
    let settings = toml::to_string(&config.resolved()?)?;
    let run = RunDir::open(&config.output_dir, &settings, resume.as_ref(), output)?;
    let job = Job {
        config,
        prepared: &prepared,
        options: &options,
        plan: &plan,
    };
    let done = train_and_save(&job, resume, output, stop, &run);
    run.end(done)
}

/// The run itself, from the first step to `summary.json`.
fn train_and_save(
    job: &Job<'_>,
    resume: Option<Resume>,
    output: Output,
    stop: &AtomicBool,
    run: &RunDir,
) -> anyhow::Result<()> {
    let Job {
        config,
        prepared,
        options,
        plan,
    } = *job;
    let cannot = || format!("cannot write {}", config.output_dir.display());
    let (opened, name) = (&prepared.opened, run.name());
    let before = resume.as_ref().map_or(0, |resume| resume.step);
    let mut log = RunLog::start(run.path(), &name, plan, before).with_context(cannot)?;
    let export = |dir: &Path| opened.export(&config.model, dir);
    let checkpoints = Checkpoints {
        dir: run.path().to_path_buf(),
        export: &export,
        weights_in_export: opened.adapter.is_none(),
        save_total_limit: config.save_total_limit,
        load_best_model_at_end: config.load_best_model_at_end,
        resume_from: resume.map(|resume| resume.checkpoint),
    };
    let show = Show::new(output, options.steps);
    let result = train(
        &opened.model,
        &prepared.samples,
        &prepared.eval_samples,
        options,
        Some(&checkpoints),
        stop,
        |event| match event {
            Event::Step(step, loss, speed) => {
                show.step(step, loss, speed);
                Ok(())
            }
            Event::Metrics(metrics) => {
                show.metrics(&metrics);
                log.metrics(&metrics)
            }
            Event::Evaluation(step, loss) => {
                show.say(&format!("step {step}  eval loss {loss:.4}"));
                let answers = opened.answers(&prepared.prompts).map_err(std::io::Error::other)?;
                let figures = json!({"eval_loss": loss, "eval_perplexity": loss.exp()});
                log.evaluation(step, &figures, &answers)
            }
            Event::Saved(step) => {
                show.saved(step);
                Ok(())
            }
            Event::Stopped(step) => {
                show.stopped(step);
                Ok(())
            }
        },
    );
    show.finish();
    let outcome = match result {
        Ok(outcome) => outcome,
        Err(TrainError::Tell(e)) => return Err(e).with_context(cannot),
        Err(error) => return Err(run.explain("sft", &config.data, error)),
    };

    let card = Card {
        name: &name,
        base: &prepared.base,
        adapter: opened.adapter.is_some(),
        languages: &prepared.languages,
        plan,
        outcome: &outcome,
        teacher: None,
        settings: &toml::to_string(&config.resolved()?)?,
    };
    run.publish(|dir| {
        std::fs::write(dir.join("README.md"), card.markdown())?;
        export(dir).map_err(anyhow::Error::from_boxed)
    })
    .with_context(cannot)?;
    let summary = Summary::of(config, plan, &outcome);
    log.finish(&summary).with_context(cannot)?;
    if output.json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        let eval = outcome
            .eval_loss
            .map(|loss| format!(", eval loss {loss:.4}"))
            .unwrap_or_default();
        println!("{}", done(&config.output_dir, &outcome, &eval));
    }
    Ok(())
}

/// What came of a run, in a line.
pub(super) fn done(run: &Path, outcome: &Outcome, evaluation: &str) -> String {
    format!(
        "{}: {} steps, loss {:.4}{evaluation}, {} tokens in {:.0} s ({:.0} tokens/s)",
        run.display(),
        outcome.steps,
        outcome.loss,
        outcome.tokens,
        outcome.seconds,
        outcome.tokens_per_second
    )
}

impl Prepared {
    /// Tokens of every sample.
    pub(super) fn lengths(&self) -> Vec<usize> {
        self.samples.iter().map(|sample| sample.ids.len()).collect()
    }

    /// What a plan is made of.
    pub(super) fn facts(&self) -> Facts<'_> {
        Facts {
            model: &self.opened.model,
            lengths: self.lengths(),
            report: &self.report,
            eval_report: self.eval_report.as_ref(),
            teacher_bytes: 0,
            at_once: true,
        }
    }
}

pub(super) fn prepare(
    config: &mut SftConfig,
    method_is_given: bool,
    output: Output,
) -> anyhow::Result<Prepared> {
    let opened = Opened::new(config, method_is_given)?;
    let encoder = &opened.encoder;
    let (rows, samples, report) = read(encoder, &config.data, None, config.max_length)?;
    output.warn(&config.data, &report);
    let languages = languages(&rows);
    let (mut eval_samples, mut eval_report, mut prompts) = (Vec::new(), None, Vec::new());
    if !config.eval_data.as_os_str().is_empty() {
        let path = &config.eval_data;
        let limit = Some(config.max_eval_samples);
        let (rows, eval, mut report) = read(encoder, path, limit, config.max_length)?;
        report.find_leaks(&eval, &samples);
        output.warn(path, &report);
        prompts = opened.prompts(path, &rows)?;
        (eval_samples, eval_report) = (eval, Some(report));
    }
    Ok(Prepared {
        opened,
        samples,
        report,
        eval_samples,
        eval_report,
        prompts,
        languages,
        base: Base::read(&config.model).with_context(|| format!("cannot read {}", config.model.display()))?,
    })
}

/// The rows of a file, as they are and as samples.
fn read(
    encoder: &Encoder,
    path: &Path,
    limit: Option<usize>,
    max_length: usize,
) -> anyhow::Result<(Rows, Vec<Sample>, DataReport)> {
    let rows = read_rows(path, limit)?;
    let (samples, report) = encoder.samples(path, &rows, max_length)?;
    Ok((rows, samples, report))
}

/// The values of the column `language`, sorted.
pub(super) fn languages(rows: &Rows) -> Vec<String> {
    let values = rows
        .rows
        .iter()
        .flatten()
        .filter_map(|row| row.columns.get("language")?.as_str());
    let values: std::collections::BTreeSet<&str> = values.collect();
    values.into_iter().map(str::to_owned).collect()
}

pub(super) fn train_options(config: &SftConfig, lengths: Vec<usize>) -> TrainOptions {
    let batch_size = config.per_device_train_batch_size;
    let sampling = Sampling {
        batch_size,
        packed_tokens: config.packing.then_some(batch_size * config.max_length),
        gradient_accumulation_steps: config.gradient_accumulation_steps,
        seed: config.seed,
    };
    let sampler = Sampler::new(lengths, sampling);
    let (steps, warmup_steps) = config.steps(|epochs| sampler.steps(epochs));
    TrainOptions {
        sampling,
        learner: LearnerOptions {
            optim: config.optim,
            adamw: AdamWOptions {
                beta1: config.adam_beta1,
                beta2: config.adam_beta2,
                epsilon: config.adam_epsilon,
                weight_decay: config.weight_decay,
            },
            max_grad_norm: config.max_grad_norm,
            gradient_checkpointing: config.gradient_checkpointing,
        },
        learning_rate: config.learning_rate,
        schedule: config.lr_scheduler_type,
        warmup_steps,
        steps,
        logging_steps: config.logging_steps,
        eval: config.eval_strategy.every(config.eval_steps),
        save: config.save_strategy.every(config.save_steps),
        early_stopping_patience: config.early_stopping_patience,
        early_stopping_threshold: config.early_stopping_threshold,
        loss_chunk: LOSS_CHUNK,
    }
}

/// Refuses a run whose result and checkpoints have no room, as far as that is known before.
pub(super) fn check_space(config: &SftConfig, options: &TrainOptions, trained: usize) -> anyhow::Result<()> {
    let saved = match options.save {
        When::Never => 0,
        When::Steps(steps) => options.steps / steps,
        When::Epoch => config.num_train_epochs as usize,
    };
    // One more than are kept: the oldest goes when the newest is whole.
    let kept = match config.save_total_limit {
        0 => saved,
        limit => saved.min(limit + 1),
    } + usize::from(config.load_best_model_at_end);
    // A checkpoint is what the run would end with, and three numbers of four bytes a weight.
    let needed = 4 * trained as u64 * (1 + 4 * kept as u64) + (8 << 20);
    let place = config.output_dir.ancestors().find(|dir| dir.is_dir());
    let free = free_bytes(place.unwrap_or(Path::new(".")));
    if free.is_some_and(|free| free < needed) {
        anyhow::bail!(
            "{} has too little space: the result and {kept} checkpoints need {} MiB\nhint: free some, name another place with -o, or lower --save-total-limit",
            config.output_dir.display(),
            needed >> 20
        );
    }
    Ok(())
}

/// The bytes that a user may still write there; none where the system does not say.
fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}
