//! The options of everything that puts a text through a model.

use std::num::NonZeroUsize;

use pipit_convert::evaluate::{MIN_CTX, Options};

#[derive(Debug, clap::Args)]
pub(super) struct TextArgs {
    /// The number of tokens of a chunk of text
    #[arg(long, value_name = "N", default_value_t = Options::default().ctx, value_parser = ctx)]
    ctx: usize,
    /// Measure on the first N chunks only
    #[arg(long, value_name = "N")]
    chunks: Option<NonZeroUsize>,
    /// The number of threads; one per core without this
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

/// The value of `--ctx`.
pub(super) fn ctx(text: &str) -> Result<usize, String> {
    let ctx: usize = text.parse().map_err(|e| format!("{e}"))?;
    if ctx < MIN_CTX {
        return Err(format!("a chunk has at least {MIN_CTX} tokens"));
    }
    Ok(ctx)
}

impl TextArgs {
    pub(super) fn options(&self) -> Options {
        Options {
            ctx: self.ctx,
            chunks: self.chunks,
            threads: self.threads,
        }
    }
}
