//! `pipit-convert archs`

use std::io::Write;

use pipit_convert::quantize::FileType;
use pipit_convert::{arch, vocab};
use serde_json::json;

use super::Context;

/// List the architectures, tokenizers and types that are built
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pipit-convert archs
  pipit-convert archs --json | jq '.architectures[].name'")]
pub(super) struct Args {}

pub(super) fn run(_: &Args, context: &Context) -> anyhow::Result<()> {
    let types: Vec<_> = FileType::ALL.iter().map(|file| file.name()).collect();
    let tokenizers: Vec<_> = vocab::pre::ALL.iter().map(|pre| pre.name).collect();
    let mut stdout = std::io::stdout().lock();
    if context.json {
        let architectures: Vec<_> = arch::ALL
            .iter()
            .map(|arch| json!({"name": arch.name, "hugging_face": arch.hugging_face, "import": true, "model": true}))
            .collect();
        let report = json!({"architectures": architectures, "tokenizers": tokenizers, "types": types});
        writeln!(stdout, "{report}")?;
        return Ok(());
    }
    writeln!(
        stdout,
        "{:12} {:7} {:6} config.json",
        "architecture", "import", "model"
    )?;
    for arch in arch::ALL {
        writeln!(
            stdout,
            "{:12} {:7} {:6} {}",
            arch.name,
            "yes",
            "yes",
            arch.hugging_face.join(", ")
        )?;
    }
    writeln!(
        stdout,
        "tokenizers: byte-level BPE, cut as in {}",
        tokenizers.join(", ")
    )?;
    writeln!(stdout, "types: {}", types.join(", "))?;
    Ok(())
}
