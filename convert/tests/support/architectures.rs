//! The tiny checkpoints of every architecture.

use std::path::{Path, PathBuf};

use pipit_convert::arch;
use pipit_convert::gguf::{Gguf, TensorType};
use pipit_convert::model::{ModelError, Plan, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::{FileType, Recipe};

use super::fixture;

/// All of them.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    arch::ALL.iter().flat_map(|arch| arch.fixtures).copied()
}

/// The checkpoint with the tokenizer that all share, in a folder of its name.
pub(crate) fn checkpoint(name: &str, scratch: &Path) -> PathBuf {
    let whole = scratch.join(name);
    std::fs::create_dir(&whole).unwrap();
    for from in ["architectures/tokenizer", &format!("architectures/{name}")] {
        for entry in std::fs::read_dir(fixture(from)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, whole.join(path.file_name().unwrap())).unwrap();
        }
    }
    for ours in ["expected.json", "logits.safetensors"] {
        std::fs::remove_file(whole.join(ours)).unwrap();
    }
    whole
}

/// Converts a checkpoint without proving its tokenizer, which is the same for all.
pub(crate) fn convert(dir: &Path, kind: TensorType, out: &Path) -> Result<Gguf, ModelError> {
    let mut model = SourceModel::open(dir)?;
    model.skip_tokenizer_proof();
    let recipe = Recipe::new(FileType::from_name(kind.name()).unwrap());
    Plan::new(&model, &[], &recipe)?.write(out, None, &Silent)?;
    Ok(Gguf::open(out).unwrap())
}
