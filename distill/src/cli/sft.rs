//! `pipit-distill sft`: supervised fine-tuning, loss on the answers only.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use serde::Serialize;

use super::log::RunLog;
use super::options::{Method, SftConfig, SftOptions, read_toml};
use super::plan;
use super::resume::Resume;
use super::run::{RunDir, refuse_existing};
use super::{Output, UsageError, adapter};
use crate::adapter::Adapter;
use crate::card::{Base, Card};
use crate::data::{DataReport, Encoder, Prompt, Rows, Sample, read_rows};
use crate::evaluate::{Answer, answers};
use crate::export::save_checkpoint;
use crate::memory;
use crate::model::{Keep, Model};
use crate::optimizer::AdamWOptions;
use crate::plan::{DataFile, Plan};
use crate::rollout::Stop;
use crate::trainer::{
    Checkpoints, Event, LearnerOptions, Outcome, Sampler, Sampling, TrainError, TrainOptions, When, train,
    with_deep_stack,
};

const BAR: &str = "{msg} {wide_bar} {pos}/{len} {elapsed}, {eta} to go";
/// Rows of the output layer at a time: 25 MB of logits for a vocabulary of 49,152.
const LOSS_CHUNK: usize = 128;
/// Answers in samples.jsonl, and their length.
const SAMPLES: usize = 8;
const SAMPLE_TOKENS: usize = 128;

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
struct Summary<'a> {
    model: &'a Path,
    method: Method,
    output_dir: &'a Path,
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
    fn of(config: &'a SftConfig, plan: &'a Plan, outcome: &'a Outcome) -> Self {
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
    pub(super) model: Model,
    adapter: Option<Adapter>,
    encoder: Encoder,
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
        if !output.quiet {
            for change in changes {
                eprintln!("warning: {change}: the result is not that of a run without a stop");
            }
        }
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
    let stop = Arc::new(AtomicBool::new(false));
    let on_signal = stop.clone();
    ctrlc::set_handler(move || on_signal.store(true, Ordering::Relaxed))
        .context("cannot watch for Ctrl-C")?;
    with_deep_stack(|| sft(&mut config, method_is_given, resume, output, &stop))
        .context("cannot start a thread")?
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
    let options = train_options(config, &prepared.samples);
    let plan = plan::of(config, &prepared, &options)?;
    check_space(config, &options, plan.parameters.trained)?;
    plan::warn(&plan, output);
    if !output.quiet {
        eprint!("{}", plan.text());
    }
    let settings = toml::to_string(&config.resolved()?)?;
    let run = match &resume {
        Some(resume) => {
            if !output.quiet {
                let checkpoint = resume.checkpoint.display();
                eprintln!("going on after step {} of {checkpoint}", resume.step);
            }
            RunDir::resume(&config.output_dir, &settings)?
        }
        None => RunDir::create(&config.output_dir, &settings)?,
    };
    let job = Job {
        config,
        prepared: &prepared,
        options: &options,
        plan: &plan,
    };
    let done = train_and_save(&job, resume, output, stop, &run);
    if done.is_err() {
        run.leave()
            .with_context(|| format!("cannot tidy {} up", config.output_dir.display()))?;
    }
    done
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
    let model = &prepared.model;
    let cannot = || format!("cannot write {}", config.output_dir.display());
    let name = config
        .output_dir
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    let done = resume.as_ref().map_or(0, |resume| resume.step);
    let mut log = RunLog::start(run.path(), &name, plan, done).with_context(cannot)?;
    let export = |dir: &Path| match &prepared.adapter {
        Some(adapter) => adapter.save(model, dir).map_err(Into::into),
        None => save_checkpoint(model, &config.model, dir).map_err(Into::into),
    };
    let checkpoints = Checkpoints {
        dir: run.path().to_path_buf(),
        export: &export,
        weights_in_export: prepared.adapter.is_none(),
        save_total_limit: config.save_total_limit,
        load_best_model_at_end: config.load_best_model_at_end,
        resume_from: resume.map(|resume| resume.checkpoint),
    };
    let bar = output.progress(options.steps as u64, BAR);
    let plain = bar.is_hidden() && !output.quiet;
    let say = |text: String| {
        if !output.quiet {
            bar.suspend(|| eprintln!("{text}"));
        }
    };
    let result = train(
        model,
        &prepared.samples,
        &prepared.eval_samples,
        options,
        Some(&checkpoints),
        stop,
        |event| match event {
            Event::Step(step, loss, speed) => {
                bar.set_position(step as u64);
                bar.set_message(format!("loss {loss:.3}, {speed:.0} tokens/s"));
                Ok(())
            }
            Event::Metrics(metrics) => {
                if plain {
                    eprintln!(
                        "step {}/{}  loss {:.4}  lr {:.2e}  grad {:.3}  {:.0} tokens/s  eta {:.0} s",
                        metrics.step,
                        options.steps,
                        metrics.loss,
                        metrics.learning_rate,
                        metrics.grad_norm,
                        metrics.tokens_per_second,
                        metrics.seconds / metrics.step as f64 * (options.steps - metrics.step) as f64
                    );
                }
                log.metrics(&metrics)
            }
            Event::Evaluation(step, loss) => {
                say(format!("step {step}  eval loss {loss:.4}"));
                let answers = prepared.answers().map_err(std::io::Error::other)?;
                log.evaluation(step, loss, &answers)
            }
            Event::Saved(step) => {
                tracing::info!("step {step}: a checkpoint is saved");
                Ok(())
            }
            Event::Stopped(step) => {
                say(format!(
                    "step {step}: the evaluation does not become better, so the run ends"
                ));
                Ok(())
            }
        },
    );
    bar.finish_and_clear();
    let outcome = match result {
        Ok(outcome) => outcome,
        Err(TrainError::Tell(e)) => return Err(e).with_context(cannot),
        Err(error) => return Err(run.explain(&config.data, error)),
    };

    let card = Card {
        name: &name,
        base: &prepared.base,
        adapter: prepared.adapter.is_some(),
        languages: &prepared.languages,
        plan,
        outcome: &outcome,
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
        println!(
            "{}: {} steps, loss {:.4}{eval}, {} tokens in {:.0} s ({:.0} tokens/s)",
            config.output_dir.display(),
            outcome.steps,
            outcome.loss,
            outcome.tokens,
            outcome.seconds,
            outcome.tokens_per_second
        );
    }
    Ok(())
}

