//! The `pipit.*` keys: what a file was made of, and how, so that it can be made again and compared.
//!
//! - `pipit.version`, `pipit.llama_cpp`: this program, and the llama.cpp in it
//! - `pipit.arguments`: the options that shape the file; of paths only the last part
//! - `pipit.source.files`, `pipit.source.sha256`: weights, configuration, tokenizer and template of the model
//! - `pipit.adapter.names`, `pipit.adapter.scale`, `pipit.adapter.base`: the merged adapters, if any, the factors
//!   that the user gave, and the model that each was trained on
//! - `pipit.adapter.files`, `pipit.adapter.sha256`: their files
//! - `pipit.imatrix.file`, `pipit.imatrix.sha256`: the importance matrix, if any
//!
//! The same model, adapters and options give the same keys on every machine, in every folder.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::source::Weights;
use super::{ModelError, SourceModel};
use crate::checksum::sha256;
use crate::gguf::{Array, Value};
use crate::llama_cpp;
use crate::merge::ScaledAdapter;

/// What a file is made with, besides the model.
#[derive(Debug, Clone, Copy, Default)]
pub struct Provenance<'a> {
    /// The adapters that are merged.
    pub adapters: &'a [ScaledAdapter],
    /// The file with the importance matrix.
    pub imatrix: Option<&'a Path>,
    /// The options that shape the file, without the folders of paths.
    pub arguments: &'a [String],
}

/// The files of a checkpoint that can have a say in the result, besides the weights.
const READ: &[&str] = &[
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
];

/// The folder with the named chat templates of a checkpoint.
const TEMPLATES: &str = "additional_chat_templates";

impl Provenance<'_> {
    /// The keys. Reads every file once, several at a time.
    pub(super) fn keys(&self, model: &SourceModel) -> Result<Vec<(String, Value)>, ModelError> {
        let (names, paths): (Vec<_>, Vec<_>) = source_files(model).into_iter().unzip();
        let mut keys: Vec<(String, Value)> = vec![
            ("pipit.version".into(), env!("CARGO_PKG_VERSION").into()),
            ("pipit.llama_cpp".into(), llama_cpp::version().into()),
        ];
        if !self.arguments.is_empty() {
            keys.push(("pipit.arguments".into(), self.arguments.to_vec().into()));
        }
        keys.push(("pipit.source.files".into(), names.into()));
        keys.push(("pipit.source.sha256".into(), checksums(&paths)?.into()));
        if !self.adapters.is_empty() {
            keys.extend(adapter_keys(self.adapters)?);
        }
        if let Some(imatrix) = self.imatrix {
            let sums = checksums(&[imatrix.to_path_buf()])?;
            keys.push(("pipit.imatrix.file".into(), file_name(imatrix).into()));
            keys.extend(
                sums.into_iter()
                    .map(|sum| ("pipit.imatrix.sha256".into(), sum.into())),
            );
        }
        Ok(keys)
    }
}

fn adapter_keys(adapters: &[ScaledAdapter]) -> Result<Vec<(String, Value)>, ModelError> {
    let (mut names, mut bases, mut files, mut paths) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for ScaledAdapter { adapter, .. } in adapters {
        let name = folder_name(adapter.dir());
        let base = adapter.config().base_model_name_or_path.as_deref();
        bases.push(base.map_or_else(String::new, public_name));
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            files.push(format!("{name}/{file}"));
            paths.push(adapter.dir().join(file));
        }
        names.push(name);
    }
    let scales = adapters.iter().map(|scaled| scaled.scale).collect();
    Ok(vec![
        ("pipit.adapter.names".into(), names.into()),
        ("pipit.adapter.scale".into(), Value::Array(Array::F32(scales))),
        ("pipit.adapter.base".into(), bases.into()),
        ("pipit.adapter.files".into(), files.into()),
        ("pipit.adapter.sha256".into(), checksums(&paths)?.into()),
    ])
}

/// The files that the model is made of, with the names that they are known by.
fn source_files(model: &SourceModel) -> Vec<(String, PathBuf)> {
    let named = |path: &Path| (file_name(path), path.to_path_buf());
    let checkpoint = match &model.weights {
        Weights::File(gguf) => return gguf.paths().map(named).collect(),
        Weights::Folder(checkpoint) => checkpoint,
    };
    let dir = checkpoint.dir();
    let mut files: Vec<_> = checkpoint.shard_paths().map(named).collect();
    let read = READ.iter().map(|name| dir.join(name));
    files.extend(read.filter(|path| path.is_file()).map(|path| named(&path)));
    let templates = std::fs::read_dir(dir.join(TEMPLATES))
        .into_iter()
        .flatten()
        .flatten();
    let mut templates: Vec<_> = templates
        .map(|entry| entry.path())
        .filter(|path| path.is_file() && path.extension().is_some_and(|ending| ending == "jinja"))
        .map(|path| (format!("{TEMPLATES}/{}", file_name(&path)), path))
        .collect();
    templates.sort();
    files.extend(templates);
    files
}

/// `ORGANISATION/NAME` as it stands; of a path on somebody's machine only the last part.
fn public_name(base: &str) -> String {
    let parts: Vec<_> = base.split(['/', '\\']).filter(|part| !part.is_empty()).collect();
    match parts[..] {
        [organisation, name]
            if base == format!("{organisation}/{name}") && !organisation.starts_with(['.', '~']) =>
        {
            base.to_owned()
        }
        [.., name] => name.to_owned(),
        [] => String::new(),
    }
}

/// The folder's own name, also for `.` and `dir/..`.
pub(super) fn folder_name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    whole
        .file_name()
        .map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn checksums(paths: &[PathBuf]) -> Result<Vec<String>, ModelError> {
    let sums = paths.par_iter().map(|path| {
        sha256(path).map_err(|source| ModelError::Read {
            path: path.clone(),
            source,
        })
    });
    sums.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_somebodys_machine_are_not_told() {
        for (base, public) in [
            ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
            ("smollm2", "smollm2"),
            ("/home/ann/models/smollm2/", "smollm2"),
            ("/home/smollm2", "smollm2"),
            ("../smollm2", "smollm2"),
            ("~/smollm2", "smollm2"),
            ("C:\\Users\\ann\\smollm2", "smollm2"),
            ("", ""),
        ] {
            assert_eq!(public_name(base), public, "{base}");
        }
    }
}
