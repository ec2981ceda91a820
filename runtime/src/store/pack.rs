//! Packing: a GGUF file with its adapters becomes a folder with a manifest, ready to be signed.

use std::fs;
use std::path::{Path, PathBuf};

use super::canary::Trial;
use super::manifest::{AdapterEntry, Golden};
use super::source::{MANIFEST, entry};
use super::{Manifest, StoreError, write_whole};
use crate::model;
use crate::wire::{Message, Role};

/// Tokens of a golden answer.
const GOLDEN_TOKENS: u32 = 32;

/// What to pack.
#[derive(Clone, Debug)]
pub struct Pack {
    /// The GGUF file.
    pub model: PathBuf,
    /// LoRA adapters by name.
    pub adapters: Vec<(String, PathBuf)>,
    /// Name of the package.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SPDX expression.
    pub license: Option<String>,
    /// Prompts whose answers are kept as what the model must say.
    pub golden: Vec<String>,
}

/// Writes `out`: the files, by a link where the file system has them, and the manifest.
///
/// # Errors
/// Files that are no models, a folder that cannot be written, a model that does not answer.
pub fn pack(pack: &Pack, trial: Option<&Trial>, out: &Path) -> Result<Manifest, StoreError> {
    model::inspect(&pack.model)?;
    fs::create_dir_all(out).map_err(|source| StoreError::io(out, source))?;
    let mut manifest = Manifest::new(&pack.name, &pack.version, entry(&pack.model)?);
    manifest.license.clone_from(&pack.license);
    manifest.min_pipit = Some(env!("CARGO_PKG_VERSION").to_owned());
    for (name, path) in &pack.adapters {
        model::inspect(path)?;
        let file = entry(path)?;
        let adapter = AdapterEntry {
            file: file.file,
            sha256: file.sha256,
            bytes: file.bytes,
            base: manifest.model.sha256.clone(),
        };
        manifest.adapters.insert(name.clone(), adapter);
    }
    let prompts = pack.golden.iter();
    manifest.golden = prompts
        .map(|prompt| Golden {
            messages: vec![Message {
                role: Role::User,
                content: prompt.clone(),
            }],
            max_tokens: GOLDEN_TOKENS,
            adapter: None,
            text: None,
            contains: None,
        })
        .collect();
    if let Some(trial) = trial {
        let tried = trial
            .answers(&manifest.golden)
            .map_err(|message| StoreError::Canary { message })?;
        for (golden, answer) in manifest.golden.iter_mut().zip(tried.answers) {
            golden.text = Some(answer);
        }
    }
    let bytes = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
    // Refused here rather than on the device.
    let manifest = Manifest::parse(&bytes, &out.join(MANIFEST).display().to_string())?;
    for path in std::iter::once(&pack.model).chain(pack.adapters.iter().map(|(_, path)| path)) {
        bring(path, out)?;
    }
    write_whole(&out.join(MANIFEST), &bytes)?;
    Ok(manifest)
}

fn bring(path: &Path, out: &Path) -> Result<(), StoreError> {
    let Some(name) = path.file_name() else {
        return Ok(());
    };
    let to = out.join(name);
    if to.exists() && fs::canonicalize(&to).ok() == fs::canonicalize(path).ok() {
        return Ok(());
    }
    let _ = fs::remove_file(&to);
    fs::hard_link(path, &to)
        .or_else(|_| fs::copy(path, &to).map(drop))
        .map_err(|source| StoreError::io(&to, source))
}
