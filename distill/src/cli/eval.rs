//! `pipit-distill eval`: loss, perplexity, and exact match of greedy answers.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use serde_json::{Map, json};

use super::{Output, UsageError};
use crate::adapter::Adapter;
use crate::data::{Encoder, Prompt, Row, Sample, read_rows};
use crate::evaluate::{Figures, Score, Table, answers, loss_sum};
use crate::model::{Keep, Model};
use crate::rollout::Stop;
use crate::trainer::with_deep_stack;

const BAR: &str = "{msg} {wide_bar} {pos}/{len} {elapsed}, {eta} to go";

/// Measure loss, perplexity and exact match of a checkpoint on rows
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Answers that are both JSON are compared as JSON.\n\nExamples:\n  \
    pipit-distill eval --model smollm2 --data dev.jsonl --max-rows 100\n  \
    pipit-distill eval --model smollm2 --adapter run --data dev.jsonl --by language --json"
)]
pub struct Args {
    /// The checkpoint folder, or a GGUF file
    #[arg(long, value_name = "DIR|FILE.gguf")]
    model: PathBuf,
    /// An adapter folder in PEFT's layout
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The folder's weights in NF4, as --method qlora has them; a GGUF file has its own blocks
    #[arg(long)]
    load_in_4bit: bool,
    /// Over a GGUF file: round activations as llama.cpp does before it multiplies
    #[arg(long)]
    as_served: bool,
    /// Rows: `messages`, or `prompt` and `completion`, or `text`
    #[arg(long, value_name = "F.jsonl")]
    data: PathBuf,
    /// Use the first N rows only
    #[arg(long, value_name = "N")]
    max_rows: Option<usize>,
    /// Figures for each value of this column too
    #[arg(long, value_name = "COLUMN")]
    by: Option<String>,
    /// Rows that are answered at once
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch_size: usize,
    /// The most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Longer rows are cut to so many tokens, and reported
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_length: usize,
    /// Measure the loss only: no answers are generated
    #[arg(long)]
    no_generate: bool,
}

/// Runs the subcommand.
pub fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    if args.batch_size == 0 || args.max_length < 2 {
        anyhow::bail!(UsageError::Usage(
            "--batch-size must be at least 1, --max-length at least 2".into()
        ));
    }
    for (flag, given, file) in [
        ("--load-in-4bit", args.load_in_4bit, false),
        ("--as-served", args.as_served, true),
    ] {
        if given && args.model.is_file() != file {
            let wanted = if file {
                "a GGUF file"
            } else {
                "a checkpoint folder"
            };
            anyhow::bail!(UsageError::Usage(format!("{flag} needs {wanted} as --model")));
        }
    }
    let stop = Arc::new(AtomicBool::new(false));
    let on_signal = stop.clone();
    ctrlc::set_handler(move || on_signal.store(true, Ordering::Relaxed))
        .context("cannot watch for Ctrl-C")?;
    with_deep_stack(|| evaluate(args, output, &stop)).context("cannot start a thread")?
}

