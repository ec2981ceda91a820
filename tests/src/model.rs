//! Where the real model is.

use std::env;
use std::path::PathBuf;

use anyhow::{Result, bail};

/// The path of SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB): `PIPIT_TEST_MODEL`, else the cache that
/// `scripts/fetch-model` fills.
///
/// # Errors
/// When there is no such file. A test without its model fails; it is not skipped.
pub fn smollm2() -> Result<PathBuf> {
    let path = match env::var_os("PIPIT_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => cache().join("SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    if !path.is_file() {
        bail!(
            "{} is not there\n  hint: scripts/fetch-model gets it",
            path.display()
        );
    }
    Ok(path)
}

/// Where the scripts keep what they fetch: `PIPIT_CACHE`, else `~/.cache/pipit`.
pub(crate) fn cache() -> PathBuf {
    let set = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("PIPIT_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|base| base.join("pipit")))
        .unwrap_or_else(|| set("HOME").unwrap_or_default().join(".cache/pipit"))
}
