//! Boards: what is known about a device, as data. firmware-configs/ has one TOML file a board on one a system-on-chip.
//!
//! In: the name of a board, or a user's own file. Out: a [`Board`] with its [`Soc`], checked. The files that ship are in
//! the program, so that a device needs no repository; a user's own goes the same way. What is not known is absent in a
//! file, and shows as unknown.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

mod builtin;
mod check;
pub mod soc;
mod table;

pub use soc::Soc;
pub use table::{overview, speeds};

/// A board.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Board {
    /// The name of its file, by which it is asked for.
    #[serde(skip_deserializing)]
    pub id: String,
    /// As people call it.
    pub name: String,
    /// The name of its system-on-chip's file, or a path beside this one.
    #[serde(rename = "soc", skip_serializing)]
    soc_name: String,
    /// Its system-on-chip.
    #[serde(skip_deserializing)]
    pub soc: Soc,
    /// How far it was tried.
    pub tier: Tier,
    /// Who answers for it.
    pub maintainer: String,
    /// `compatible` of its device tree, by which it is recognised.
    #[serde(default)]
    pub compatible: Vec<String>,
    /// Its memory.
    pub memory: Memory,
    /// What to begin with.
    pub recommended: Recommended,
    /// Decode speeds that somebody measured on it.
    #[serde(default)]
    pub measured: Vec<Measured>,
}

/// How far a board was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// `./check --boards` runs its build under qemu, on a model of its cores.
    Emulated,
    /// Its build succeeds; nobody ran it.
    Builds,
    /// Nobody of the project tried it.
    Community,
}

/// The memory of a board.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// The sizes that it is sold with, ascending.
    pub mib: Vec<u64>,
    /// Kind, speed and width.
    pub kind: Option<String>,
    /// Transfers a second times width, 1e9 bytes a second.
    pub peak_gb_per_second: Option<f64>,
    /// Where kind and peak come from, with a date.
    pub source: Option<String>,
    /// A measured bandwidth.
    pub measured: Option<Bandwidth>,
}

/// A bandwidth that somebody measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bandwidth {
    /// 1e9 bytes a second.
    pub gb_per_second: f64,
    /// With which program.
    pub how: String,
    /// Where it is published, with a date.
    pub source: String,
}

/// What to begin with on a board.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recommended {
    /// A model.
    pub model: String,
    /// The type of its weights, as llama.cpp spells it.
    pub quantisation: String,
    /// `[model] n_ctx`
    pub n_ctx: u32,
    /// `[model] cache_type_k` and `cache_type_v`
    pub cache_type: String,
    /// `[model] threads`; absent is one for each fast core.
    pub threads: Option<u32>,
    /// `[model] slots`
    pub slots: u32,
}

/// A decode speed that somebody measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// The model.
    pub model: String,
    /// The type of its weights.
    pub quantisation: String,
    /// The program.
    pub engine: String,
    /// Decode, of one sequence.
    pub tokens_per_second: f64,
    /// Weights and KV that a token reads, 1e6 bytes.
    pub megabytes_per_token: f64,
    /// Threads, where it is known.
    pub threads: Option<u32>,
    /// Where it is published, with a date.
    pub source: String,
}

/// Why there is no such board.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// No file of this name is in the program.
    #[error(
        "no board is called `{name}`; hint: {nearest}a file of your own is named with its path (./my-board.toml); known: {known}"
    )]
    NotFound {
        /// What was asked for.
        name: String,
        /// The nearest name, as a sentence.
        nearest: String,
        /// All names.
        known: String,
    },
    /// A board names a system-on-chip that is not there.
    #[error(
        "{file}: no SoC is called `{soc}`; hint: a file of your own is named with its path (./my-soc.toml); known: {known}"
    )]
    SocNotFound {
        /// The board's file.
        file: String,
        /// What it names.
        soc: String,
        /// All names.
        known: String,
    },
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It is not TOML, has a key that is not known, or lacks one.
    #[error("{file}: {message}hint: docs/boards.md has every key")]
    Syntax {
        /// The file.
        file: String,
        /// The parser's reason, with the line.
        message: String,
    },
    /// A value that cannot be.
    #[error("{file}: {key}: {message}")]
    Value {
        /// The file.
        file: String,
        /// The key.
        key: &'static str,
        /// What is wrong; with a hint.
        message: String,
    },
}