fn evaluate(args: &Args, output: Output, stop: &AtomicBool) -> anyhow::Result<()> {
    let keep = match (args.load_in_4bit, args.as_served) {
        (true, _) => Keep::Nf4 { double_quant: true },
        (_, true) => Keep::Served,
        _ => Keep::Frozen,
    };
    let mut model = Model::open_as(&args.model, keep)?;
    if let Some(dir) = &args.adapter {
        Adapter::load(&mut model, dir)?;
    }
    let encoder = Encoder::open(&args.model, model.config().vocab_size)?;
    let longest = model.longest();
    let rows = read_rows(&args.data, args.max_rows)?;
    let (samples, report) = encoder.samples(&args.data, &rows, args.max_length.min(longest))?;
    if !output.quiet {
        for warning in report.warnings() {
            eprintln!("warning: {}: {warning}", args.data.display());
        }
    }
    // A row is scored when it became a sample.
    let by_line = |sample: &Sample| rows.iter().flatten().find(|row| row.line == sample.line);
    let mut items: Vec<(&Sample, &Row)> = samples.iter().filter_map(|s| Some((s, by_line(s)?))).collect();
    if let Some(column) = &args.by
        && !items.iter().any(|(_, row)| row.columns.contains_key(column))
    {
        let mut names: Vec<&str> = items
            .iter()
            .flat_map(|(_, row)| row.columns.keys())
            .map(String::as_str)
            .collect();
        names.sort_unstable();
        names.dedup();
        anyhow::bail!(UsageError::Usage(format!(
            "--by {column}: no row has this column\nhint: the columns are {}",
            if names.is_empty() {
                "none".into()
            } else {
                names.join(", ")
            }
        )));
    }
    // Rows of one length together: a batch goes on until its longest answer ends.
    items.sort_by_key(|(sample, _)| sample.ids.len());

    let bar = output.progress(items.len() as u64, BAR);
    let mut table = Table::default();
    let (mut too_long, mut done) = (0, 0);
    for part in items.chunks(args.batch_size) {
        if stop.load(Ordering::Relaxed) {
            anyhow::bail!("interrupted after {done} of {} rows", items.len());
        }
        let mut scores = vec![Score::default(); part.len()];
        for (score, (sample, _)) in scores.iter_mut().zip(part) {
            score.rows = 1;
            score.loss_sum = loss_sum(&model, &[sample])?;
            score.tokens = sample.labels.iter().skip(1).filter(|label| **label >= 0).count();
        }
        let mut prompts: Vec<(usize, Prompt)> = Vec::new();
        for (i, (_, row)) in part.iter().enumerate().filter(|_| !args.no_generate) {
            match encoder.prompt(&args.data, row)? {
                Some(prompt) if prompt.ids.is_empty() => {}
                Some(prompt) if prompt.ids.len() >= longest => too_long += 1,
                Some(prompt) => prompts.push((i, prompt)),
                None => {}
            }
        }
        let (places, prompts): (Vec<usize>, Vec<Prompt>) = prompts.into_iter().unzip();
        let stop = Stop::within(encoder.eos(), args.max_new_tokens, longest, &prompts);
        for (i, answer) in places
            .into_iter()
            .zip(answers(&model, &prompts, &stop, |ids| encoder.decode(ids))?)
        {
            tracing::debug!(
                question = answer.question,
                answer = answer.answer,
                expected = answer.expected,
                exact = answer.exact
            );
            scores[i].answered = 1;
            scores[i].exact = usize::from(answer.exact);
        }
        for (score, (_, row)) in scores.iter().zip(part) {
            let value = args.by.as_ref().map(|column| match row.columns.get(column) {
                Some(serde_json::Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
                None => "(none)".to_owned(),
            });
            table.add(value.as_deref(), score);
        }
        done += part.len();
        bar.set_position(done as u64);
        let figures = table.all.figures();
        let message = format!("loss {:.3}", figures.loss.unwrap_or(f64::NAN));
        if bar.is_hidden() && !output.quiet {
            eprintln!("{done}/{} rows  {message}", items.len());
        }
        bar.set_message(message);
    }
    bar.finish_and_clear();
    if too_long > 0 && !output.quiet {
        eprintln!("warning: {too_long} rows have no answer: the prompt fills the model's {longest} tokens");
    }
    print(args, output, &table, &report)
}

fn print(args: &Args, output: Output, table: &Table, report: &crate::data::DataReport) -> anyhow::Result<()> {
    if output.json {
        let mut json = Map::new();
        json.insert("model".into(), json!(args.model));
        json.insert("adapter".into(), json!(args.adapter));
        json.insert("data".into(), json!(report));
        if let serde_json::Value::Object(figures) = json!(table.all.figures()) {
            json.extend(figures);
        }
        if args.by.is_some() {
            let by: Map<_, _> = table
                .by
                .iter()
                .map(|(value, score)| (value.clone(), json!(score.figures())))
                .collect();
            json.insert("by".into(), json!(by));
        }
        println!("{}", serde_json::Value::Object(json));
        return Ok(());
    }
    let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
    let line = |name: &str, figures: &Figures| {
        let exact = figures.exact_match.map_or("-".to_owned(), |share| {
            format!(
                "{:.1} % ({} of {})",
                share * 100.0,
                figures.exact,
                figures.answered
            )
        });
        println!(
            "{name:<12} {:>9} {:>11}  {exact}",
            shown(figures.loss),
            shown(figures.perplexity)
        );
    };
    println!(
        "{:<12} {:>9} {:>11}  exact match",
        args.by.as_deref().unwrap_or(""),
        "loss",
        "perplexity"
    );
    for (value, score) in &table.by {
        line(value, &score.figures());
    }
    line("all", &table.all.figures());
    Ok(())
}
