//! `pipit-distill generate`: a teacher's answers as rows to train on.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use pipit_convert::checksum;
use serde_json::json;

use super::{Output, UsageError, interruptible};
use crate::data::{DataReport, Row, Rows, read_prompts};
use crate::generate::{GenerateError, Journal, Outcome, Place, Settings, open, outcome};
use crate::teacher::served::{ServedOptions, api_key_from_environment};

const BAR: &str = "{msg} {wide_bar} {pos}/{len} {elapsed}, {eta} to go";
/// Rows between two writes are so many times those that are answered at once: a run that is killed loses no more.
const BATCHES: usize = 4;

/// Let a teacher answer prompts: rows for sft, whatever the teacher's tokenizer
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A run that is stopped goes on when it is called again with the same arguments. What gives no row (an answer that\n\
    is cut or empty, a prompt that does not fit) is written to F.rejected.jsonl with the reason. A server's key is read\n\
    from PIPIT_TEACHER_API_KEY.\n\nExamples:\n  \
    pipit-distill generate --teacher big.gguf --prompts prompts.jsonl -o answers.jsonl\n  \
    pipit-distill generate --teacher http://box:8000 --prompts prompts.jsonl --temperature 0.7 --num-generations 4 -o answers.jsonl\n  \
    pipit-distill sft --model student --data answers.jsonl -o run"
)]
pub struct Args {
    /// A checkpoint folder, a GGUF file, or the address of an OpenAI-compatible server
    #[arg(long, value_name = "DIR|FILE.gguf|URL")]
    teacher: String,
    /// An adapter in PEFT's layout that the checkpoint carries
    #[arg(long, value_name = "DIR")]
    teacher_adapter: Option<PathBuf>,
    /// The model's name on the server
    #[arg(long, value_name = "NAME")]
    teacher_model: Option<String>,
    /// Requests to the server at one time
    #[arg(long, value_name = "N", default_value_t = 4)]
    teacher_requests: usize,
    /// Rows of `messages`, or of `prompt`; answers in them are replaced
    #[arg(long, value_name = "F.jsonl|F.parquet")]
    prompts: PathBuf,
    /// The file to write: the rows with the teacher's answers
    #[arg(short = 'o', long, value_name = "F.jsonl")]
    output: PathBuf,
    /// Use the first N rows only
    #[arg(long, value_name = "N")]
    max_rows: Option<usize>,
    /// The most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_new_tokens: usize,
    /// The temperature of the drawing; 0 takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Draw from so many of the most probable tokens; 0 from all
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: usize,
    /// Draw from the most probable tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Answers to each prompt
    #[arg(long, value_name = "N", default_value_t = 1)]
    num_generations: usize,
    /// The same seed gives the same answers
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Answers that are drawn at one time, where the teacher is not a server
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch_size: usize,
    /// Keep answers that were cut at --max-new-tokens among the others
    #[arg(long)]
    keep_cut: bool,
}

/// Runs the subcommand.
pub fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    check(args)?;
    interruptible(|stop| generate(args, output, stop))
}

fn check(args: &Args) -> anyhow::Result<()> {
    let usage = |text: String| Err(UsageError::Usage(text).into());
    for (flag, value) in [
        ("--max-new-tokens", args.max_new_tokens),
        ("--num-generations", args.num_generations),
        ("--batch-size", args.batch_size),
        ("--teacher-requests", args.teacher_requests),
        ("--max-rows", args.max_rows.unwrap_or(1)),
    ] {
        if value == 0 {
            return usage(format!("{flag} must be at least 1"));
        }
    }
    for (flag, value, low, high) in [
        ("--temperature", args.temperature, 0.0, 100.0),
        ("--top-p", args.top_p, f64::MIN_POSITIVE, 1.0),
    ] {
        if !(low..=high).contains(&value) {
            return usage(format!("{flag} is {value}, which is out of range"));
        }
    }
    if args.num_generations > 1 && args.temperature == 0.0 {
        return usage(
            "--num-generations needs a --temperature above 0: without, all answers are the same".into(),
        );
    }
    if args.output.exists() {
        anyhow::bail!(
            "{} exists already\nhint: name another file with -o, or remove it first",
            args.output.display()
        );
    }
    Ok(())
}

impl Args {
    fn settings(&self) -> anyhow::Result<Settings> {
        let cannot = || format!("cannot read {}", self.prompts.display());
        Ok(Settings {
            teacher: self.teacher.clone(),
            adapter: self.teacher_adapter.clone(),
            model: self.teacher_model.clone(),
            prompts_sha256: checksum::sha256(&self.prompts).with_context(cannot)?,
            max_rows: self.max_rows,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            max_new_tokens: self.max_new_tokens,
            num_generations: self.num_generations,
            seed: self.seed,
            keep_cut: self.keep_cut,
        })
    }
}

