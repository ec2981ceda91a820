//! `pipit-convert model`

mod recipe;
mod result;
mod table;
mod verify;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::bail;
use pipit_convert::adapter::PeftAdapter;
use pipit_convert::merge::ScaledAdapter;
use pipit_convert::model::{Plan, Provenance, SourceModel};
use serde_json::json;

use self::recipe::RecipeArgs;
use self::result::ResultArgs;
use self::verify::VerifyArgs;
use super::bar::Bar;
use super::compare::lines;
use super::{Context, size};

/// Make a GGUF file out of a checkpoint, with LoRA adapters merged into it
///
/// The tensors are bit for bit those of llama.cpp's own converter. Adapters are merged in f32 before anything is
/// rounded. The file also says what it was made of (pipit.* holds names, sha256 sums and options), and so does a
/// model card beside it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pipit-convert model smollm2 -o smollm2.gguf
  pipit-convert model smollm2 --adapter run -t Q8_0 -o smart-home.gguf
  pipit-convert model smollm2 --adapter style=0.5 --adapter run -t F16 -o mixed.gguf
  pipit-convert model smollm2 -t Q4_K_M --dry-run")]
pub(super) struct Args {
    /// A Hugging Face checkpoint folder, or a GGUF file (whose quantised weights are then rounded again)
    checkpoint: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "OUT.gguf", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    #[command(flatten)]
    recipe: RecipeArgs,
    /// A PEFT adapter folder to merge; =SCALE multiplies its own scale. Can be given several times
    #[arg(long = "adapter", value_name = "DIR[=SCALE]")]
    adapters: Vec<String>,
    /// Do not compare llama.cpp's reading of the tokenizer with the checkpoint's own before writing
    #[arg(long)]
    no_tokenizer_proof: bool,
    #[command(flatten)]
    result: ResultArgs,
    #[command(flatten)]
    verify: VerifyArgs,
    /// Print what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
}

/// `DIR` or `DIR=SCALE`. A folder whose own name has a `=` is found too.
fn open_adapter(text: &str) -> anyhow::Result<ScaledAdapter> {
    let (dir, scale) = match text.rsplit_once('=') {
        Some((dir, scale)) if !Path::new(text).exists() => match scale.parse::<f32>() {
            Ok(scale) if scale.is_finite() => (dir, scale),
            _ => bail!("--adapter {text}: {scale:?} is no scale\nhint: --adapter DIR=0.5"),
        },
        _ => (text, 1.0),
    };
    Ok(ScaledAdapter {
        adapter: PeftAdapter::open(Path::new(dir))?,
        scale,
    })
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let started = Instant::now();
    if let Some(output) = &args.output
        && !args.dry_run
    {
        args.result.check(output, args.force)?;
    }
    let mut model = SourceModel::open(&args.checkpoint)?;
    if args.no_tokenizer_proof {
        model.skip_tokenizer_proof();
    }
    let adapters = args
        .adapters
        .iter()
        .map(|text| open_adapter(text))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let recipe = args.recipe.recipe()?;
    let text = args.verify.text()?;
    let Some(output) = args.output.as_ref().filter(|_| !args.dry_run) else {
        return table::print(&Plan::new(&model, &adapters, &recipe)?, context);
    };
    let provenance = Provenance {
        adapters: &adapters,
        imatrix: args.recipe.imatrix(),
        arguments: &context.arguments,
    };
    let plan = Plan::with_provenance(&model, &adapters, &recipe, &provenance)?;
    let merged = plan.table().iter().filter(|tensor| tensor.merged).count();
    let source = (args.checkpoint.as_path(), args.recipe.file.name());
    let progress = Bar::new(context.quiet);
    let writer = args.result.write(&plan, output, args.force, &progress)?;
    let comparison = match &text {
        Some(text) => Some(
            args.verify
                .compare(&plan, &adapters, &writer, (output, text), &progress)?,
        ),
        None => None,
    };
    drop(progress);
    if let Some(comparison) = &comparison {
        args.verify.check(comparison, context)?;
    }
    let written = args.result.commit(&plan, writer, output, source)?;
    let bytes = written.files.iter().map(|file| file.bytes).sum();
    let seconds = started.elapsed().as_secs_f64();
    let tensors = plan.header.tensors.len();
    let mut stdout = std::io::stdout().lock();
    if context.json {
        let report = json!({
            "output": output, "architecture": plan.architecture.name, "type": args.recipe.file.name(), "tensors": tensors,
            "merged": merged, "bytes": bytes, "files": written.files, "card": written.card,
            "modelfile": written.modelfile, "comparison": comparison, "seconds": seconds,
        });
        writeln!(stdout, "{report}")?;
    } else {
        let merges = if adapters.is_empty() {
            String::new()
        } else {
            format!(", {merged} with an adapter merged")
        };
        writeln!(
            stdout,
            "{}: {} of {}, {tensors} tensors{merges}, in {seconds:.1} s",
            output.display(),
            size(bytes),
            args.recipe.file
        )?;
        if let Some(comparison) = &comparison {
            writeln!(stdout, "{}", lines(comparison))?;
        }
    }
    Ok(())
}
