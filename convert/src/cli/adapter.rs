//! `pipit-convert adapter`

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use pipit_convert::adapter::{GgufAdapter, PeftAdapter};
use pipit_convert::gguf::TensorType;
use pipit_convert::merge::ScaledAdapter;
use pipit_convert::model::SourceModel;
use pipit_convert::quantize;
use serde_json::json;

use super::{Context, check_output, size};

/// Make a GGUF adapter out of a PEFT folder, for a runtime that changes adapters while it runs
///
/// Rank-stabilised scales, patterns and --scale are folded in, so that llama.cpp computes what PEFT computes. What a
/// GGUF adapter cannot hold (DoRA, biases, tensors saved whole, trained tokens) is refused: merge it with `model`.
/// The file names its base by sha256 (pipit.base.*).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pipit-convert adapter run --base smollm2 -o smart-home.gguf
  pipit-convert adapter run --base smollm2.gguf --scale 0.5 -t F16 -o gentle.gguf")]
pub(super) struct Args {
    /// The folder with adapter_config.json and adapter_model.safetensors
    #[arg(value_name = "PEFT_DIR")]
    adapter: PathBuf,
    /// The model that it was trained on: a checkpoint folder, or a GGUF file
    #[arg(long, value_name = "CHECKPOINT")]
    base: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "ADAPTER.gguf", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// The type of the matrices: F32, F16, BF16 or Q8_0
    #[arg(short = 't', long = "type", value_name = "TYPE", default_value = "F32")]
    kind: String,
    /// Times the adapter's own scale
    #[arg(long, default_value_t = 1.0)]
    scale: f32,
    /// Print what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
}

/// Types of whole rows that llama.cpp multiplies with; of the rest, blocks are longer than ranks.
const KINDS: [TensorType; 4] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q8_0,
];

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let started = Instant::now();
    if let Some(output) = args.output.as_ref().filter(|_| !args.dry_run) {
        check_output(output, args.force)?;
    }
    let kind = quantize::tensor_type(&args.kind)?;
    if !KINDS.contains(&kind) {
        bail!("an adapter cannot be {kind}\nhint: F32, F16, BF16 and Q8_0 can");
    }
    if !args.scale.is_finite() {
        bail!("--scale {} is no scale", args.scale);
    }
    let base = SourceModel::open(&args.base)?;
    let scaled = ScaledAdapter {
        adapter: PeftAdapter::open(&args.adapter)?,
        scale: args.scale,
    };
    let file = GgufAdapter::new(&scaled, &base, kind)?;
    let tensors = file.header.tensors.len();
    let mut stdout = std::io::stdout().lock();
    let Some(output) = args.output.as_ref().filter(|_| !args.dry_run) else {
        let bytes = file.header.file_size()?;
        if context.json {
            let list = file.header.tensors.iter();
            let list: Vec<_> = list
                .map(|plan| json!({"name": plan.name, "type": plan.kind.name(), "dimensions": plan.dimensions}))
                .collect();
            writeln!(stdout, "{}", json!({"bytes": bytes, "tensors": list}))?;
            return Ok(());
        }
        for plan in &file.header.tensors {
            let dimensions: Vec<_> = plan.dimensions.iter().map(u64::to_string).collect();
            writeln!(stdout, "{}  {}  {}", plan.name, plan.kind, dimensions.join("×"))?;
        }
        writeln!(stdout, "{tensors} tensors, {}; nothing was written", size(bytes))?;
        return Ok(());
    };
    let bytes = file.write(output)?;
    let seconds = started.elapsed().as_secs_f64();
    if context.json {
        let report = json!({"output": output, "type": kind.name(), "tensors": tensors, "bytes": bytes, "seconds": seconds});
        writeln!(stdout, "{report}")?;
    } else {
        let (output, bytes) = (output.display(), size(bytes));
        writeln!(
            stdout,
            "{output}: {bytes} of {kind}, {tensors} tensors, in {seconds:.1} s"
        )?;
    }
    Ok(())
}
