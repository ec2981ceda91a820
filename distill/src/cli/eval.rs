//! `pipit-distill eval`: loss, perplexity, and exact match of greedy answers.

mod distance;

use std::collections::HashMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use pipit_convert::output::OutputFile;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Output, UsageError, interruptible};
use crate::adapter::Adapter;
use crate::data::{DataReport, Encoder, Prompt, Row, Sample, read_rows};
use crate::evaluate::{Answer, Figures, Score, Table, answers, loss_sum};
use crate::model::{Keep, Model};
use crate::opd::Divergence;
use crate::rollout::Stop;

const BAR: &str = "{msg} {wide_bar} {pos}/{len} {elapsed}, {eta} to go";

/// Measure loss, perplexity and exact match of a checkpoint on rows
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Answers that are both JSON are compared as JSON; where answers should be JSON objects, the share of\n\
    valid ones and of right values by key is shown too.\n\nExamples:\n  \
    pipit-distill eval --model smollm2 --data dev.jsonl --max-rows 100\n  \
    pipit-distill eval --model smollm2 --adapter run --data dev.jsonl --by language --json\n  \
    pipit-distill eval --model student.gguf --data dev.jsonl --teacher teacher"
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
    /// Where to compute: the CPU, or a GPU that this program was built for
    #[arg(long, value_name = "cpu|cuda[:N]|metal[:N]", default_value = "cpu")]
    device: String,
    /// On a GPU: compute in bfloat16
    #[arg(long)]
    bf16: bool,
    /// On a GPU: compute in float16
    #[arg(long)]
    fp16: bool,
    /// Rows: `messages`, or `prompt` and `completion`, or `text`
    #[arg(long, value_name = "F.jsonl|F.parquet")]
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
    /// Another model: how far this one is from it on the rows' answers. A GGUF file runs in llama.cpp for that
    #[arg(long, value_name = "DIR|FILE.gguf")]
    teacher: Option<String>,
    /// Write every row's question, expected answer, answer and loss to this file
    #[arg(long, value_name = "F.jsonl", conflicts_with = "no_generate")]
    samples: Option<PathBuf>,
}

/// Runs the subcommand.
pub fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    if args.batch_size == 0 || args.max_length < 2 {
        anyhow::bail!(UsageError::Usage(
            "--batch-size must be at least 1, --max-length at least 2".into()
        ));
    }
    if args.load_in_4bit && args.model.is_file() {
        anyhow::bail!(UsageError::Usage(
            "--load-in-4bit needs a checkpoint folder as --model: a GGUF file has its own blocks".into()
        ));
    }
    interruptible(|stop| evaluate(args, output, stop))
}

