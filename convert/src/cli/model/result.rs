//! What `model` writes: the file or its parts, the card, the Modelfile.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use pipit_convert::card::Card;
use pipit_convert::gguf::{FilesWriter, WrittenFile, split};
use pipit_convert::model::Plan;
use pipit_convert::modelfile::modelfile;
use pipit_convert::output::write_file;
use pipit_convert::progress::Progress;

use super::super::check_output;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Result")]
pub(super) struct ResultArgs {
    /// Write parts of at most so many bytes of tensors (500M, 2G; powers of ten), as llama-gguf-split does:
    /// OUT-00001-of-00003.gguf, ... Programs are given the first part. What fits into one part is not cut
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "modelfile")]
    split_max_size: Option<u64>,
    /// Write no model card. Without this, OUT.gguf.md says what the file is, what it was made of, and its sha256
    #[arg(long)]
    no_card: bool,
    /// Write OUT.gguf.Modelfile too, for `ollama create`
    #[arg(long)]
    modelfile: bool,
}

/// `500M` or `2G`, as llama-gguf-split counts.
fn parse_size(text: &str) -> Result<u64, String> {
    let unit = match text.chars().last() {
        Some('M') => 1_000_000,
        Some('G') => 1_000_000_000,
        _ => return Err("a size ends in M or G\nhint: --split-max-size 2G".into()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|e| format!("{e}"))?;
    let size = number.checked_mul(unit).filter(|size| *size > 0);
    size.ok_or_else(|| "this is no size of a file".into())
}

/// Everything that was written.
pub(super) struct Written {
    pub(super) files: Vec<WrittenFile>,
    pub(super) card: Option<PathBuf>,
    pub(super) modelfile: Option<PathBuf>,
}

impl ResultArgs {
    /// Refuses to write over something before the work begins.
    pub(super) fn check(&self, output: &Path, force: bool) -> anyhow::Result<()> {
        check_output(output, force)?;
        if !self.no_card {
            check_output(&beside(output, "md"), force)?;
        }
        if self.modelfile {
            check_output(&beside(output, "Modelfile"), force)?;
        }
        Ok(())
    }

    /// Writes the file or its parts, without a name yet.
    pub(super) fn write<'p>(
        &self,
        plan: &'p Plan<'_>,
        output: &Path,
        force: bool,
        progress: &dyn Progress,
    ) -> anyhow::Result<FilesWriter<'p>> {
        let parts = match self.split_max_size {
            Some(bytes) => split::cut(&plan.header, bytes)?.len(),
            None => 1,
        };
        if parts > 1 {
            for path in split::paths(output, parts) {
                check_output(&path, force)?;
            }
        }
        Ok(plan.write_unnamed(output, self.split_max_size, progress)?)
    }

    /// Gives the result its name, and writes what stands beside it. `source` is the model, `kind` the name of the
    /// quantisation.
    pub(super) fn commit(
        &self,
        plan: &Plan<'_>,
        writer: FilesWriter<'_>,
        output: &Path,
        (source, kind): (&Path, &str),
    ) -> anyhow::Result<Written> {
        let files = writer
            .commit()
            .with_context(|| format!("cannot write {}", output.display()))?;
        let mut written = Written {
            files,
            card: None,
            modelfile: None,
        };
        if !self.no_card {
            let card = Card {
                header: &plan.header,
                files: &written.files,
                kind,
            };
            written.card = Some(write(beside(output, "md"), &card.markdown())?);
        }
        if self.modelfile {
            let name = output.file_name().unwrap_or_default().to_string_lossy();
            let text = modelfile(&plan.header, &name, license(source)?.as_deref());
            written.modelfile = Some(write(beside(output, "Modelfile"), &text)?);
        }
        Ok(written)
    }
}

fn write(path: PathBuf, text: &str) -> anyhow::Result<PathBuf> {
    write_file(&path, text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// `OUT.gguf.ENDING`.
fn beside(output: &Path, ending: &str) -> PathBuf {
    let mut path = output.as_os_str().to_owned();
    path.push(".");
    path.push(ending);
    path.into()
}

/// The text of the licence, if the checkpoint has it.
fn license(source: &Path) -> anyhow::Result<Option<String>> {
    for name in ["LICENSE", "LICENSE.md", "LICENSE.txt"] {
        let path = source.join(name);
        if !path.is_file() {
            continue;
        }
        let size = path.metadata().map_or(0, |metadata| metadata.len());
        if size > 1 << 20 {
            bail!(
                "{}: a licence of {size} bytes\nhint: shorten it, or leave out --modelfile",
                path.display()
            );
        }
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok(Some(String::from_utf8_lossy(&text).into_owned()));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_counted_as_llama_gguf_split_counts() {
        assert_eq!(parse_size("500M"), Ok(500_000_000));
        assert_eq!(parse_size("2G"), Ok(2_000_000_000));
        for text in ["", "M", "0G", "-1G", "5", "1.5G", "99999999999999999999G", "5K"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
