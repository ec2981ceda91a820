//! `pipit-distill shrink`: a checkpoint with fewer blocks, heads and channels.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use pipit_convert::checkpoint::Checkpoint;
use pipit_convert::model::{Plan, SourceModel};
use pipit_convert::output::{OutputDir, write_file};
use pipit_convert::quantize::{FileType, Recipe};
use serde::Serialize;

use super::options::{List, parse_list};
use super::{Output, UsageError, interruptible};
use crate::data::{Encoder, Sample, read_rows};
use crate::evaluate::loss_sum;
use crate::model::{Config, Keep, Model};
use crate::shrink::{KeptBlock, Measured, Sizes, check_layers, keep, measure, most_influential, write};

const BAR: &str = "{msg} {wide_bar} {pos}/{len} {elapsed}, {eta} to go";

/// Make a smaller checkpoint out of a larger one: the start of a student
#[derive(Debug, clap::Args)]
#[command(
    after_help = "What stays keeps its weights; the result is an ordinary checkpoint, and worse than the whole one until it is\n\
    trained. --data is text of the kind that the student is for.\n\nExamples:\n  \
    pipit-distill shrink --model smollm2 --layers 10 --data train.jsonl -o student\n  \
    pipit-distill shrink --model smollm2 --keep-layers 0,3,6,9,12,15,18,21,24,29 -o student\n  \
    pipit-distill shrink --model smollm2 --intermediate-size 1024 --num-attention-heads 6 --data train.jsonl -o student"
)]
pub struct Args {
    /// The checkpoint folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The blocks that stay, from 0, in their order
    #[arg(long, value_parser = parse_list::<usize>, value_name = "N,…", conflicts_with = "layers")]
    keep_layers: Option<List<usize>>,
    /// The number of blocks that stay: those with the largest influence on --data
    #[arg(long, value_name = "N", requires = "data")]
    layers: Option<usize>,
    /// Channels of each feed-forward layer that stay: those with the largest activations on --data
    #[arg(long, value_name = "N", requires = "data")]
    intermediate_size: Option<usize>,
    /// Query heads of each block that stay, likewise
    #[arg(long, value_name = "N", requires = "data")]
    num_attention_heads: Option<usize>,
    /// Key and value heads of each block that stay, likewise, with the query heads that they serve
    #[arg(long, value_name = "N", requires = "data")]
    num_key_value_heads: Option<usize>,
    /// Rows to measure on: `messages`, or `prompt` and `completion`, or `text`
    #[arg(long, value_name = "F.jsonl|F.parquet")]
    data: Option<PathBuf>,
    /// Use the first N rows only
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_rows: usize,
    /// Longer rows are cut to so many tokens, and reported
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_length: usize,
    /// The folder to make
    #[arg(short = 'o', long, value_name = "DIR")]
    output_dir: PathBuf,
}

/// What was done: `shrink.json` in the folder.
#[derive(Debug, Serialize)]
struct Done {
    model: PathBuf,
    layers: Vec<usize>,
    #[serde(flatten)]
    sizes: KeptSizes,
    parameters: usize,
    parameters_before: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<MeasuredDone>,
}

#[derive(Debug, Serialize)]
struct KeptSizes {
    num_attention_heads: usize,
    num_key_value_heads: usize,
    intermediate_size: usize,
}

#[derive(Debug, Serialize)]
struct MeasuredDone {
    data: PathBuf,
    rows: usize,
    tokens: usize,
    /// Of every block of the model.
    influence: Vec<f64>,
    /// Nats a token of the answers.
    loss_before: f64,
    loss: f64,
}

/// Runs the subcommand.
pub fn run(args: &Args, output: Output) -> anyhow::Result<()> {
    let usage = |text: &str| Err(UsageError::Usage(text.into()).into());
    let sizes = args.sizes();
    if args.keep_layers.is_none() && args.layers.is_none() && !sizes.any() {
        return usage(
            "nothing is to go\nhint: --keep-layers, --layers, --intermediate-size, --num-attention-heads, --num-key-value-heads",
        );
    }
    if args.max_rows == 0 || args.max_length < 2 {
        return usage("--max-rows must be at least 1, --max-length at least 2");
    }
    if args.model.is_file() {
        anyhow::bail!(
            "{}: the blocks of a GGUF file are not cut\nhint: pipit-convert import {0} -o FOLDER makes a checkpoint of it",
            args.model.display()
        );
    }
    if args.output_dir.exists() {
        anyhow::bail!(
            "{} exists already\nhint: name another folder with -o, or remove it first",
            args.output_dir.display()
        );
    }
    interruptible(|stop| shrink(args, sizes, output, stop))
}

impl Args {
    fn sizes(&self) -> Sizes {
        Sizes {
            intermediate_size: self.intermediate_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
        }
    }
}

