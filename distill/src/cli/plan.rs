//! `pipit-distill plan`: what a run would train, and what memory and time it would take.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;

use super::Output;
use super::options::{Method, SftConfig};
use super::sft::{self, Asked, Prepared, train_options};
use crate::memory::{self, Sizes};
use crate::model::{Mode, Model};
use crate::plan::{DataFile, Measured, Parameters, Plan, Work};
use crate::trainer::{TrainOptions, When, plan_steps, train, with_deep_stack};

/// Say what is trained, on what, and what memory and time it takes, before it is done
#[derive(Debug, clap::Args)]
#[group(id = "plan")]
#[command(
    after_help = "Takes the arguments of sft, and writes nothing. The memory is estimated from the sizes of the model and of the\n\
    largest forward pass; the time comes from real steps, on a copy that is thrown away.\n\nExamples:\n  \
    pipit-distill plan --model smollm2 --data train.jsonl --method lora --r 16\n  \
    pipit-distill plan --config sft.toml --json --measure-steps 0"
)]
pub struct Args {
    #[command(flatten)]
    sft: sft::Args,
    /// Real steps that are timed; 0 measures nothing, and takes no more memory than the weights
    #[arg(long, value_name = "N", default_value_t = 2)]
    measure_steps: usize,
}

/// Runs the subcommand.
pub fn run(args: Args, output: Output) -> anyhow::Result<()> {
    let mut asked = args.sft.resolve(output)?;
    asked.config.check()?;
    with_deep_stack(|| plan(&mut asked, args.measure_steps, output)).context("cannot start a thread")?
}

fn plan(asked: &mut Asked, measure_steps: usize, output: Output) -> anyhow::Result<()> {
    let config = &mut asked.config;
    let prepared = sft::prepare(config, asked.method_is_given, output)?;
    let options = train_options(config, &prepared.samples);
    let mut plan = of(config, &prepared, &options)?;
    warn(&plan, output);
    if measure_steps > 0 && plan.lacks().is_none() {
        plan.measured = Some(measure(&prepared, &options, &plan.work, measure_steps)?);
    }
    if output.json {
        println!("{}", serde_json::to_string(&plan)?);
    } else {
        print!("{}", plan.text());
    }
    Ok(())
}

/// Says where the estimate is more than there is.
pub(super) fn warn(plan: &Plan, output: Output) {
    if let (Some(lack), false) = (plan.lacks(), output.quiet) {
        eprintln!(
            "warning: {} MiB of memory are lacking\nhint: a smaller --per-device-train-batch-size or --max-length takes less",
            lack >> 20
        );
    }
}

/// The plan of a run that is ready to start.
pub(super) fn of(config: &SftConfig, prepared: &Prepared, options: &TrainOptions) -> anyhow::Result<Plan> {
    let model = &prepared.model;
    let dense = model
        .weights()
        .map(|weight| (weight.name.as_str(), weight.get(Mode::INFERENCE).elem_count()));
    let quantized = model
        .quantized()
        .map(|rows| (rows.name(), rows.dims().iter().product()));
    let trained = model.trained();
    let parameters = Parameters::count(
        dense.chain(quantized),
        trained.iter().map(|(name, var)| (*name, var.elem_count())),
    );
    let lengths: Vec<usize> = prepared.samples.iter().map(|sample| sample.ids.len()).collect();
    let work = Work::sum(plan_steps(&prepared.samples, options), &lengths);
    let sizes = sizes(config.method, prepared, options, &parameters, &work);
    // What is in memory beside the weights: the program, the tokenizer, the data.
    let held = sizes.weights + 4 * sizes.adapters;
    let resident = memory::resident();
    let program = resident.map_or(64 << 20, |resident| resident.now.saturating_sub(held));
    let loading = resident.map_or(0, |resident| resident.peak);
    let file = |path: &Path| DataFile::read(path).with_context(|| format!("cannot read {}", path.display()));
    let eval_file = prepared
        .eval_report
        .is_some()
        .then(|| file(&config.eval_data))
        .transpose()?;
    Ok(Plan {
        model: config.model.clone(),
        method: config.method.name().to_owned(),
        parameters,
        data_file: file(&config.data)?,
        data: prepared.report.clone(),
        eval_file,
        eval_data: prepared.eval_report.clone(),
        work,
        warmup_steps: options.warmup_steps,
        memory: sizes.plan(program, loading),
        available_memory_bytes: memory::available(),
        measured: None,
    })
}