impl Board {
    /// A board by its name, or by the path of a user's own file.
    ///
    /// # Errors
    /// [`BoardError`]
    pub fn find(name: &str) -> Result<Self, BoardError> {
        if is_path(name) {
            let path = Path::new(name);
            let id = path
                .file_stem()
                .map_or_else(|| name.into(), |stem| stem.to_string_lossy());
            return Self::parse(&id, &read(path)?, name, path.parent());
        }
        let Some(text) = builtin::text(builtin::BOARDS, name) else {
            let near = |known: &&str| strsim::jaro_winkler(known, name);
            let nearest = ids()
                .max_by(|a, b| near(a).total_cmp(&near(b)))
                .filter(|known| near(known) > 0.7);
            return Err(BoardError::NotFound {
                name: name.to_owned(),
                nearest: nearest.map_or_else(String::new, |known| format!("did you mean `{known}`? ")),
                known: ids().collect::<Vec<_>>().join(", "),
            });
        };
        Self::parse(name, text, name, None)
    }

    /// Every board that ships.
    ///
    /// # Errors
    /// None: the tests parse every one of them.
    pub fn all() -> Result<Vec<Self>, BoardError> {
        ids().map(Self::find).collect()
    }

    /// The board that this program runs on, by the device tree under `root`.
    pub fn here(root: &Path) -> Option<Self> {
        let compatible = std::fs::read_to_string(root.join("proc/device-tree/compatible")).ok()?;
        let names: Vec<&str> = compatible.split('\0').filter(|name| !name.is_empty()).collect();
        Self::all().ok()?.into_iter().find(|board| {
            board
                .compatible
                .iter()
                .any(|known| names.contains(&known.as_str()))
        })
    }

    /// `folder` is where a path of a system-on-chip begins.
    fn parse(id: &str, text: &str, file: &str, folder: Option<&Path>) -> Result<Self, BoardError> {
        let mut board: Self = from_toml(text, file)?;
        id.clone_into(&mut board.id);
        let soc = &board.soc_name;
        board.soc = if let (Some(folder), true) = (folder, is_path(soc)) {
            let path = folder.join(soc);
            from_toml(&read(&path)?, &path.display().to_string())?
        } else {
            let text = builtin::text(builtin::SOCS, soc).ok_or_else(|| BoardError::SocNotFound {
                file: file.to_owned(),
                soc: soc.clone(),
                known: builtin::SOCS
                    .iter()
                    .map(|(id, _)| *id)
                    .collect::<Vec<_>>()
                    .join(", "),
            })?;
            from_toml(text, soc)?
        };
        check::check(&board, file)?;
        Ok(board)
    }

    /// Threads to begin with: as many as there are fast cores. 0 is what the machine has.
    pub fn threads(&self) -> u32 {
        self.recommended
            .threads
            .or_else(|| self.soc.cores.first().map(|cores| cores.count))
            .unwrap_or(0)
    }

    /// The largest share of the peak bandwidth that a measurement on this board reached, and that measurement.
    pub fn best_share(&self) -> Option<(f64, &Measured)> {
        let peak = self.memory.peak_gb_per_second?;
        let share = |measured: &Measured| measured.gb_per_second() / peak;
        self.measured
            .iter()
            .map(|measured| (share(measured), measured))
            .max_by(|a, b| a.0.total_cmp(&b.0))
    }
}

impl Measured {
    /// What this speed reads from memory, 1e9 bytes a second.
    pub fn gb_per_second(&self) -> f64 {
        self.tokens_per_second * self.megabytes_per_token / 1000.0
    }
}

impl Memory {
    /// What is left of a size for Pipit. How much Linux, its services and the firmware take is assumed, not measured: a
    /// fifth, at least 128 MiB and at most 1 GiB.
    pub fn left_of(mib: u64) -> u64 {
        mib.saturating_sub((mib / 5).clamp(128, 1024)) << 20
    }
}

/// Names of the boards that ship.
pub fn ids() -> impl Iterator<Item = &'static str> {
    builtin::BOARDS.iter().map(|(id, _)| *id)
}

fn is_path(name: &str) -> bool {
    name.contains('/') || name.ends_with(".toml")
}

fn read(path: &Path) -> Result<String, BoardError> {
    std::fs::read_to_string(path).map_err(|source| BoardError::Io {
        path: path.to_owned(),
        source,
    })
}

fn from_toml<T: serde::de::DeserializeOwned>(text: &str, file: &str) -> Result<T, BoardError> {
    toml::from_str(text).map_err(|error| BoardError::Syntax {
        file: file.to_owned(),
        message: error.to_string(),
    })
}

#[cfg(test)]
mod tests;