fn shrink(args: &Args, sizes: Sizes, output: Output, stop: &AtomicBool) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let config = Config::read(&checkpoint)?;
    let all = config.num_hidden_layers;
    // What is wrong with the call is said before anything is measured.
    if let Some(List(layers)) = &args.keep_layers {
        check_layers(layers, all)?;
    }
    let samples = match &args.data {
        Some(data) => samples(args, data, &config, output)?,
        None => Vec::new(),
    };
    let measured = match samples.is_empty() {
        true => None,
        false => Some(measure_model(args, &samples, output, stop)?),
    };
    let layers = match (&args.keep_layers, args.layers, &measured) {
        (Some(List(layers)), ..) => layers.clone(),
        (None, Some(count), Some(measured)) => most_influential(&measured.influence, count)?,
        _ => (0..all).collect(),
    };
    let kept = keep(&config, &layers, sizes, measured.as_ref())?;

    let dir = OutputDir::create(&args.output_dir)
        .with_context(|| format!("cannot make {}", args.output_dir.display()))?;
    write(&checkpoint, &kept, dir.path())?;
    // The result is read as anybody reads it, before it gets its name.
    let student = Model::open_as(dir.path(), Keep::Frozen)?;
    let measured = match &measured {
        Some(measured) => Some(done(args, measured, &student, &samples, stop)?),
        None => None,
    };
    let done = report(args, &checkpoint, &kept, layers, &student, measured)?;
    let text = serde_json::to_string_pretty(&done)?;
    write_file(&dir.path().join("shrink.json"), format!("{text}\n").as_bytes())?;
    if let (Err(why), false) = (converts(dir.path()), output.quiet) {
        eprintln!("warning: pipit-convert makes no GGUF file of this: {why}");
    }
    dir.commit()
        .with_context(|| format!("cannot write {}", args.output_dir.display()))?;
    print(args, &done, output)
}

fn samples(args: &Args, data: &Path, config: &Config, output: Output) -> anyhow::Result<Vec<Sample>> {
    let encoder = Encoder::open(&args.model, config.vocab_size)?;
    let rows = read_rows(data, Some(args.max_rows))?;
    let longest = args.max_length.min(config.max_position_embeddings);
    let (samples, report) = encoder.samples(data, &rows, longest)?;
    output.warn(data, &report);
    Ok(samples)
}

fn measure_model(
    args: &Args,
    samples: &[Sample],
    output: Output,
    stop: &AtomicBool,
) -> anyhow::Result<Measured> {
    let mut model = Model::open_as(&args.model, Keep::Frozen)?;
    let bar = output.progress(samples.len() as u64, BAR);
    bar.set_message("measuring");
    let measured = measure(&mut model, samples, |done| {
        bar.set_position(done as u64);
        go_on(stop)
    });
    bar.finish_and_clear();
    measured
}

fn go_on(stop: &AtomicBool) -> anyhow::Result<()> {
    match stop.load(Ordering::Relaxed) {
        true => Err(anyhow::anyhow!("interrupted; nothing was written")),
        false => Ok(()),
    }
}

fn done(
    args: &Args,
    measured: &Measured,
    student: &Model,
    samples: &[Sample],
    stop: &AtomicBool,
) -> anyhow::Result<MeasuredDone> {
    let mut sum = 0.0;
    for sample in samples {
        go_on(stop)?;
        sum += loss_sum(student, &[sample])?;
    }
    let labels = measured.labels as f64;
    Ok(MeasuredDone {
        data: args.data.clone().unwrap_or_default(),
        rows: samples.len(),
        tokens: measured.tokens,
        influence: measured.influence.clone(),
        loss_before: measured.loss_sum / labels,
        loss: sum / labels,
    })
}

fn report(
    args: &Args,
    checkpoint: &Checkpoint,
    kept: &[KeptBlock],
    layers: Vec<usize>,
    student: &Model,
    measured: Option<MeasuredDone>,
) -> anyhow::Result<Done> {
    let mut before = 0;
    for name in checkpoint.names() {
        before += checkpoint.tensor(name)?.elements();
    }
    let size = |of: fn(&KeptBlock) -> usize| kept.first().map_or(0, of);
    Ok(Done {
        model: args.model.clone(),
        layers,
        sizes: KeptSizes {
            num_attention_heads: size(|block| block.heads.len()),
            num_key_value_heads: size(|block| block.kv_heads.len()),
            intermediate_size: size(|block| block.channels.len()),
        },
        parameters: student.parameters(),
        parameters_before: before,
        measured,
    })
}

/// Whether the converter takes the checkpoint: not every order of blocks with windows has a place in a GGUF file.
fn converts(dir: &Path) -> anyhow::Result<()> {
    let kind = FileType::from_name("F16").context("no F16")?;
    let (source, recipe) = (SourceModel::open(dir)?, Recipe::new(kind));
    Plan::new(&source, &[], &recipe)?;
    Ok(())
}

fn print(args: &Args, done: &Done, output: Output) -> anyhow::Result<()> {
    if output.json {
        println!("{}", serde_json::to_string(done)?);
        return Ok(());
    }
    if let Some(measured) = &done.measured {
        println!("block  influence");
        for (layer, influence) in measured.influence.iter().enumerate() {
            let stays = if done.layers.contains(&layer) {
                ""
            } else {
                "  goes"
            };
            println!("{layer:>5}  {influence:>9.4}{stays}");
        }
    }
    let layers: Vec<String> = done.layers.iter().map(usize::to_string).collect();
    let millions = |parameters: usize| parameters as f64 / 1e6;
    println!(
        "{}: {} blocks ({}), {} heads on {}, {} channels; {:.1} of {:.1} million parameters",
        args.output_dir.display(),
        layers.len(),
        layers.join(","),
        done.sizes.num_attention_heads,
        done.sizes.num_key_value_heads,
        done.sizes.intermediate_size,
        millions(done.parameters),
        millions(done.parameters_before),
    );
    if let Some(measured) = &done.measured {
        println!(
            "loss on {} rows of {}: {:.3} before, {:.3} now",
            measured.rows,
            measured.data.display(),
            measured.loss_before,
            measured.loss
        );
    }
    Ok(())
}
