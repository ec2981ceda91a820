//! The programs of examples/clients, started as their READMEs say.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::model::cache;

/// A folder of examples/clients with what its programs need.
#[derive(Debug)]
pub struct Example {
    folder: PathBuf,
    interpreter: Option<PathBuf>,
    /// Where a copy lies beside its node_modules.
    _copy: Option<TempDir>,
}

impl Example {
    /// The shell scripts.
    pub fn mosquitto() -> Self {
        Self {
            folder: source("mosquitto"),
            interpreter: None,
            _copy: None,
        }
    }

    /// The Python programs, with the packages of their requirements.txt.
    ///
    /// # Errors
    /// When there is no such virtual environment. A test without it fails; it is not skipped.
    pub fn python() -> Result<Self> {
        let interpreter = cache().join("clients/python-paho/bin/python");
        wanted(&interpreter)?;
        Ok(Self {
            folder: source("python-paho"),
            interpreter: Some(interpreter),
            _copy: None,
        })
    }

    /// The program for OpenAI's package, with what `tests/openai/requirements.txt` names.
    ///
    /// # Errors
    /// When there is no such virtual environment. A test without it fails; it is not skipped.
    pub fn openai() -> Result<Self> {
        let interpreter = cache().join("clients/python-openai/bin/python");
        wanted(&interpreter)?;
        Ok(Self {
            folder: source("python-openai"),
            interpreter: Some(interpreter),
            _copy: None,
        })
    }

    /// What runs its programs; `env` where they run by themselves.
    pub fn interpreter(&self) -> &Path {
        self.interpreter.as_deref().unwrap_or(Path::new("env"))
    }

    /// The programs for Node, in a copy beside the modules of their package-lock.json: Node looks nowhere else.
    ///
    /// # Errors
    /// When the modules are not there. A test without them fails; it is not skipped.
    pub fn node() -> Result<Self> {
        let modules = cache().join("clients/mqtt.js/node_modules");
        wanted(&modules)?;
        let copy = tempfile::tempdir()?;
        for file in std::fs::read_dir(source("mqtt.js"))? {
            let file = file?;
            if file.path().extension().is_some_and(|kind| kind == "mjs") {
                std::fs::copy(file.path(), copy.path().join(file.file_name()))?;
            }
        }
        symlink(modules, copy.path().join("node_modules"))?;
        Ok(Self {
            folder: copy.path().to_owned(),
            interpreter: Some(PathBuf::from("node")),
            _copy: Some(copy),
        })
    }

    /// The command that runs one of its programs. Ctrl-C (SIGINT) reaches it also where the tests run in the background.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("env");
        command.arg("--default-signal=INT");
        command.args(&self.interpreter).arg(self.folder.join(program));
        command
    }
}

/// The program of a Node-RED with nothing added, as `tests/node-red/package-lock.json` names it.
///
/// # Errors
/// When it is not there. A test without it fails; it is not skipped.
pub fn node_red() -> Result<PathBuf> {
    let program = cache().join("node-red/node_modules/node-red/red.js");
    wanted(&program)?;
    Ok(program)
}

/// A folder or file of examples/clients.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../examples/clients")
        .join(name)
}

fn wanted(path: &Path) -> Result<()> {
    ensure!(
        path.exists(),
        "{} is not there\n  hint: ./check installs what the examples need",
        path.display()
    );
    Ok(())
}