fn evaluate(args: &Args, output: Output, stop: &AtomicBool) -> anyhow::Result<()> {
    let keep = match args.load_in_4bit {
        true => Keep::Nf4 { double_quant: true },
        false => Keep::Frozen,
    };
    let place = super::place(&args.device, args.bf16, args.fp16)?;
    let mut model = Model::open_on(&args.model, keep, &place)?;
    if let Some(dir) = &args.adapter {
        Adapter::load(&mut model, dir)?;
    }
    let encoder = Encoder::open(&args.model, model.config().vocab_size)?;
    let longest = model.longest();
    let rows = read_rows(&args.data, args.max_rows)?;
    let (samples, report) = encoder.samples(&args.data, &rows, args.max_length.min(longest))?;
    output.warn(&args.data, &report);
    // A row is scored when it became a sample.
    let by_line: HashMap<usize, &Row> = rows.rows.iter().flatten().map(|row| (row.line, row)).collect();
    let mut items: Vec<(&Sample, &Row)> = samples
        .iter()
        .filter_map(|sample| Some((sample, *by_line.get(&sample.line)?)))
        .collect();
    if let Some(column) = &args.by {
        check_column(column, &items)?;
    }
    // Rows of one length together: a batch goes on until its longest answer ends.
    items.sort_by_key(|(sample, _)| sample.ids.len());

    let bar = output.progress(items.len() as u64, BAR);
    let mut table = Table::default();
    let mut written: Vec<Line> = Vec::new();
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
        let group = |row: &Row| args.by.as_ref().map(|column| shown(row.columns.get(column)));
        let (places, prompts): (Vec<usize>, Vec<Prompt>) = prompts.into_iter().unzip();
        let stop = Stop::within(encoder.eos(), args.max_new_tokens, longest, &prompts);
        let answers = answers(&model, &prompts, &stop, |ids| encoder.decode(ids))?;
        for (i, answer) in places.into_iter().zip(answers) {
            scores[i].answer(&answer);
            if args.samples.is_some() {
                written.push(Line {
                    line: part[i].1.line,
                    by: group(part[i].1),
                    answer,
                    loss: scores[i].figures().loss,
                });
            }
        }
        for (score, (_, row)) in scores.iter().zip(part) {
            table.add(group(row).as_deref(), score);
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
    if let Some(path) = &args.samples {
        written.sort_by_key(|line| line.line);
        write_lines(path, &written).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let scored: Vec<&Sample> = items.iter().map(|(sample, _)| *sample).collect();
    let distance = match &args.teacher {
        Some(spec) => Some(distance::measure(args, spec, &model, &encoder, &scored)?),
        None => None,
    };
    print(args, output, &table, &report, distance.as_ref())
}

/// A line of `--samples`.
#[derive(Debug, Serialize)]
struct Line {
    line: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<String>,
    #[serde(flatten)]
    answer: Answer,
    loss: Option<f64>,
}

fn write_lines(path: &std::path::Path, lines: &[Line]) -> std::io::Result<()> {
    let mut file = OutputFile::create(path)?;
    for line in lines {
        writeln!(file.file_mut(), "{}", serde_json::to_string(line)?)?;
    }
    file.commit()
}

/// A column's value as the name of a group.
fn shown(value: Option<&Value>) -> String {
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => "(none)".to_owned(),
    }
}

fn check_column(column: &str, items: &[(&Sample, &Row)]) -> anyhow::Result<()> {
    let mut names: Vec<&str> = items
        .iter()
        .flat_map(|(_, row)| row.columns.keys())
        .map(String::as_str)
        .collect();
    names.sort_unstable();
    names.dedup();
    if names.contains(&column) {
        return Ok(());
    }
    let names = match names.is_empty() {
        true => "none".to_owned(),
        false => names.join(", "),
    };
    anyhow::bail!(UsageError::Usage(format!(
        "--by {column}: no row has this column\nhint: the columns are {names}"
    )))
}

fn print(
    args: &Args,
    output: Output,
    table: &Table,
    report: &DataReport,
    distance: Option<&Divergence>,
) -> anyhow::Result<()> {
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
        if let Some(distance) = distance {
            json.insert("teacher".into(), json!(args.teacher));
            json.insert("divergence".into(), json!(distance));
        }
        println!("{}", serde_json::Value::Object(json));
        return Ok(());
    }
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
    let percent =
        |value: Option<f64>| value.map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0));
    let all = table.all.figures();
    let fields: Vec<&String> = all.fields.keys().collect();
    let line = |name: &str, figures: &Figures| {
        let exact = match figures.exact_match {
            Some(_) => format!(
                "{} ({} of {})",
                percent(figures.exact_match),
                figures.exact,
                figures.answered
            ),
            None => "-".to_owned(),
        };
        let (loss, perplexity) = (number(figures.loss), number(figures.perplexity));
        print!("{name:<12} {loss:>9} {perplexity:>11}  {exact:<22}");
        if all.valid_json.is_some() {
            print!(" {:>10}", percent(figures.valid_json));
        }
        for field in &fields {
            let width = field.chars().count().max(8);
            print!(" {:>width$}", percent(figures.fields.get(*field).copied()));
        }
        println!();
    };
    let group = args.by.as_deref().unwrap_or("");
    print!(
        "{group:<12} {:>9} {:>11}  {:<22}",
        "loss", "perplexity", "exact match"
    );
    if all.valid_json.is_some() {
        print!(" {:>10}", "valid JSON");
    }
    for field in &fields {
        print!(" {field:>8}");
    }
    println!();
    for (value, score) in &table.by {
        line(value, &score.figures());
    }
    line("all", &all);
    if let Some(distance) = distance {
        println!(
            "KL(teacher || model) {} nats a token, the same most probable token at {}",
            number(distance.forward_kl),
            percent(distance.top1_agreement)
        );
    }
    Ok(())
}