fn sizes(
    method: Method,
    prepared: &Prepared,
    options: &TrainOptions,
    parameters: &Parameters,
    work: &Work,
) -> Sizes {
    let model = &prepared.model;
    let config = model.config();
    let adapters = parameters.kinds.iter().find(|kind| kind.kind == "adapters");
    let adapters = adapters.map_or(0, |kind| kind.trained as u64);
    let dense = model
        .weights()
        .map(|weight| 4 * weight.get(Mode::INFERENCE).elem_count() as u64);
    let weights = dense.chain(model.quantized().map(|rows| rows.bytes() as u64));
    // A soft prompt stands before every sequence; a prefix is not among the rows.
    let virtual_rows = match method {
        Method::Prompt => config.max_position_embeddings - model.longest(),
        _ => 0,
    };
    let embedding = "model.embed_tokens.weight";
    let trains_embedding = model.trained().iter().any(|(name, _)| *name == embedding);
    Sizes {
        layers: config.num_hidden_layers,
        hidden: config.hidden_size,
        intermediate: config.intermediate_size,
        kept: kept_per_row(model),
        vocabulary: config.vocab_size,
        weights: weights.sum(),
        trained_weights: parameters.trained as u64 - adapters,
        adapters,
        tied_and_trained: config.tie_word_embeddings && trains_embedding,
        rows: work.largest_pass_tokens + work.largest_pass_rows * virtual_rows,
        recompute: options.learner.gradient_checkpointing,
        accumulation: options.sampling.gradient_accumulation_steps > 1,
        loss_chunk: options.loss_chunk,
    }
}

/// The numbers that the blocks keep for each row until the backward pass: the results of linear layers (once more with
/// their biases) and of their adapters' first halves, of norms, of rotated queries and keys, of attention, of the
/// activation, and of the two sums.
fn kept_per_row(model: &Model) -> usize {
    let config = model.config();
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let linears = model.linears().map(|linear| {
        let rank = linear
            .lora
            .as_ref()
            .map_or(0, |lora| lora.a.get(Mode::INFERENCE).dims()[0]);
        linear.weight.dims()[0] * (1 + usize::from(linear.bias.is_some())) + rank
    });
    let names = model.weights().map(|weight| weight.name.as_str());
    let norms = names.filter(|name| name.starts_with("model.layers.") && name.contains("norm"));
    let norms = norms.map(|name| match name {
        _ if name.contains("q_norm") => queries,
        _ if name.contains("k_norm") => keys,
        _ => config.hidden_size,
    });
    let others = 2 * queries + keys + config.intermediate_size + 2 * config.hidden_size;
    linears.sum::<usize>() + norms.sum::<usize>() + config.num_hidden_layers * others
}

/// Does the step with the largest forward pass for its memory, then the run's first steps for their time.
fn measure(
    prepared: &Prepared,
    options: &TrainOptions,
    work: &Work,
    steps: usize,
) -> anyhow::Result<Measured> {
    let (model, stop) = (&prepared.model, AtomicBool::new(false));
    let tokens = |pass: &Vec<usize>| pass.iter().map(|i| prepared.samples[*i].ids.len()).sum::<usize>();
    let largest = plan_steps(&prepared.samples, options)
        .find(|passes| passes.iter().any(|pass| tokens(pass) == work.largest_pass_tokens))
        .unwrap_or_default();
    let largest: Vec<_> = largest
        .iter()
        .flatten()
        .map(|i| prepared.samples[*i].clone())
        .collect();
    let mut options = options.clone();
    options.logging_steps = usize::MAX;
    options.save = When::Never;
    // Two steps: AdamW's moments are there in the second.
    options.steps = 2;
    train(model, &largest, &[], &options, None, &stop, |_| Ok(()))?;
    let peak_memory_bytes = memory::resident().map(|resident| resident.peak);
    options.steps = steps;
    let outcome = train(model, &prepared.samples, &[], &options, None, &stop, |_| Ok(()))?;
    Ok(Measured {
        steps,
        tokens_per_second: outcome.tokens_per_second,
        seconds: work.tokens_seen as f64 / outcome.tokens_per_second,
        peak_memory_bytes,
    })
}