fn generate(args: &Args, output: Output, stop: &AtomicBool) -> anyhow::Result<()> {
    let rows = read_prompts(&args.prompts, args.max_rows)?;
    warn(args, &rows, output);
    let settings = args.settings()?;
    let served = ServedOptions {
        model: args.teacher_model.clone(),
        concurrency: args.teacher_requests,
        api_key: api_key_from_environment(),
        ..ServedOptions::default()
    };
    let teacher = open(&settings, served)?;
    let mut journal = Journal::open(&args.output, &settings)?;
    take_broken(&mut journal, &rows)?;

    let places = |row: &Row| {
        let line = row.line;
        (0..settings.num_generations).map(move |generation| Place { line, generation })
    };
    let all: Vec<&Row> = rows.rows.iter().flatten().collect();
    let is_done = |row: &&&Row| places(row).all(|place| journal.done().contains_key(&place));
    let done_before = all.iter().filter(is_done).count();
    // Prompts of one length together, as they go through the model together.
    let mut open: Vec<&Row> = all.iter().filter(|row| !is_done(row)).copied().collect();
    open.sort_by_key(|row| content_length(row));
    let bar = output.progress(all.len() as u64, BAR);
    bar.set_position(done_before as u64);
    let mut done = done_before;
    if done > 0 && !output.quiet {
        eprintln!("{done} of {} prompts were answered before", all.len());
    }
    let at_once = (args.batch_size.max(args.teacher_requests) * BATCHES).div_ceil(settings.num_generations);
    for part in open.chunks(at_once) {
        if stop.load(Ordering::Relaxed) {
            anyhow::bail!(
                "interrupted after {done} of {} prompts\nhint: the same arguments go on",
                all.len()
            );
        }
        let answers = teacher.answers(&args.prompts, part, &settings, args.batch_size)?;
        let jobs = part
            .iter()
            .flat_map(|row| places(row).map(move |place| (*row, place)));
        let outcomes = jobs.zip(answers).map(|((row, place), told)| {
            (
                place,
                outcome(row, place, &settings.teacher, told, settings.keep_cut),
            )
        });
        journal.add(outcomes.collect())?;
        done += part.len();
        bar.set_position(done as u64);
        if bar.is_hidden() && !output.quiet {
            eprintln!("{done}/{} prompts", all.len());
        }
    }
    bar.finish_and_clear();
    report(args, journal, output)
}

fn content_length(row: &Row) -> usize {
    match &row.content {
        crate::data::Content::Messages(messages) => messages
            .iter()
            .map(|message| message["content"].as_str().map_or(0, str::len))
            .sum(),
        crate::data::Content::Completion { prompt, .. } => prompt.len(),
        crate::data::Content::Text(text) => text.len(),
    }
}

fn warn(args: &Args, rows: &Rows, output: Output) {
    let report = DataReport {
        rows: rows.rows.len(),
        beyond_limit: rows.beyond_limit,
        broken: rows
            .rows
            .iter()
            .filter_map(|row| row.as_ref().err().cloned())
            .collect(),
        ..DataReport::default()
    };
    output.warn(&args.prompts, &report);
}

/// Lines that are no rows are among what gives none.
fn take_broken(journal: &mut Journal, rows: &Rows) -> Result<(), GenerateError> {
    let broken = rows.rows.iter().filter_map(|row| row.as_ref().err());
    let broken = broken.map(|(line, why)| {
        let place = Place {
            line: *line,
            generation: 0,
        };
        let why = why.clone();
        (place, Outcome::Rejected { why, answer: None })
    });
    let new: Vec<_> = broken
        .filter(|(place, _)| !journal.done().contains_key(place))
        .collect();
    match new.is_empty() {
        true => Ok(()),
        false => journal.add(new),
    }
}

fn report(args: &Args, journal: Journal, output: Output) -> anyhow::Result<()> {
    let rejected: Vec<String> = journal
        .done()
        .values()
        .filter_map(|outcome| match outcome {
            Outcome::Row(_) => None,
            Outcome::Rejected { why, .. } => Some(why.clone()),
        })
        .collect();
    let answers = journal.done().len() - rejected.len();
    journal
        .finish(&args.output)
        .with_context(|| format!("cannot write {}", args.output.display()))?;
    let rejected_path = Journal::rejected_path(&args.output);
    if output.json {
        let file = (!rejected.is_empty()).then_some(&rejected_path);
        println!(
            "{}",
            json!({"output": args.output, "answers": answers, "rejected": rejected.len(), "rejected_output": file})
        );
        return Ok(());
    }
    println!("{}: {answers} answers of {}", args.output.display(), args.teacher);
    if let Some(why) = rejected.first() {
        println!(
            "{}: {} without one, the first for: {why}",
            rejected_path.display(),
            rejected.len()
        );
    }
    Ok(())
}
