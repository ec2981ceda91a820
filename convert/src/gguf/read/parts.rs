//! The parts of a split file: which they are, and whether they belong together.
//!
//! Source: llama.cpp, tools/gguf-split/gguf-split.cpp and llama_split_path in src/llama.cpp. Every part says
//! `split.no` (from 0), `split.count` and `split.tensors.count`; the first one has all other keys.

use std::path::{Path, PathBuf};

use super::Gguf;
use crate::gguf::{GgufError, split};

/// The paths of all parts of the file that `part` was read from, in their order. Nothing if it is whole.
pub(super) fn beside(path: &Path, part: &Gguf) -> Result<Option<Vec<PathBuf>>, GgufError> {
    let Some(count) = part.unsigned_opt(split::COUNT)?.filter(|count| *count > 1) else {
        return Ok(None);
    };
    let no = part.unsigned(split::NO)?;
    let wrong = |why: String| Err(part.part_error(0, why));
    if no >= count || count > split::MAX_PARTS {
        return wrong(format!(
            "it says that it is part {} of {count}",
            no.saturating_add(1)
        ));
    }
    let Some((stem, number, of)) = split::parse(path) else {
        let name = split::path(Path::new("NAME"), no, count);
        return wrong(format!(
            "it is part {} of {count}, and its name does not say so: the others cannot be found\nhint: the parts are named like {}",
            no + 1,
            name.display()
        ));
    };
    if (number, of) != (no, count) {
        return wrong(format!(
            "it is part {} of {count}, and its name says part {} of {of}",
            no + 1,
            number + 1
        ));
    }
    let paths: Vec<_> = (0..count).map(|no| split::path(&stem, no, count)).collect();
    match paths.iter().position(|path| !path.is_file()) {
        None => Ok(Some(paths)),
        Some(missing) => wrong(format!(
            "it is part {} of {count}, and {} is not there\nhint: all parts must be in one folder",
            no + 1,
            paths[missing].display()
        )),
    }
}

/// Checks that part `at`, read on its own, is the part that it was taken for.
pub(super) fn check(part: &Gguf, at: usize, count: usize, tensors: u64) -> Result<(), GgufError> {
    for (key, wanted) in [
        (split::NO, at as u64),
        (split::COUNT, count as u64),
        (split::TENSORS, tensors),
    ] {
        let found = part.unsigned(key)?;
        if found != wanted {
            return Err(part.part_error(
                0,
                format!("{key} is {found}, where the other parts need {wanted}"),
            ));
        }
    }
    Ok(())
}
