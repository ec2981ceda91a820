//! `pipit bench`: how fast a model is on this machine.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use pipit::bench::{self, Task};
use pipit::engine::Settings;
use pipit::engine::interrupt::Interrupt;
use pipit::engine::llama::Llama;
use pipit::model::GgmlType;
use pipit::{kernels, model};
use serde_json::json;

const EXAMPLES: &str = "\
Examples:
  pipit bench model.gguf
  pipit bench model.gguf --threads 2 --json | jq .share
  pipit bench model.gguf --prompt 0 --generate 256 --cache-type q8_0

A good build reads 60 to 70 % of what the memory allows. Far less: `pipit check` says whether kernels are missing.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// GGUF file
    model: PathBuf,
    /// Threads [default: one for each fast physical core]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: u32,
    /// Tokens of prefill
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens of decode
    #[arg(long, value_name = "N", default_value_t = 128)]
    generate: usize,
    /// Repetitions; the median counts
    #[arg(long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Type of keys and values in the KV cache
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    cache_type: String,
    /// Print one object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let lacking = kernels::lacking();
    if !lacking.is_empty() {
        bail!(kernels::refusal(&lacking));
    }
    llama_cpp_2::send_logs_to_tracing(llama_cpp_2::LogOptions::default());
    let header = model::inspect(&args.model)?;
    let n_ctx = args.prompt.max(args.generate).max(16) as u32;
    let settings = Settings::alone(args.model.clone(), n_ctx, args.threads, &args.cache_type);
    let mut llama = Llama::load(&settings, &Interrupt::default())?;
    let task = Task {
        prompt: args.prompt,
        generate: args.generate,
        repetitions: args.repetitions,
    };
    let cache = GgmlType::of_cache(&args.cache_type);
    let kv_token_bytes = cache.map_or(0, |kind| bench::kv_per_token(&header, kind, kind));
    let measured = bench::measure(&mut llama, &header, kv_token_bytes, task).map_err(anyhow::Error::msg)?;
    let info = llama.info();
    if args.json {
        let report = json!({
            "model": info.name,
            "architecture": info.architecture,
            "quantisation": info.quantisation,
            "threads": info.threads,
            "kernels": kernels::compiled(),
            "task": task,
            "measured": measured,
            "share": measured.share,
        });
        println!("{report}");
    } else {
        println!("{} {}, {} threads", info.name, info.quantisation, info.threads);
        println!(
            "prefill   {:9.1} tokens/s   ({} tokens)",
            measured.prefill_per_second, task.prompt
        );
        println!(
            "decode    {:9.1} tokens/s   ({} tokens)",
            measured.decode_per_second, task.generate
        );
        println!(
            "memory    {:9.1} GB/s, {:.1} MB a token: at most {:.1} tokens/s",
            measured.bandwidth / 1e9,
            measured.bytes_per_token as f64 / 1e6,
            measured.bound_per_second
        );
        println!(
            "share     {:9.1} % of what the memory allows",
            measured.share * 100.0
        );
    }
    Ok(ExitCode::SUCCESS)
}
