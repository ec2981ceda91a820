//! The `general.*` keys, as llama.cpp's converter writes them, and our own `pipit.*` keys.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use super::source::Weights;
use super::{ModelError, SourceModel};
use crate::adapter::PeftAdapter;
use crate::arch::Architecture;
use crate::checkpoint::{Checkpoint, read_json_object};
use crate::gguf::{Array, Value};
use crate::merge::ScaledAdapter;
use crate::quantize::FileType;

/// What a GGUF file says of how it is stored, rather than of the model.
const OF_THE_FILE: &[&str] = &[
    "general.architecture",
    "general.type",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
];

/// `general.*`: from a GGUF file all that it says of the model, from a folder what there is to find.
pub(super) fn general(
    model: &SourceModel,
    arch: &Architecture,
    file: FileType,
    parameters: u64,
) -> Result<Vec<(String, Value)>, ModelError> {
    let mut keys: Vec<(String, Value)> = vec![
        ("general.architecture".into(), arch.name.into()),
        ("general.type".into(), "model".into()),
    ];
    match &model.weights {
        Weights::Folder(checkpoint) => keys.extend(of_folder(checkpoint, parameters)?),
        Weights::File(gguf) => {
            let said = gguf
                .metadata()
                .iter()
                .filter(|(key, _)| key.starts_with("general.") && !OF_THE_FILE.contains(&key.as_str()));
            keys.extend(said.cloned());
        }
    }
    keys.push(("general.quantization_version".into(), Value::U32(2)));
    keys.push(("general.file_type".into(), file.number().into()));
    Ok(keys)
}

fn of_folder(checkpoint: &Checkpoint, parameters: u64) -> Result<Vec<(String, Value)>, ModelError> {
    let mut keys: Vec<(String, Value)> = Vec::new();
    let generation = checkpoint.dir().join("generation_config.json");
    if generation.is_file() {
        keys.extend(sampling(&read_json_object(&generation)?));
    }
    keys.push(("general.name".into(), name(checkpoint).into()));
    keys.push(("general.size_label".into(), size_label(parameters).into()));
    if let Some(license) = license(checkpoint.dir())? {
        keys.push(("general.license".into(), license.into()));
    }
    Ok(keys)
}

/// `_name_or_path` of config.json where that is a name, else the folder's name.
fn name(checkpoint: &Checkpoint) -> String {
    let given = checkpoint.config().get("_name_or_path").and_then(Json::as_str);
    match given.filter(|name| !name.is_empty() && !name.starts_with('.') && name.matches('/').count() <= 1) {
        Some(name) if name.contains(' ') => name.to_owned(),
        Some(name) => title(name.rsplit('/').next().unwrap_or(name)),
        None => title(&folder_name(checkpoint.dir())),
    }
}

/// `license:` in the front matter of the model card.
fn license(dir: &Path) -> Result<Option<String>, ModelError> {
    let path = dir.join("README.md");
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read(&path).map_err(|source| ModelError::Read { path, source })?;
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines();
    if lines.next() != Some("---") {
        return Ok(None);
    }
    let front = lines.take_while(|line| *line != "---");
    let license = front.filter_map(|line| line.strip_prefix("license:")).next();
    Ok(license
        .map(|name| name.trim().trim_matches(['"', '\'']).to_owned())
        .filter(|name| !name.is_empty()))
}

/// The sampler's settings that the model's makers recommend.
fn sampling(config: &Map<String, Json>) -> Vec<(String, Value)> {
    let number = |key: &str| config.get(key).and_then(Json::as_f64);
    let float = |key: &str| number(key).map(|value| Value::F32(value as f32));
    [
        ("top_k", number("top_k").map(|value| Value::I32(value as i32))),
        ("top_p", float("top_p")),
        ("min_p", float("min_p")),
        ("temp", float("temperature")),
        ("penalty_repeat", float("repetition_penalty")),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some((format!("general.sampling.{key}"), value?)))
    .collect()
}

/// `my-model-v2` as `My Model v2` (gguf-py metadata.py, `id_to_title`).
fn title(id: &str) -> String {
    let id = id.trim().replace('-', " ");
    let words = id.split_whitespace().map(|word| {
        let version = word.strip_prefix('v').unwrap_or(word);
        let numbered = word.starts_with(|c: char| c.is_ascii_digit())
            || (word.starts_with('v')
                && !version.is_empty()
                && version
                    .split('.')
                    .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())));
        let lower = word.chars().any(char::is_lowercase) && !word.chars().any(char::is_uppercase);
        if lower && !numbered {
            capitalised(word)
        } else {
            word.to_owned()
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Python's `str.title` of a word in small letters.
fn capitalised(word: &str) -> String {
    let mut after_letter = false;
    let mut out = String::with_capacity(word.len());
    for c in word.chars() {
        if after_letter {
            out.push(c);
        } else {
            out.extend(c.to_uppercase());
        }
        after_letter = c.is_alphabetic();
    }
    out
}

/// `135M` (gguf-py utility.py, `model_weight_count_rounded_notation`).
fn size_label(parameters: u64) -> String {
    let (scale, suffix) = match parameters {
        1_000_000_000_001.. => (1e-12, 'T'),
        1_000_000_001.. => (1e-9, 'B'),
        1_000_001.. => (1e-6, 'M'),
        _ => (1e-3, 'K'),
    };
    let scaled = parameters as f64 * scale;
    let digits = format!("{}", scaled.round_ties_even());
    let decimals = 2usize.saturating_sub(digits.trim_start_matches('0').len());
    format!("{scaled:.decimals$}{suffix}")
}

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
fn folder_name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    whole
        .file_name()
        .map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_are_spelled_as_llama_cpp_spells_them() {
        assert_eq!(title("smollm2-135m-instruct-v0.2"), "Smollm2 135m Instruct v0.2");
        assert_eq!(title("tiny_llama-1b-TIED"), "Tiny_Llama 1b TIED");
        assert_eq!(size_label(134_515_008), "135M");
        assert_eq!(size_label(1_235_814_400), "1.2B");
        assert_eq!(size_label(26_112), "26K");
        assert_eq!(size_label(980), "1.0K");
        assert_eq!(size_label(200), "0.20K");
    }
}
