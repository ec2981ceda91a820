//! A teacher as it is named on a command line: a checkpoint folder, a GGUF file, or the address of a server.

use std::path::PathBuf;

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