impl Prepared {
    /// Greedy answers to some of the held-out rows.
    fn answers(&self) -> anyhow::Result<Vec<Answer>> {
        let longest = self.model.longest();
        let stop = Stop::within(self.encoder.eos(), SAMPLE_TOKENS, longest, &self.prompts);
        Ok(answers(&self.model, &self.prompts, &stop, |ids| {
            self.encoder.decode(ids)
        })?)
    }
}

pub(super) fn prepare(
    config: &mut SftConfig,
    method_is_given: bool,
    output: Output,
) -> anyhow::Result<Prepared> {
    let keep = match config.method {
        Method::Full => Keep::Trained,
        Method::Lora | Method::Prompt | Method::Prefix => Keep::Frozen,
        Method::Qlora => Keep::Nf4 {
            double_quant: config.bnb_4bit_use_double_quant,
        },
    };
    let mut model = Model::open_as(&config.model, keep)?;
    let encoder = Encoder::open(&config.model, model.config().vocab_size)?;
    let adapter = adapter::put_on(&mut model, &encoder, config, method_is_given)?;
    let longest = model.longest();
    if config.max_length == 0 {
        config.max_length = longest.min(1024);
    }
    if config.max_length > longest {
        let knows = model.config().max_position_embeddings;
        anyhow::bail!(UsageError::Usage(format!(
            "--max-length is {}, but the model was made for {knows} tokens (max_position_embeddings){}",
            config.max_length,
            if longest < knows {
                ", virtual ones among them"
            } else {
                ""
            }
        )));
    }
    if longest < 2 {
        anyhow::bail!(UsageError::Usage(
            "--num-virtual-tokens leaves no room for a sequence".into()
        ));
    }
    let (rows, samples, report) = read(&encoder, &config.data, None, config.max_length)?;
    output.warn(&config.data, &report);
    let languages = languages(&rows);
    let (mut eval_samples, mut eval_report, mut prompts) = (Vec::new(), None, Vec::new());
    if !config.eval_data.as_os_str().is_empty() {
        let path = &config.eval_data;
        let limit = Some(config.max_eval_samples);
        let (rows, eval, mut report) = read(&encoder, path, limit, config.max_length)?;
        report.find_leaks(&eval, &samples);
        output.warn(path, &report);
        for row in rows.rows.iter().flatten() {
            let prompt = encoder.prompt(path, row)?.filter(|prompt| !prompt.ids.is_empty());
            prompts.extend(prompt.filter(|prompt| prompt.ids.len() < longest));
            if prompts.len() == SAMPLES {
                break;
            }
        }
        (eval_samples, eval_report) = (eval, Some(report));
    }
    Ok(Prepared {
        model,
        adapter,
        encoder,
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
fn languages(rows: &Rows) -> Vec<String> {
    let values = rows
        .rows
        .iter()
        .flatten()
        .filter_map(|row| row.columns.get("language")?.as_str());
    let values: std::collections::BTreeSet<&str> = values.collect();
    values.into_iter().map(str::to_owned).collect()
}

pub(super) fn train_options(config: &SftConfig, samples: &[Sample]) -> TrainOptions {
    let batch_size = config.per_device_train_batch_size;
    let sampling = Sampling {
        batch_size,
        packed_tokens: config.packing.then_some(batch_size * config.max_length),
        gradient_accumulation_steps: config.gradient_accumulation_steps,
        seed: config.seed,
    };
    let sampler = Sampler::new(samples.iter().map(|sample| sample.ids.len()).collect(), sampling);
    let (steps, warmup_steps) = config.steps(|epochs| sampler.steps(epochs));
    TrainOptions {
        sampling,
        learner: LearnerOptions {
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
fn check_space(config: &SftConfig, options: &TrainOptions, trained: usize) -> anyhow::Result<()> {
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
