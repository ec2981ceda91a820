//! `pipit-convert imatrix`

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use pipit_convert::evaluate::Text;
use pipit_convert::imatrix::{self, Settings};
use serde_json::json;

use super::bar::Bar;
use super::text::TextArgs;
use super::{Context, check_output};

/// Measure on a text which columns of a model's matrices matter, for `model --imatrix`
///
/// The file is what llama-imatrix writes, and llama-quantize reads it. Measure with the unquantised model, on text
/// like the one that the model will see.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pipit-convert imatrix smollm2-f16.gguf --text calibration.txt -o smollm2.imatrix.gguf
  pipit-convert model smollm2 --imatrix smollm2.imatrix.gguf -t IQ4_XS -o smollm2.gguf")]
pub(super) struct Args {
    /// The model
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
    /// The text to measure on
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "OUT.gguf")]
    output: PathBuf,
    #[command(flatten)]
    options: TextArgs,
    /// Measure output.weight too
    #[arg(long)]
    process_output: bool,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let started = Instant::now();
    check_output(&args.output, args.force)?;
    let settings = Settings {
        text: args.options.options(),
        output: args.process_output,
    };
    let text = Text::open(&args.text)?;
    let measured = imatrix::measure(&args.model, &text, &settings, &Bar::new(context.quiet))?;
    measured.write(&args.output, imatrix::provenance(&args.model, &args.text)?)?;
    let seconds = started.elapsed().as_secs_f64();
    let (tensors, chunks) = (measured.entries.len(), measured.chunks);
    let mut stdout = std::io::stdout().lock();
    if context.json {
        let report = json!({
            "output": args.output, "tensors": tensors, "chunks": chunks, "ctx": measured.chunk_size, "seconds": seconds,
        });
        writeln!(stdout, "{report}")?;
    } else {
        writeln!(
            stdout,
            "{}: {tensors} tensors, measured on {chunks} chunks of {} tokens, in {seconds:.1} s",
            args.output.display(),
            measured.chunk_size
        )?;
    }
    Ok(())
}
