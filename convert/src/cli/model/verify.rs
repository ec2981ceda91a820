//! `model --verify`: the result is compared with the unquantised model before it gets its name.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use pipit_convert::compare::{Comparison, compare};
use pipit_convert::evaluate::{Options, Text};
use pipit_convert::gguf::FilesWriter;
use pipit_convert::merge::ScaledAdapter;
use pipit_convert::model::{Plan, SourceModel};
use pipit_convert::progress::Progress;
use pipit_convert::quantize::Recipe;
use serde_json::json;

use super::super::Context;
use super::super::compare::{TooFar, divergence};
use super::super::text::ctx;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Verification")]
pub(super) struct VerifyArgs {
    /// Compare the result with the unquantised model on this text before it gets its name, as
    /// `pipit-convert compare` does. The unquantised model is a temporary file beside the result
    #[arg(long, value_name = "TEXT", conflicts_with = "dry_run")]
    verify: Option<PathBuf>,
    /// Write nothing, and exit with 3, if the mean divergence is larger than this, in nats
    #[arg(long, value_name = "NATS", requires = "verify", value_parser = divergence)]
    max_kl: Option<f64>,
    /// Verify with chunks of so many tokens
    #[arg(long, value_name = "N", requires = "verify", default_value_t = Options::default().ctx, value_parser = ctx)]
    verify_ctx: usize,
    /// Verify on the first N chunks only
    #[arg(long, value_name = "N", requires = "verify")]
    verify_chunks: Option<NonZeroUsize>,
}

impl VerifyArgs {
    /// The text, read before the work begins.
    pub(super) fn text(&self) -> anyhow::Result<Option<Text>> {
        Ok(self.verify.as_deref().map(Text::open).transpose()?)
    }

    /// Compares a result that has no name yet with the model that it was made of.
    pub(super) fn compare(
        &self,
        plan: &Plan<'_>,
        adapters: &[ScaledAdapter],
        result: &FilesWriter<'_>,
        (output, text): (&Path, &Text),
        progress: &dyn Progress,
    ) -> anyhow::Result<Comparison> {
        let mut model = SourceModel::open(plan.source())?;
        // It was proved for the result, or the user did not want that.
        model.skip_tokenizer_proof();
        let recipe = Recipe::new(plan.own_type()?);
        let unquantised = Plan::new(&model, adapters, &recipe)?;
        let mut place = output.as_os_str().to_owned();
        place.push(".reference");
        let reference = unquantised.write_unnamed(Path::new(&place), None, progress)?;
        let options = Options {
            ctx: self.verify_ctx,
            chunks: self.verify_chunks,
            threads: None,
        };
        let (reference, result) = (reference.unnamed()?, result.unnamed()?);
        Ok(compare(
            reference.path(),
            result.path(),
            text,
            &options,
            progress,
        )?)
    }

    /// An error if the result is too far away. The figures are told all the same.
    pub(super) fn check(&self, comparison: &Comparison, context: &Context) -> anyhow::Result<()> {
        let checked = TooFar::check(comparison, self.max_kl);
        if checked.is_err() && context.json {
            let report = json!({"output": null, "comparison": comparison});
            writeln!(std::io::stdout(), "{report}")?;
        } else if checked.is_err() {
            writeln!(std::io::stdout(), "{}", super::lines(comparison))?;
        }
        checked.context("nothing was written")
    }
}
