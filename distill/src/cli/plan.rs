//! `pipit-distill plan`: what a run would train, and what memory and time it would take.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;

use super::options::{DistillationOptions, Method, OpdGiven, SftConfig, SftOptions};
use super::sft::{self, Asked, Prepared, train_options};
use super::{Output, UsageError, opd};
use crate::data::DataReport;
use crate::device::Precision;
use crate::memory::{self, Sizes};
use crate::model::{Mode, Model};
use crate::optimizer::{Optim, eight_bit_bytes, takes_eight_bits};
use crate::plan::{DataFile, Measured, Parameters, Plan, Work};
use crate::trainer::{TrainOptions, When, plan_steps, train, with_deep_stack};

/// Say what is trained, on what, and what memory and time it takes, before it is done
#[derive(Debug, clap::Args)]
#[group(id = "plan")]
#[command(
    mut_arg("model", |arg| arg.visible_alias("student")),
    mut_arg("data", |arg| arg.visible_alias("prompts")),
    after_help = "Takes the arguments of sft, or with --teacher those of opd, and writes nothing. The memory is estimated from the sizes\n\
    of the model and of the largest forward pass; the time of sft comes from real steps, on a copy that is thrown away. How\n\
    long a student's answers become is not known before: opd is planned with the longest.\n\nExamples:\n  \
    pipit-distill plan --model smollm2 --data train.jsonl --method lora --r 16\n  \
    pipit-distill plan --student small --teacher large --prompts train.jsonl --method full\n  \
    pipit-distill plan --config sft.toml --json --measure-steps 0"
)]
pub struct Args {
    /// A TOML file with options; flags win over it
    #[arg(long, value_name = "F.toml")]
    config: Option<PathBuf>,
    #[command(flatten)]
    training: SftOptions,
    #[command(flatten)]
    distillation: DistillationOptions,
    /// Real steps of sft that are timed; 0 measures nothing, and takes no more memory than the weights
    #[arg(long, value_name = "N", default_value_t = 2)]
    measure_steps: usize,
}

impl Args {
    /// Whether a teacher is named, here or in the file.
    fn has_teacher(&self) -> bool {
        let file = self
            .config
            .as_ref()
            .and_then(|path| std::fs::read_to_string(path).ok());
        let table: Option<toml::Table> = file.and_then(|text| toml::from_str(&text).ok());
        let named = |key| table.as_ref().is_some_and(|table| table.contains_key(key));
        let given = self.distillation.given();
        ["teacher", "teachers"]
            .into_iter()
            .any(|key| given.contains(&key) || named(key))
    }
}

/// Runs the subcommand.
pub fn run(args: Args, output: Output) -> anyhow::Result<()> {
    if args.has_teacher() {
        let given = OpdGiven {
            training: args.training,
            distillation: args.distillation,
        };
        let asked = opd::Args::new(args.config, given);
        let work = || show(&opd::plan(asked, output)?, output);
        return with_deep_stack(work).context("cannot start a thread")?;
    }
    if let Some(key) = args.distillation.given().first() {
        let flag = format!("--{}", key.replace('_', "-"));
        anyhow::bail!(UsageError::Usage(format!(
            "{flag} is for opd, which needs --teacher"
        )));
    }
    let mut asked = sft::Args::new(args.config, args.training).resolve(output)?;
    asked.config.check()?;
    with_deep_stack(|| plan(&mut asked, args.measure_steps, output)).context("cannot start a thread")?
}

fn plan(asked: &mut Asked, measure_steps: usize, output: Output) -> anyhow::Result<()> {
    let config = &mut asked.config;
    let prepared = sft::prepare(config, asked.method_is_given, output)?;
    let options = train_options(config, prepared.lengths());
    let mut plan = of(config, &prepared.facts(), &options)?;
    warn(&plan, output);
    if measure_steps > 0 && plan.lacks().is_none() {
        plan.measured = Some(measure(&prepared, &options, &plan.work, measure_steps)?);
    }
    show(&plan, output)
}

