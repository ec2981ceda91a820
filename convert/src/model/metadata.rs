//! Our own `pipit.*` keys: what a file was made of.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{ModelError, SourceModel};
use crate::adapter::PeftAdapter;
use crate::gguf::{Array, Value};
use crate::merge::ScaledAdapter;

/// `pipit.*`: what the file was made of, so that it can be made again.
///
/// - `pipit.version`: the version of this program
/// - `pipit.source.files`, `pipit.source.sha256`: the files of the model and their checksums
/// - `pipit.adapter.files`, `pipit.adapter.sha256`, `pipit.adapter.scale`: the merged adapters, if any
pub(super) fn provenance(
    model: &SourceModel,
    adapters: &[ScaledAdapter],
) -> Result<Vec<(String, Value)>, ModelError> {
    let (names, sums) = checksums(&model.files())?;
    let mut keys: Vec<(String, Value)> = vec![
        ("pipit.version".into(), env!("CARGO_PKG_VERSION").into()),
        ("pipit.source.files".into(), names.into()),
        ("pipit.source.sha256".into(), sums.into()),
    ];
    if !adapters.is_empty() {
        let weights: Vec<_> = adapters
            .iter()
            .map(|scaled| PeftAdapter::weights_path(scaled.adapter.dir()))
            .collect();
        let names: Vec<_> = adapters
            .iter()
            .map(|scaled| format!("{}/adapter_model.safetensors", folder_name(scaled.adapter.dir())))
            .collect();
        let scales = adapters.iter().map(|scaled| scaled.scale).collect();
        keys.push(("pipit.adapter.files".into(), names.into()));
        keys.push(("pipit.adapter.sha256".into(), checksums(&weights)?.1.into()));
        keys.push(("pipit.adapter.scale".into(), Value::Array(Array::F32(scales))));
    }
    Ok(keys)
}

/// The names and the sha256 of files.
fn checksums(paths: &[PathBuf]) -> Result<(Vec<String>, Vec<String>), ModelError> {
    let name = |path: &PathBuf| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let sums = paths
        .par_iter()
        .map(|path| {
            checksum(path).map_err(|source| ModelError::Read {
                path: path.clone(),
                source,
            })
        })
        .collect::<Result<_, _>>()?;
    Ok((paths.iter().map(name).collect(), sums))
}

fn checksum(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The folder's own name, also for `.` and `dir/..`.
pub(super) fn folder_name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    whole
        .file_name()
        .map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}
