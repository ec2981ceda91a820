//! A signed model, as its maker packs it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use minisign::KeyPair;
use serde_json::Value;
use tempfile::TempDir;

use crate::device::PATIENCE;
use crate::program;

/// Who signs.
#[derive(Debug)]
pub struct Maker {
    pair: KeyPair,
}

impl Maker {
    /// One with a key of its own.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn new() -> Result<Self> {
        Ok(Self {
            pair: KeyPair::generate_unencrypted_keypair()?,
        })
    }

    /// What a device's configuration says to trust this maker.
    pub fn trusted(&self) -> String {
        format!("[install]\ntrusted_keys = [\"{}\"]\n", self.pair.pk.to_base64())
    }

    /// Signs a file, as `minisign -Sm` does.
    ///
    /// # Errors
    /// When it cannot be read, or its folder not be written.
    pub fn sign(&self, path: &Path) -> Result<()> {
        let bytes = std::fs::read(path)?;
        let signed = minisign::sign(Some(&self.pair.pk), &self.pair.sk, bytes.as_slice(), None, None)?;
        let mut name = path.as_os_str().to_owned();
        name.push(".minisig");
        std::fs::write(PathBuf::from(name), signed.to_string())?;
        Ok(())
    }

    /// Packs a model with `pipit model pack` and signs it.
    ///
    /// # Errors
    /// When the program does not pack it.
    pub fn pack(&self, model: &Path, version: &str, golden: &[&str]) -> Result<Package> {
        let folder = tempfile::tempdir()?;
        let text = |path: &Path| {
            path.to_str()
                .map(ToOwned::to_owned)
                .context("a path that is not UTF-8")
        };
        let (model, out) = (text(model)?, text(folder.path())?);
        let mut arguments = vec![
            "model",
            "pack",
            &model,
            "-o",
            &out,
            "--name",
            "m",
            "--version",
            version,
        ];
        for prompt in golden {
            arguments.extend(["--golden", prompt]);
        }
        program::run("pipit", arguments, PATIENCE)?.success()?;
        let package = Package { folder };
        self.sign(&package.manifest_path())?;
        Ok(package)
    }
}

/// A folder with a manifest, a signature and a model.
#[derive(Debug)]
pub struct Package {
    folder: TempDir,
}

impl Package {
    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Its manifest.
    pub fn manifest_path(&self) -> PathBuf {
        self.path().join("manifest.json")
    }

    /// The manifest's content.
    ///
    /// # Errors
    /// When it is not JSON.
    pub fn manifest(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&std::fs::read(self.manifest_path())?)?)
    }

    /// SHA-256 of the model.
    ///
    /// # Errors
    /// When the manifest is not JSON.
    pub fn sha256(&self) -> Result<String> {
        Ok(self.manifest()?["model"]["sha256"]
            .as_str()
            .context("no sha256")?
            .to_owned())
    }
}
