//! `pipit-convert import`

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::ValueEnum;
use pipit_convert::gguf::{Gguf, TensorType};
use pipit_convert::import::import;
use serde_json::json;

use super::bar::Bar;
use super::{Context, check_output, size};

/// Make a trainable Hugging Face checkpoint out of a GGUF file
///
/// Writes config.json, generation_config.json, the tokenizer, the chat template and safetensors. In f32, the
/// default, quantised weights come out exactly as llama.cpp reads them; f16 and bf16 take half the room and
/// round every weight once more.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pipit-convert import SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2
  pipit-convert import model.gguf -o model-bf16 --dtype bf16 --force")]
pub(super) struct Args {
    /// The GGUF file
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
    /// The folder to write
    #[arg(short, long, value_name = "HF_DIR")]
    output: PathBuf,
    /// The type of the weights
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DType,
    /// Replace the folder if it exists
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DType {
    F32,
    F16,
    Bf16,
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let started = Instant::now();
    check_output(&args.output, args.force)?;
    let kind = match args.dtype {
        DType::F32 => TensorType::F32,
        DType::F16 => TensorType::F16,
        DType::Bf16 => TensorType::BF16,
    };
    let gguf = Gguf::open(&args.model)?;
    let done = import(&gguf, &args.output, kind, &Bar::new(context.quiet))?;
    let seconds = started.elapsed().as_secs_f64();
    let mut stdout = std::io::stdout().lock();
    if context.json {
        let mut report = json!(done);
        report["output"] = json!(args.output);
        report["seconds"] = json!(seconds);
        writeln!(stdout, "{report}")?;
    } else {
        writeln!(
            stdout,
            "{}: {} with {} parameters in {} tensors ({} of {kind}), {} tokens, in {seconds:.1} s",
            args.output.display(),
            done.architecture,
            done.parameters,
            done.tensors,
            size(done.bytes),
            done.tokens,
        )?;
    }
    Ok(())
}
