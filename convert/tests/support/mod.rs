//! What the integration tests share.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, reason = "every test program uses a part of it")]

pub(crate) mod architectures;
pub(crate) mod llama_cpp;
pub(crate) mod llama_quantize;
pub(crate) mod synthetic;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pipit_convert::gguf::{Gguf, TensorType};
use pipit_convert::merge::ScaledAdapter;
use pipit_convert::model::{ModelError, Plan, Provenance, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::{FileType, Recipe};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// Converts a checkpoint as the program does.
pub(crate) fn convert(
    dir: &Path,
    adapters: &[ScaledAdapter],
    kind: TensorType,
    out: &Path,
) -> Result<Gguf, ModelError> {
    let model = SourceModel::open(dir)?;
    let recipe = Recipe::new(FileType::from_name(kind.name()).unwrap());
    let mut plan = Plan::new(&model, adapters, &recipe)?;
    plan.add_provenance(&Provenance {
        adapters,
        ..Provenance::default()
    })?;
    let files = plan.write(out, None, &Silent)?;
    let gguf = Gguf::open(out).unwrap();
    assert_eq!((files.len(), files[0].bytes), (1, gguf.file_size()));
    Ok(gguf)
}

/// The elements of an F32 tensor.
pub(crate) fn floats(gguf: &Gguf, name: &str) -> Vec<f32> {
    let tensor = gguf.tensor(name).unwrap();
    assert_eq!(tensor.kind, TensorType::F32);
    gguf.data(tensor)
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// Runs the program.
pub(crate) fn pipit_convert(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pipit-convert"))
        .args(args)
        .output()
        .unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The names in a folder, hidden ones too, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// SmolLM2-135M-Instruct in Q4_1, which ./check fetches.
pub(crate) fn smollm2() -> PathBuf {
    cached("PIPIT_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// Gemma 3 270M in Q4_K_M, which ./check fetches.
pub(crate) fn gemma3() -> PathBuf {
    cached("PIPIT_TEST_GEMMA", "gemma-3-270m-q4_k_m.gguf")
}

/// The file that the variable names, else the one in the cache that scripts/fetch-model fills.
fn cached(variable: &str, name: &str) -> PathBuf {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let path = set(variable).unwrap_or_else(|| {
        let home = || set("HOME").unwrap_or_default().join(".cache");
        let cache = || set("XDG_CACHE_HOME").unwrap_or_else(home).join("pipit");
        set("PIPIT_CACHE").unwrap_or_else(cache).join(name)
    });
    assert!(
        path.is_file(),
        "{} is not there: scripts/fetch-model gets it; {variable} names another place",
        path.display()
    );
    path
}

/// A copy of the tied checkpoint that a test may spoil, and the folder that results go to.
pub(crate) struct Copy {
    scratch: tempfile::TempDir,
}

impl Copy {
    pub(crate) fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("copy");
        std::fs::create_dir(&dir).unwrap();
        for entry in std::fs::read_dir(fixture("tied")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
        }
        Self { scratch }
    }

    /// The checkpoint.
    pub(crate) fn dir(&self) -> PathBuf {
        self.scratch.path().join("copy")
    }

    /// A file of the checkpoint.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// A place beside the checkpoint.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    pub(crate) fn edit(&self, name: &str, edit: impl FnOnce(&mut serde_json::Value)) {
        let text = std::fs::read_to_string(self.file(name)).unwrap();
        let mut json = serde_json::from_str(&text).unwrap();
        edit(&mut json);
        std::fs::write(self.file(name), json.to_string()).unwrap();
    }

    /// Replaces a part of a file's text, which must be there.
    pub(crate) fn replace(&self, name: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.file(name)).unwrap();
        assert!(text.contains(from), "{from}");
        std::fs::write(self.file(name), text.replacen(from, to, 1)).unwrap();
    }

    /// The conversion must fail, say all of `parts`, and write nothing.
    pub(crate) fn refused(&self, parts: &[&str]) {
        let out = self.beside("out.gguf");
        let output = pipit_convert(&["model", self.dir().to_str().unwrap(), "-o", out.to_str().unwrap()]);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.starts_with("error: "), "{message}");
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message}");
        }
        assert_eq!(names(self.scratch.path()), ["copy"], "{message}");
    }

    /// The conversion must succeed.
    pub(crate) fn accepted(&self) -> Gguf {
        convert(&self.dir(), &[], TensorType::F32, &self.beside("out.gguf")).unwrap()
    }
}

/// The bytes of a safetensors file with this header.
pub(crate) fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}
