//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::{CheckpointError, TensorFiles, folder, read_json_object};

/// Opens the shards that an index names. Index and shards must name the same tensors, each in the same place.
pub(super) fn open(dir: &Path, index: &Path) -> Result<TensorFiles, CheckpointError> {
    let json = read_json_object(index)?;
    let bad = |why: String| CheckpointError::Json {
        path: index.to_path_buf(),
        why,
    };
    let disagree = |tensor: &str, why: String| CheckpointError::Index {
        path: index.to_path_buf(),
        tensor: tensor.to_owned(),
        why,
    };
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| bad("it has no object `weight_map`".into()))?;
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        let file = file
            .as_str()
            .ok_or_else(|| bad(format!("the file of tensor {tensor} is not a string")))?;
        if !folder::is_file_name(file) {
            return Err(bad(format!(
                "tensor {tensor} names the file {file:?}, which leaves the folder"
            )));
        }
        if !file.ends_with(".safetensors") {
            return Err(bad(format!(
                "tensor {tensor} names the file {file:?}, which is no safetensors file"
            )));
        }
        files.insert(file);
    }
    let mut tensors = TensorFiles::default();
    for file in files {
        let path = dir.join(file);
        if !path.is_file() {
            return Err(bad(format!(
                "the shard {file} is not there\nhint: the download is not complete"
            )));
        }
        tensors.add(path)?;
    }
    for (tensor, file) in map {
        let here = tensors.path_of(tensor).and_then(Path::file_name);
        let file = file.as_str().unwrap_or_default();
        if here.is_none_or(|name| name != file) {
            return Err(disagree(tensor, format!("it is not in {file}")));
        }
    }
    if let Some(extra) = tensors.names().find(|name| !map.contains_key(*name)) {
        return Err(disagree(
            extra,
            "a shard holds it, the index does not name it".into(),
        ));
    }
    Ok(tensors)
}