fn show(plan: &Plan, output: Output) -> anyhow::Result<()> {
    if output.json {
        println!("{}", serde_json::to_string(plan)?);
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

/// What is known of a run that is ready to start.
pub(super) struct Facts<'a> {
    pub(super) model: &'a Model,
    /// Tokens of every row.
    pub(super) lengths: Vec<usize>,
    pub(super) report: &'a DataReport,
    pub(super) eval_report: Option<&'a DataReport>,
    /// What a teacher takes beside the model.
    pub(super) teacher_bytes: u64,
    /// Whether weights may move before the step ends, where nothing else keeps them.
    pub(super) at_once: bool,
}

/// The plan of a run that is ready to start.
pub(super) fn of(config: &SftConfig, facts: &Facts<'_>, options: &TrainOptions) -> anyhow::Result<Plan> {
    let model = facts.model;
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
    let work = Work::sum(plan_steps(facts.lengths.clone(), options), &facts.lengths);
    let sizes = sizes(config.method, facts, options, &parameters, &work);
    // What is in memory beside the weights: the program, the tokenizer, the data. A GPU has the numbers only.
    let held = sizes.weights + 4 * sizes.adapters + facts.teacher_bytes;
    let on_cpu = model.device().is_cpu();
    let resident = memory::resident().filter(|_| on_cpu);
    let program = resident.map_or(if on_cpu { 64 << 20 } else { 0 }, |resident| {
        resident.now.saturating_sub(held)
    });
    let loading = resident.map_or(0, |resident| resident.peak);
    let file = |path: &Path| DataFile::read(path).with_context(|| format!("cannot read {}", path.display()));
    let eval_file = facts
        .eval_report
        .is_some()
        .then(|| file(&config.eval_data))
        .transpose()?;
    Ok(Plan {
        model: config.model.clone(),
        method: config.method.name().to_owned(),
        parameters,
        data_file: file(&config.data)?,
        data: facts.report.clone(),
        eval_file,
        eval_data: facts.eval_report.cloned(),
        work,
        warmup_steps: options.warmup_steps,
        memory: sizes.plan(program, loading),
        available_memory_bytes: model.place().available(),
        measured: None,
    })
}

fn sizes(
    method: Method,
    facts: &Facts<'_>,
    options: &TrainOptions,
    parameters: &Parameters,
    work: &Work,
) -> Sizes {
    let model = facts.model;
    let config = model.config();
    let adapters = parameters.kinds.iter().find(|kind| kind.kind == "adapters");
    let adapters = adapters.map_or(0, |kind| kind.trained as u64);
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
        weights: model.bytes(),
        trained_weights: parameters.trained as u64 - adapters,
        adapters,
        teacher: facts.teacher_bytes,
        optimizer: moments_bytes(model, options.learner.optim),
        tied_and_trained: config.tie_word_embeddings && trains_embedding,
        rows: work.largest_pass_tokens + work.largest_pass_rows * virtual_rows,
        recompute: options.learner.gradient_checkpointing,
        accumulation: options.sampling.gradient_accumulation_steps > 1,
        at_once: (facts.at_once
            && options
                .learner
                .moves_at_once(options.sampling.gradient_accumulation_steps))
        .then(|| waiting(model)),
        loss_chunk: options.loss_chunk,
        half: model.place().precision != Precision::Fp32,
        // On a GPU the scores of one layer exist together.
        scores: match model.device().is_cpu() {
            true => 0,
            false => work.largest_pass_rows * config.num_attention_heads * facts.report.longest.pow(2),
        },
    }
}

/// What AdamW keeps of what is trained, in bytes.
fn moments_bytes(model: &Model, optim: Optim) -> u64 {
    let of = |name: &str, numbers: usize| match optim {
        Optim::Adamw8bit if takes_eight_bits(name, numbers) => eight_bit_bytes(numbers as u64),
        Optim::AdamwTorch | Optim::Adamw8bit => 8 * numbers as u64,
    };
    let trained = model.trained().into_iter();
    trained.map(|(name, var)| of(name, var.elem_count())).sum()
}

/// The gradients that exist together where weights move at once: of what is in no block, and of the largest block.
fn waiting(model: &Model) -> u64 {
    let trained = model
        .trained()
        .into_iter()
        .map(|(_, var)| var.elem_count() as u64);
    let of_block = |i: usize| -> u64 {
        let vars = model.block_parameters(i).filter_map(|parameter| parameter.var());
        vars.map(|var| var.elem_count() as u64).sum()
    };
    let blocks: Vec<u64> = (0..model.blocks()).map(of_block).collect();
    trained.sum::<u64>() - blocks.iter().sum::<u64>() + blocks.into_iter().max().unwrap_or(0)
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
    let (model, stop) = (&prepared.opened.model, AtomicBool::new(false));
    let tokens = |pass: &Vec<usize>| pass.iter().map(|i| prepared.samples[*i].ids.len()).sum::<usize>();
    let largest = plan_steps(prepared.lengths(), options)
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
    let on_cpu = model.device().is_cpu();
    let peak_memory_bytes = memory::resident()
        .map(|resident| resident.peak)
        .filter(|_| on_cpu);
    options.steps = steps;
    let outcome = train(model, &prepared.samples, &[], &options, None, &stop, |_| Ok(()))?;
    Ok(Measured {
        steps,
        tokens_per_second: outcome.tokens_per_second,
        seconds: work.tokens_seen as f64 / outcome.tokens_per_second,
        peak_memory_bytes,
    })
}
