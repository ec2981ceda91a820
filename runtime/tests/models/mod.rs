//! Where the models of the tests are.

use std::path::PathBuf;

/// The file that the variable names, else the one of this name in the cache that `scripts/fetch-model` fills.
pub(crate) fn model(variable: &str, name: &str) -> PathBuf {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let path = set(variable).unwrap_or_else(|| {
        set("PIPIT_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("pipit")))
            .or_else(|| set("HOME").map(|home| home.join(".cache/pipit")))
            .expect("HOME is set")
            .join(name)
    });
    assert!(
        path.is_file(),
        "the test model is not at {}; ./check fetches it, {variable} names another",
        path.display()
    );
    path
}
