//! What is served: the file that the configuration names, else the active model of the store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Store, StoreError};
use crate::config::Config;
use crate::engine;
use crate::engine::prefix::disk;
use crate::model::{self, Header};
use crate::plan::{self, Plan};

/// A model to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Its name in the store; `None` for a file of the configuration.
    pub id: Option<String>,
    /// The GGUF file.
    pub path: PathBuf,
    /// What its manifest says of it.
    pub sha256: Option<String>,
    /// LoRA adapters by name.
    pub adapters: BTreeMap<String, PathBuf>,
}

impl Served {
    /// The model of a configuration; `None` when it names none and none is installed.
    ///
    /// # Errors
    /// A manifest that cannot be read.
    pub fn of(config: &Config, state: &Path) -> Result<Option<Self>, StoreError> {
        if let Some(path) = &config.model.path {
            return Ok(Some(Self {
                id: None,
                path: path.clone(),
                sha256: None,
                adapters: config.adapters.clone(),
            }));
        }
        let store = Store::of(state);
        let place = store.place().filter(|place| !place.active.is_empty());
        place
            .map(|place| Self::installed(&store, &place.active))
            .transpose()
    }

    /// An installed model.
    ///
    /// # Errors
    /// A manifest that cannot be read.
    pub fn installed(store: &Store, id: &str) -> Result<Self, StoreError> {
        let manifest = store.manifest(id)?;
        let adapters = manifest.adapters.iter();
        Ok(Self {
            id: Some(id.to_owned()),
            path: store.file(&manifest.model.sha256),
            adapters: adapters
                .map(|(name, adapter)| (name.clone(), store.file(&adapter.sha256)))
                .collect(),
            sha256: Some(manifest.model.sha256),
        })
    }

    /// The header of the file, and what it will take.
    ///
    /// # Errors
    /// A file that is no model, settings that no plan can be made for.
    pub fn plan(&self, config: &Config) -> Result<(Header, Plan), StoreError> {
        let header = model::inspect(&self.path)?;
        let plan = Plan::of(&header, &plan::Settings::of(config)?);
        Ok((header, plan))
    }

    /// What the worker is told.
    ///
    /// # Errors
    /// A working folder that is not there.
    pub fn settings(&self, config: &Config, state: &Path) -> std::io::Result<engine::Settings> {
        let adapters = self.adapters.iter();
        let adapters = adapters.map(|(name, path)| Ok((name.clone(), std::path::absolute(path)?)));
        let disk = disk::Place {
            folder: std::path::absolute(state.join("prefix"))?,
            bytes: config.prefix.disk_bytes,
            tokens: config.prefix.disk_tokens,
        };
        Ok(engine::Settings {
            model: std::path::absolute(&self.path)?,
            n_ctx: config.model.n_ctx,
            slots: config.model.slots,
            threads: config.model.threads,
            cache_type_k: config.model.cache_type_k.clone(),
            cache_type_v: config.model.cache_type_v.clone(),
            prefill_chunk: config.model.prefill_chunk,
            prefill_ms: config.model.prefill_ms,
            adapters: adapters.collect::<std::io::Result<_>>()?,
            prefix_bytes: config.prefix.ram_bytes,
            prefix_disk: (config.prefix.disk_bytes > 0).then_some(disk),
        })
    }
}
