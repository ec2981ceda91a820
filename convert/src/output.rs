//! Results that are either whole or absent: written beside their place, synced, then renamed.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

/// A file that appears under its name only when [`OutputFile::commit`] has synced it.
///
/// Dropped before that, by an error or a panic, it leaves nothing behind; a program that is killed leaves a
/// hidden `.NAME.XXXXXX.part` beside the place, never a half-written result.
#[derive(Debug)]
pub struct OutputFile {
    temp: NamedTempFile,
    path: PathBuf,
}

impl OutputFile {
    /// Starts a file that will stand at `path`.
    pub fn create(path: &Path) -> io::Result<Self> {
        let temp = tempfile::Builder::new()
            .prefix(&hidden(path))
            .suffix(".part")
            .tempfile_in(parent(path))?;
        Ok(Self {
            temp,
            path: path.to_path_buf(),
        })
    }

    /// The open file, to write to.
    pub fn file_mut(&mut self) -> &mut File {
        self.temp.as_file_mut()
    }

    /// Where the bytes stand until [`OutputFile::commit`].
    pub fn temp_path(&self) -> &Path {
        self.temp.path()
    }

    /// Syncs the file, gives it its name, and syncs the folder. An older file of that name is replaced.
    pub fn commit(self) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        self.temp
            .as_file()
            .set_permissions(std::fs::Permissions::from_mode(0o644))?;
        self.temp.as_file().sync_all()?;
        self.temp.persist(&self.path).map_err(|e| e.error)?;
        sync_dir(parent(&self.path))
    }
}

/// Writes a whole small file in one go, with the promises of [`OutputFile`].
pub fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut output = OutputFile::create(path)?;
    io::Write::write_all(output.file_mut(), bytes)?;
    output.commit()
}

/// A folder that appears under its name only when [`OutputDir::commit`] has synced all that is in it.
#[derive(Debug)]
pub struct OutputDir {
    temp: TempDir,
    path: PathBuf,
}

impl OutputDir {
    /// Starts a folder that will stand at `path`.
    pub fn create(path: &Path) -> io::Result<Self> {
        let temp = tempfile::Builder::new()
            .prefix(&hidden(path))
            .suffix(".part")
            .tempdir_in(parent(path))?;
        Ok(Self {
            temp,
            path: path.to_path_buf(),
        })
    }

    /// The folder to write into.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Syncs the files in the folder, gives it its name, and syncs the folder above. An older folder of that
    /// name is moved aside first and removed last, so that at every moment one of the two is whole.
    pub fn commit(self) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(self.temp.path(), std::fs::Permissions::from_mode(0o755))?;
        for entry in std::fs::read_dir(self.temp.path())? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                File::open(entry.path())?.sync_all()?;
            }
        }
        sync_dir(self.temp.path())?;
        let above = parent(&self.path);
        let old = self
            .path
            .exists()
            .then(|| above.join(format!("{}old", hidden(&self.path))));
        if let Some(old) = &old {
            if old.exists() {
                std::fs::remove_dir_all(old)?;
            }
            std::fs::rename(&self.path, old)?;
        }
        std::fs::rename(self.temp.path(), &self.path)?;
        // The temporary name is gone: there is nothing left to remove.
        let _ = self.temp.keep();
        sync_dir(above)?;
        if let Some(old) = old {
            std::fs::remove_dir_all(old)?;
        }
        Ok(())
    }
}

fn hidden(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!(".{name}.")
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_that_is_not_committed_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(OutputFile::create(&dir.path().join("a.gguf")).unwrap());
        assert!(names(dir.path()).is_empty());
        write_file(&dir.path().join("a.gguf"), b"whole").unwrap();
        assert_eq!(names(dir.path()), ["a.gguf"]);
    }

    #[test]
    fn a_folder_replaces_the_older_one_whole() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("run");
        for text in ["first", "second"] {
            let output = OutputDir::create(&place).unwrap();
            std::fs::write(output.path().join("file"), text).unwrap();
            output.commit().unwrap();
            assert_eq!(std::fs::read_to_string(place.join("file")).unwrap(), text);
        }
        drop(OutputDir::create(&place).unwrap());
        assert_eq!(names(dir.path()), ["run"]);
    }
}
