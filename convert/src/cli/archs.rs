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

/// What the lines above say.
const PROOF: &str = "\
Proved: tensors and keys are those of llama.cpp's convert_hf_to_gguf.py, the logits in llama.cpp those of
transformers, and a file that is imported and converted again is the same file. A tiny checkpoint has random
weights; the models that have names are real.";

pub(super) fn run(_: &Args, context: &Context) -> anyhow::Result<()> {
    let types: Vec<_> = FileType::ALL.iter().map(|file| file.name()).collect();
    let tokenizers: Vec<_> = vocab::pre::ALL.iter().map(|pre| pre.name).collect();
    let mut stdout = std::io::stdout().lock();
    if context.json {
        let architectures: Vec<_> = arch::ALL
            .iter()
            .map(|arch| {
                let proved_on: Vec<_> = arch.fixtures.iter().chain(arch.real).collect();
                json!({
                    "name": arch.name, "hugging_face": arch.hugging_face, "models": arch.models, "rope": arch.rope,
                    "model": true, "import": true, "proved_on": proved_on,
                })
            })
            .collect();
        let report = json!({"architectures": architectures, "tokenizers": tokenizers, "types": types});
        writeln!(stdout, "{report}")?;
        return Ok(());
    }
    for arch in arch::ALL {
        writeln!(
            stdout,
            "{:8}  {}: {}",
            arch.name,
            arch.hugging_face.join(", "),
            arch.models
        )?;
        let scaled = arch.rope.iter().map(|kind| format!(", {kind}"));
        writeln!(stdout, "{:8}  rope: default{}", "", scaled.collect::<String>())?;
        let proved_on: Vec<_> = arch.fixtures.iter().chain(arch.real).copied().collect();
        writeln!(
            stdout,
            "{:8}  model and import, proved on: {}",
            "",
            proved_on.join(", ")
        )?;
    }
    writeln!(stdout, "{PROOF}")?;
    writeln!(
        stdout,
        "tokenizers: SentencePiece's BPE; byte-level BPE, cut as in {}",
        tokenizers.join(", ")
    )?;
    writeln!(stdout, "types: {}", types.join(", "))?;
    Ok(())
}
