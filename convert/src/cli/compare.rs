//! `pipit-convert compare`

use std::io::Write;
use std::path::PathBuf;

use pipit_convert::compare::{Comparison, compare};
use pipit_convert::evaluate::Text;
use serde_json::json;

use super::Context;
use super::bar::Bar;
use super::text::TextArgs;

/// Measure on a text how far one model is from another
///
/// The figures are llama-perplexity's: perplexity of both, Kullback-Leibler divergence of the second from the first,
/// and how often both have the same first guess. Exit code 3 says that --max-kl is exceeded.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pipit-convert compare smollm2-f16.gguf smollm2-q4_k_m.gguf --text test.txt
  pipit-convert compare a.gguf b.gguf --text test.txt --chunks 20 --max-kl 0.05 --json")]
pub(super) struct Args {
    /// The model that the other should be like
    #[arg(value_name = "REFERENCE.gguf")]
    reference: PathBuf,
    /// The other model
    #[arg(value_name = "OTHER.gguf")]
    other: PathBuf,
    /// The text to measure on
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    #[command(flatten)]
    options: TextArgs,
    /// The largest mean divergence, in nats, that is good enough
    #[arg(long, value_name = "NATS", value_parser = divergence)]
    max_kl: Option<f64>,
}

/// The measured divergence is larger than the user allows.
#[derive(Debug, thiserror::Error)]
#[error("the mean divergence is {found:.6}, more than the {allowed} that --max-kl allows")]
pub(super) struct TooFar {
    found: f64,
    allowed: f64,
}

impl TooFar {
    /// An error if there is a limit and it is exceeded.
    pub(super) fn check(comparison: &Comparison, limit: Option<f64>) -> Result<(), Self> {
        let found = comparison.divergence.mean.value;
        match limit {
            Some(allowed) if found > allowed => Err(Self { found, allowed }),
            _ => Ok(()),
        }
    }
}

/// The value of `--max-kl`.
pub(super) fn divergence(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(limit) if limit.is_finite() && limit >= 0.0 => Ok(limit),
        _ => Err("a divergence is a number of nats, 0 or more".into()),
    }
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let text = Text::open(&args.text)?;
    let progress = Bar::new(context.quiet);
    let options = args.options.options();
    let comparison = compare(&args.reference, &args.other, &text, &options, &progress)?;
    drop(progress);
    let mut stdout = std::io::stdout().lock();
    if context.json {
        let report = json!({"reference": args.reference, "other": args.other, "comparison": comparison});
        writeln!(stdout, "{report}")?;
    } else {
        writeln!(stdout, "{}", lines(&comparison))?;
    }
    Ok(TooFar::check(&comparison, args.max_kl)?)
}

/// The figures for people.
pub(super) fn lines(comparison: &Comparison) -> String {
    let Comparison {
        chunks,
        ctx,
        tokens,
        reference_perplexity: reference,
        perplexity,
        ratio,
        divergence,
        same_top,
        probability,
        probability_rms,
    } = comparison;
    let percent = |estimate: &pipit_convert::compare::Estimate| {
        format!("{:.3} ± {:.3} %", estimate.value * 100.0, estimate.error * 100.0)
    };
    [
        format!("measured on        {tokens} tokens, in {chunks} chunks of {ctx}"),
        format!(
            "perplexity         {:.4} ± {:.4}",
            perplexity.value, perplexity.error
        ),
        format!(
            "  of the reference {:.4} ± {:.4}",
            reference.value, reference.error
        ),
        format!("  ratio            {:.6} ± {:.6}", ratio.value, ratio.error),
        format!(
            "divergence         {:.6} ± {:.6} nats",
            divergence.mean.value, divergence.mean.error
        ),
        format!(
            "  median           {:.6}, 90 % {:.6}, 99 % {:.6}, largest {:.6}",
            divergence.median, divergence.percentile_90, divergence.percentile_99, divergence.max
        ),
        format!("same first guess   {}", percent(same_top)),
        format!(
            "probability        {} on average, {} root mean square",
            percent(probability),
            percent(probability_rms)
        ),
    ]
    .join("\n")
}
