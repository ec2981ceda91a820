//! A teacher as it is named on a command line: a checkpoint folder, a GGUF file, or the address of a server.

use std::path::{Path, PathBuf};

use super::served::{ServedOptions, ServedTeacher};
use super::{CheckpointTeacher, GgufTeacher, Teacher, TeacherError};

/// Where a teacher is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spec {
    /// A checkpoint folder.
    Checkpoint(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
    /// A server's address.
    Served(String),
}

impl Spec {
    /// `http://…` and `https://…` are servers, files GGUF files, and all else is a folder.
    pub fn parse(text: &str) -> Self {
        let path = PathBuf::from(text);
        if text.starts_with("http://") || text.starts_with("https://") {
            return Self::Served(text.to_owned());
        }
        let is_gguf = path
            .extension()
            .is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
        match path.is_file() || (is_gguf && !path.is_dir()) {
            true => Self::Gguf(path),
            false => Self::Checkpoint(path),
        }
    }

    /// The folder or file, where it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Checkpoint(path) | Self::Gguf(path) => Some(path),
            Self::Served(_) => None,
        }
    }
}

/// What opening a teacher needs to know.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// An adapter over a checkpoint.
    pub adapter: Option<PathBuf>,
    /// The most tokens of a sequence.
    pub longest: usize,
    /// How a server is asked.
    pub served: ServedOptions,
}

/// Opens a teacher.
pub fn open(spec: &Spec, options: &OpenOptions) -> Result<Box<dyn Teacher>, TeacherError> {
    if let (Some(adapter), false) = (&options.adapter, matches!(spec, Spec::Checkpoint(_))) {
        return Err(TeacherError::AdapterHere {
            adapter: adapter.clone(),
        });
    }
    Ok(match spec {
        Spec::Checkpoint(path) => Box::new(CheckpointTeacher::open(path, options.adapter.as_deref())?),
        Spec::Gguf(path) => Box::new(GgufTeacher::open(path, options.longest)?),
        Spec::Served(url) => Box::new(ServedTeacher::connect(url, options.served.clone())?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_teacher_is_told_by_its_name() {
        assert_eq!(
            Spec::parse("https://box:8000/v1"),
            Spec::Served("https://box:8000/v1".into())
        );
        assert_eq!(Spec::parse("models/big"), Spec::Checkpoint("models/big".into()));
        assert_eq!(Spec::parse("big.GGUF"), Spec::Gguf("big.GGUF".into()));
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(
            Spec::parse(&file.path().to_string_lossy()),
            Spec::Gguf(file.path().into())
        );
    }
}
