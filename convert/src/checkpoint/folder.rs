//! What a folder may not bring: links to files elsewhere, weights as pickles, code to run.

use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use super::{CheckpointError, read_json_object};

/// Refuses a folder in which a file is a link to a place outside of it: what was unpacked or downloaded could name
/// any file of this machine, and it would end up in the result.
///
/// Hugging Face's cache is made of links, from `snapshots/REVISION/` to `blobs/` beside `snapshots`: those are
/// followed. A link to nothing is no fault as long as nobody reads it.
pub fn refuse_links(dir: &Path) -> Result<(), CheckpointError> {
    let read = |source| CheckpointError::Read {
        path: dir.to_path_buf(),
        source,
    };
    let inside = dir.canonicalize().map_err(read)?;
    let blobs = hub_blobs(&inside);
    for entry in std::fs::read_dir(dir).map_err(read)? {
        let entry = entry.map_err(read)?;
        if !entry.file_type().map_err(read)?.is_symlink() {
            continue;
        }
        let Ok(target) = entry.path().canonicalize() else {
            continue;
        };
        let follows =
            target.starts_with(&inside) || blobs.as_ref().is_some_and(|blobs| target.starts_with(blobs));
        if !follows {
            return Err(CheckpointError::Link {
                path: entry.path(),
                target,
            });
        }
    }
    Ok(())
}

/// `models--ORG--NAME/blobs`, if the folder is a `models--ORG--NAME/snapshots/REVISION`.
fn hub_blobs(dir: &Path) -> Option<PathBuf> {
    let snapshots = dir.parent()?;
    let model = snapshots.parent()?;
    let hub = snapshots.file_name()? == "snapshots" && model.file_name()?.to_str()?.contains("--");
    hub.then(|| model.join("blobs"))
}

/// Whether a name in an index is the name of a file in the same folder, and no path.
pub(super) fn is_file_name(name: &str) -> bool {
    let one = matches!(
        Path::new(name).components().collect::<Vec<_>>().as_slice(),
        [Component::Normal(part)] if *part == name
    );
    one && !name.contains(['\\', ':', '\0'])
}

/// Files that a trainer leaves beside the weights.
const OF_TRAINING: &[&str] = &["training_args", "optimizer", "scheduler", "scaler", "rng_state"];

/// Refuses a folder with pickled weights, for one that has no others: loading a pickle runs whatever it says.
pub fn refuse_pickle(dir: &Path) -> Result<(), CheckpointError> {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            let name = name.to_ascii_lowercase();
            [".bin", ".pt", ".pth", ".pkl", ".ckpt"]
                .iter()
                .any(|ending| name.ends_with(ending))
                && !OF_TRAINING.iter().any(|start| name.starts_with(start))
        })
        .collect();
    names.sort_unstable();
    match names.into_iter().next() {
        None => Ok(()),
        Some(file) => Err(CheckpointError::Pickle {
            path: dir.to_path_buf(),
            file,
        }),
    }
}

/// Refuses a folder whose configuration asks for Python code of its own: that code decides what the model
/// computes, it is never run here, and the built-in architecture of the same name may compute something else.
pub(super) fn refuse_code(dir: &Path, config: &Map<String, Value>) -> Result<(), CheckpointError> {
    refuse_code_in(&dir.join("config.json"), config)?;
    let tokenizer = dir.join("tokenizer_config.json");
    if tokenizer.is_file() {
        refuse_code_in(&tokenizer, &read_json_object(&tokenizer)?)?;
    }
    Ok(())
}

fn refuse_code_in(path: &Path, json: &Map<String, Value>) -> Result<(), CheckpointError> {
    let key = ["auto_map", "trust_remote_code", "custom_pipelines"]
        .into_iter()
        .find(|key| match json.get(*key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Object(map)) => !map.is_empty(),
            Some(_) => true,
        });
    match key {
        None => Ok(()),
        Some(key) => Err(CheckpointError::Code {
            path: path.to_path_buf(),
            key,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_names_of_files() {
        assert!(is_file_name("model-00001-of-00002.safetensors"));
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "/etc/passwd",
            "./x",
            "x/",
            "a\\b",
            "c:x",
            "x\0",
        ] {
            assert!(!is_file_name(name), "{name:?}");
        }
    }
}
