//! `pipit-distill sft`: supervised fine-tuning, loss on the answers only.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use pipit_convert::output::write_file;
use serde::Serialize;
use serde_json::json;

use super::options::{Method, SftConfig, SftOptions, read_toml};
use super::run::{RunDir, refuse_existing};
use super::{Output, UsageError, adapter, refuse_gguf};
use crate::adapter::Adapter;
use crate::data::{DataReport, Encoder, Prompt, ReadRow, Sample, read_rows};
use crate::evaluate::{Answer, answers};
use crate::export::save_checkpoint;
use crate::model::Model;
use crate::optimizer::AdamWOptions;
use crate::rollout::Stop;
use crate::trainer::{Event, Outcome, TrainError, TrainOptions, train, with_deep_stack};

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
    pipit-distill sft --config sft.toml --max-steps 100 -o run-short"
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
    data: &'a DataReport,
    eval_data: Option<&'a DataReport>,
    version: &'a str,
}

/// Everything that is read before training starts.
struct Prepared {
    model: Model,
    adapter: Option<Adapter>,
    encoder: Encoder,
    samples: Vec<Sample>,
    report: DataReport,
    eval_samples: Vec<Sample>,
    eval_report: Option<DataReport>,
    prompts: Vec<Prompt>,
}

/// Runs the subcommand.
pub fn run(args: Args, output: Output) -> anyhow::Result<()> {
    let file = args
        .config
        .as_deref()
        .map(read_toml)
        .transpose()?
        .unwrap_or_default();
    let options = args.options.or(file);
    options.check()?;
    let method_is_given = options.method.is_some();
    let mut config = options.resolve(SftOptions::default());
    config.check()?;
    let stop = Arc::new(AtomicBool::new(false));
    let on_signal = stop.clone();
    ctrlc::set_handler(move || on_signal.store(true, Ordering::Relaxed))
        .context("cannot watch for Ctrl-C")?;
    with_deep_stack(|| sft(&mut config, method_is_given, output, &stop)).context("cannot start a thread")?
}

fn sft(
    config: &mut SftConfig,
    method_is_given: bool,
    output: Output,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    refuse_existing(&config.output_dir)?;
    let prepared = prepare(config, method_is_given, output)?;
    let config = &*config;
    let mut run = RunDir::create(&config.output_dir, config)?;
    let Prepared { model, encoder, .. } = &prepared;
    let options = train_options(config, prepared.samples.len());
    let trained: usize = model.trained().iter().map(|(_, var)| var.elem_count()).sum();
    let parameters = model.parameters();
    let free = free_bytes(run.path());
    let needed = 4 * trained as u64 + (8 << 20);
    if free.is_some_and(|free| free < needed) {
        anyhow::bail!(
            "{} has too little space: the result needs {} MiB\nhint: free some, or name another place with -o",
            config.output_dir.display(),
            needed >> 20
        );
    }
    if !output.quiet {
        eprintln!(
            "{} rows, {} tokens ({} trained on); {trained} of {parameters} parameters are trained; {} steps",
            prepared.report.used, prepared.report.tokens, prepared.report.trained_tokens, options.steps
        );
    }

    let bar = output.progress(options.steps as u64, BAR);
    let plain = bar.is_hidden() && !output.quiet;
    let mut written = Ok(());
    let result = train(
        model,
        &prepared.samples,
        &prepared.eval_samples,
        &options,
        stop,
        |event| match event {
            Event::Step(step, loss, speed) => {
                bar.set_position(step as u64);
                bar.set_message(format!("loss {loss:.3}, {speed:.0} tokens/s"));
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
                record(&mut written, run.metrics(&metrics));
            }
            Event::Evaluation(step, loss) => {
                bar.suspend(|| {
                    if !output.quiet {
                        eprintln!("step {step}  eval loss {loss:.4}");
                    }
                });
                record(
                    &mut written,
                    run.metrics(&json!({"step": step, "eval_loss": loss})),
                );
            }
        },
    );
    bar.finish_and_clear();
    let cannot = || format!("cannot write {}", config.output_dir.display());
    written.with_context(cannot)?;
    let outcome = match result {
        Ok(outcome) => outcome,
        Err(error) => return Err(save_bad_batch(config, error)),
    };

    let longest = model.longest();
    let samples: Vec<Answer> = answers(
        model,
        &prepared.prompts,
        &Stop::within(encoder.eos(), SAMPLE_TOKENS, longest, &prepared.prompts),
        |ids| encoder.decode(ids),
    )?;
    run.samples(&samples).with_context(cannot)?;
    match &prepared.adapter {
        Some(adapter) => adapter.save(model, run.path())?,
        None => save_checkpoint(model, &config.model, run.path()).with_context(cannot)?,
    }
    let summary = Summary {
        model: &config.model,
        method: config.method,
        output_dir: &config.output_dir,
        trained_parameters: trained,
        parameters,
        outcome: &outcome,
        data: &prepared.report,
        eval_data: prepared.eval_report.as_ref(),
        version: env!("CARGO_PKG_VERSION"),
    };
    run.summary(&summary).with_context(cannot)?;
    run.commit().with_context(cannot)?;
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

/// Keeps the first error: the loop cannot be left from its report.
fn record(kept: &mut std::io::Result<()>, new: std::io::Result<()>) {
    if kept.is_ok() {
        *kept = new;
    }
}

fn prepare(config: &mut SftConfig, method_is_given: bool, output: Output) -> anyhow::Result<Prepared> {
    refuse_gguf(&config.model)?;
    let train_all = config.method == Method::Full;
    let mut model = Model::open(&config.model, train_all)?;
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
    let (_, samples, report) = read(&encoder, &config.data, None, config.max_length, output)?;
    let (mut eval_samples, mut eval_report, mut prompts) = (Vec::new(), None, Vec::new());
    if !config.eval_data.as_os_str().is_empty() {
        let path = &config.eval_data;
        let (rows, samples, report) = read(
            &encoder,
            path,
            Some(config.max_eval_samples),
            config.max_length,
            output,
        )?;
        for row in rows.iter().flatten() {
            let prompt = encoder.prompt(path, row)?.filter(|prompt| !prompt.ids.is_empty());
            prompts.extend(prompt.filter(|prompt| prompt.ids.len() < longest));
            if prompts.len() == SAMPLES {
                break;
            }
        }
        (eval_samples, eval_report) = (samples, Some(report));
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
    })
}

