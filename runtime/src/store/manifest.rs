//! The manifest of a model: what belongs to it, by sha256, and what it must answer before it is served.
//!
//! In: JSON of at most [`MOST_BYTES`]. Out: a [`Manifest`] in which every name and hash is well formed. It is what is
//! signed; through its hashes the signature covers every file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::StoreError;
use crate::wire::Message;
use crate::wire::request::hex;
use crate::wire::topics::valid_id;

/// Largest manifest that is read.
pub const MOST_BYTES: usize = 256 * 1024;
/// Version of the format.
const FORMAT: u32 = 1;
/// Golden prompts of one manifest.
const MOST_GOLDEN: usize = 32;

/// What is signed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format: 1.
    pub pipit_model: u32,
    /// `[A-Za-z0-9_.-]{1,40}`
    pub name: String,
    /// For people: `1.2`, `2026-11-26`.
    pub version: String,
    /// SPDX expression of the weights' licence.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub license: Option<String>,
    /// Oldest version of Pipit that can serve it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub min_pipit: Option<String>,
    /// The GGUF file.
    pub model: FileEntry,
    /// LoRA adapters by the name that a request calls them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub adapters: BTreeMap<String, AdapterEntry>,
    /// What it must answer before it is served.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub golden: Vec<Golden>,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name beside the manifest; no path.
    pub file: String,
    /// 64 hexadecimal digits.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
}

/// An adapter, and the base that it was trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterEntry {
    /// Its name beside the manifest; no path.
    pub file: String,
    /// 64 hexadecimal digits.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
    /// The sha256 of its base model: the one of this manifest.
    pub base: String,
}

/// A prompt with what is expected of the answer, which is greedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// The conversation.
    pub messages: Vec<Message>,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// LoRA adapter.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub adapter: Option<String>,
    /// The whole answer. Other CPUs may decide a near tie otherwise: `contains` forgives that.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub text: Option<String>,
    /// A part of the answer. With neither, any answer that is not empty will do.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub contains: Option<String>,
}

impl Golden {
    /// What is wrong with an answer.
    pub fn judge(&self, answer: &str) -> Result<(), String> {
        let short = |text: &str| format!("{:?}", text.chars().take(80).collect::<String>());
        match (&self.text, &self.contains) {
            (Some(text), _) if text != answer => {
                Err(format!("it answers {}, not {}", short(answer), short(text)))
            }
            (None, Some(part)) if !answer.contains(part) => {
                Err(format!("its answer {} lacks {}", short(answer), short(part)))
            }
            (None, None) if answer.trim().is_empty() => Err("it answers nothing".to_owned()),
            _ => Ok(()),
        }
    }
}

impl Manifest {
    /// A manifest of the current format, without adapters or golden prompts.
    pub fn new(name: &str, version: &str, model: FileEntry) -> Self {
        Self {
            pipit_model: FORMAT,
            name: name.to_owned(),
            version: version.to_owned(),
            license: None,
            min_pipit: None,
            model,
            adapters: BTreeMap::new(),
            golden: Vec::new(),
        }
    }

    /// Reads and checks one; `place` is where it was found.
    ///
    /// # Errors
    /// [`StoreError::Manifest`]
    pub fn parse(bytes: &[u8], place: &str) -> Result<Self, StoreError> {
        let fail = |message: String| StoreError::Manifest {
            place: place.to_owned(),
            message,
        };
        if bytes.len() > MOST_BYTES {
            return Err(fail(format!("it has more than {MOST_BYTES} bytes")));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| fail(error.to_string()))?;
        manifest.check().map_err(fail)?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        if self.pipit_model != FORMAT {
            return Err(format!(
                "`pipit_model` is {}, this version reads {FORMAT}",
                self.pipit_model
            ));
        }
        if !valid_id(&self.name) || self.name.len() > 40 {
            return Err("`name` must match [A-Za-z0-9_.-]{1,40}".to_owned());
        }
        if self.version.is_empty() || self.version.len() > 40 {
            return Err("`version` must have 1 to 40 bytes".to_owned());
        }
        if let Some(least) = &self.min_pipit
            && number(least)? > number(env!("CARGO_PKG_VERSION"))?
        {
            return Err(format!(
                "it needs Pipit {least}, this is {}",
                env!("CARGO_PKG_VERSION")
            ));
        }
        for file in self.files() {
            let Some(stem) = file.file.strip_suffix(".gguf") else {
                return Err(format!("`{}` does not end in .gguf", file.file));
            };
            if stem.is_empty() || file.file.contains(['/', '\\', '\0', '?', '#', '%']) {
                return Err(format!("`{}` is no name of a file", file.file));
            }
            if !is_sha256(&file.sha256) {
                return Err(format!(
                    "{}: `sha256` must be 64 hexadecimal digits, lower case",
                    file.file
                ));
            }
        }
        for (name, adapter) in &self.adapters {
            if !valid_id(name) {
                return Err(format!(
                    "the adapter's name `{name}` must match [A-Za-z0-9_.-]{{1,64}}"
                ));
            }
            if adapter.base != self.model.sha256 {
                return Err(format!(
                    "adapter {name} belongs to the base {}, and the model is {}",
                    adapter.base, self.model.sha256
                ));
            }
        }
        if self.golden.len() > MOST_GOLDEN {
            return Err(format!("more than {MOST_GOLDEN} golden prompts"));
        }
        for (at, golden) in self.golden.iter().enumerate() {
            if golden.messages.is_empty() || !(1..=1024).contains(&golden.max_tokens) {
                return Err(format!(
                    "golden prompt {at}: it needs messages and `max_tokens` of 1 to 1024"
                ));
            }
            if let Some(adapter) = &golden.adapter
                && !self.adapters.contains_key(adapter)
            {
                return Err(format!("golden prompt {at}: there is no adapter `{adapter}`"));
            }
        }
        Ok(())
    }

    /// The model and the adapters.
    pub fn files(&self) -> impl Iterator<Item = FileEntry> + '_ {
        let adapters = self.adapters.values().map(|adapter| FileEntry {
            file: adapter.file.clone(),
            sha256: adapter.sha256.clone(),
            bytes: adapter.bytes,
        });
        std::iter::once(self.model.clone()).chain(adapters)
    }

    /// What an installed model is called: its name and the beginning of the hash of the manifest as it was signed.
    pub fn id(&self, signed: &[u8]) -> String {
        let hash = hex(&Sha256::digest(signed));
        format!("{}-{}", self.name, hash.get(..12).unwrap_or(&hash))
    }
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit))
}

/// `1.2.3` as three numbers.
fn number(version: &str) -> Result<[u32; 3], String> {
    let mut numbers = [0; 3];
    let mut parts = version.split('.');
    for number in &mut numbers {
        let part = parts.next().unwrap_or("0");
        *number = part
            .parse()
            .map_err(|_| format!("`min_pipit`: `{version}` is no version"))?;
    }
    Ok(numbers)
}