/// The rows of a file, as they are and as samples, with a warning for what was left out.
fn read(
    encoder: &Encoder,
    path: &Path,
    limit: Option<usize>,
    max_length: usize,
    output: Output,
) -> anyhow::Result<(Vec<ReadRow>, Vec<Sample>, DataReport)> {
    let rows = read_rows(path, limit)?;
    let (samples, report) = encoder.samples(path, &rows, max_length)?;
    if !output.quiet {
        for warning in report.warnings() {
            eprintln!("warning: {}: {warning}", path.display());
        }
    }
    Ok((rows, samples, report))
}

fn train_options(config: &SftConfig, samples: usize) -> TrainOptions {
    let mut options = TrainOptions {
        batch_size: config.per_device_train_batch_size,
        gradient_accumulation_steps: config.gradient_accumulation_steps,
        learning_rate: config.learning_rate,
        schedule: config.lr_scheduler_type,
        warmup_steps: 0,
        adamw: AdamWOptions {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
        },
        max_grad_norm: config.max_grad_norm,
        steps: 0,
        seed: config.seed,
        logging_steps: config.logging_steps,
        eval_steps: config.eval_steps,
        loss_chunk: LOSS_CHUNK,
    };
    (options.steps, options.warmup_steps) = config.steps(options.steps_per_epoch(samples));
    options
}

/// The bytes that a user may still write where the run is made; none where the system does not say.
fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

/// Writes the rows of a batch that broke the numbers beside the run, to look at.
fn save_bad_batch(config: &SftConfig, error: TrainError) -> anyhow::Error {
    let TrainError::NotFinite { step, lines, .. } = &error else {
        return error.into();
    };
    let mut name = config.output_dir.as_os_str().to_owned();
    name.push(".bad-batch.json");
    let path = PathBuf::from(name);
    let report = json!({"data": config.data, "step": step, "lines": lines});
    let note = match write_file(&path, report.to_string().as_bytes()) {
        Ok(()) => format!("the lines of its batch are in {}", path.display()),
        Err(e) => format!(
            "its batch was lines {lines:?} ({} cannot be written: {e})",
            path.display()
        ),
    };
    anyhow::anyhow!("{error}\n{note}")
}
