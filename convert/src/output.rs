//! Results that are either whole or absent: written beside their place, synced, then renamed.
//!
//! What is being written is a hidden `.NAME.XXXXXX.part` that its writer holds locked. A writer that is killed
//! leaves it behind; the next one with the same NAME finds it unlocked and removes it.

use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::{NamedTempFile, TempDir};

/// The end of the names of results that are being written.
const PART: &str = ".part";

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
        remove_leftovers(path);
        loop {
            let temp = tempfile::Builder::new()
                .prefix(&hidden(path))
                .suffix(PART)
                .tempfile_in(parent(path))?;
            if lock(temp.as_file(), temp.path())? {
                return Ok(Self {
                    temp,
                    path: path.to_path_buf(),
                });
            }
        }
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
        self.sync()?;
        self.rename()
    }

    /// The first half of [`OutputFile::commit`]: all that takes long or can find the disk full.
    pub(crate) fn sync(&self) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        self.temp
            .as_file()
            .set_permissions(std::fs::Permissions::from_mode(0o644))?;
        self.temp.as_file().sync_all()
    }

    /// The second half of [`OutputFile::commit`].
    pub(crate) fn rename(self) -> io::Result<()> {
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
    /// The folder itself, locked.
    lock: File,
}

impl OutputDir {
    /// Starts a folder that will stand at `path`.
    pub fn create(path: &Path) -> io::Result<Self> {
        remove_leftovers(path);
        loop {
            let temp = tempfile::Builder::new()
                .prefix(&hidden(path))
                .suffix(PART)
                .tempdir_in(parent(path))?;
            let file = File::open(temp.path())?;
            if lock(&file, temp.path())? {
                return Ok(Self {
                    temp,
                    path: path.to_path_buf(),
                    lock: file,
                });
            }
        }
    }

    /// The folder to write into.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Syncs the files in the folder, gives it its name, and syncs the folder above. An older folder of that
    /// name changes places with it and is removed then, so that at every moment a whole one stands there.
    pub fn commit(self) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(self.temp.path(), std::fs::Permissions::from_mode(0o755))?;
        for entry in std::fs::read_dir(self.temp.path())? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                File::open(entry.path())?.sync_all()?;
            }
        }
        self.lock.sync_all()?;
        let above = parent(&self.path);
        if self.path.symlink_metadata().is_ok() {
            exchange(self.temp.path(), &self.path)?;
            sync_dir(above)?;
            // What stands under the temporary name now is the older one, a file perhaps.
            let old = self.temp.keep();
            return match old.is_dir() && !old.is_symlink() {
                true => std::fs::remove_dir_all(old),
                false => std::fs::remove_file(old),
            };
        }
        std::fs::rename(self.temp.path(), &self.path)?;
        // The temporary name is gone: there is nothing left to remove.
        let _ = self.temp.keep();
        sync_dir(above)
    }
}

/// Lets two paths change places, in one step where the file system can do that, in three where it cannot.
fn exchange(new: &Path, old: &Path) -> io::Result<()> {
    match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
        Ok(()) => return Ok(()),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP) => {}
        Err(e) => return Err(e.into()),
    }
    let aside = tempfile::Builder::new()
        .prefix(&hidden(old))
        .suffix(PART)
        .tempdir_in(parent(old))?
        .keep()
        .join("old");
    std::fs::rename(old, &aside)?;
    std::fs::rename(new, old)?;
    std::fs::rename(&aside, new)?;
    std::fs::remove_dir(parent(&aside))
}

/// Takes the lock of what was just created. False when somebody who cleans up was faster and has removed it.
fn lock(file: &File, path: &Path) -> io::Result<bool> {
    match file.try_lock() {
        // Where the file system has no locks, nobody cleans up either.
        Ok(()) | Err(TryLockError::Error(_)) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
    }
    let (ours, there) = (file.metadata()?, path.symlink_metadata());
    Ok(there.is_ok_and(|there| there.ino() == ours.ino() && there.dev() == ours.dev()))
}

/// Removes what a killed program left of a result of this name. What is locked is being written and stays.
fn remove_leftovers(path: &Path) {
    let prefix = hidden(path);
    let Ok(entries) = std::fs::read_dir(parent(path)) else {
        return;
    };
    for entry in entries.flatten() {
        if !is_leftover(&entry.file_name(), &prefix) {
            continue;
        }
        let path = entry.path();
        let removed = entry.file_type().and_then(|kind| {
            if !kind.is_dir() && !kind.is_file() {
                return Ok(false);
            }
            let file = File::open(&path)?;
            if file.try_lock().is_err() {
                return Ok(false);
            }
            match kind.is_dir() {
                true => std::fs::remove_dir_all(&path)?,
                false => std::fs::remove_file(&path)?,
            }
            Ok(true)
        });
        match removed {
            Ok(true) => tracing::warn!("removed what an interrupted run had left: {}", path.display()),
            Ok(false) => {}
            Err(e) => tracing::warn!("an interrupted run has left {}: {e}", path.display()),
        }
    }
}

/// `.NAME.XXXXXX.part`, with the six random letters and digits of `tempfile`.
fn is_leftover(name: &OsStr, prefix: &str) -> bool {
    let random = name
        .to_str()
        .and_then(|name| name.strip_prefix(prefix)?.strip_suffix(PART));
    random.is_some_and(|random| random.len() == 6 && random.bytes().all(|b| b.is_ascii_alphanumeric()))
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

    #[test]
    fn a_folder_replaces_a_file_and_a_link_but_not_what_the_link_names() {
        let dir = tempfile::tempdir().unwrap();
        let (place, other) = (dir.path().join("run"), dir.path().join("other"));
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("kept"), "").unwrap();
        std::fs::write(&place, "a file").unwrap();
        OutputDir::create(&place).unwrap().commit().unwrap();
        assert!(place.is_dir());
        std::fs::remove_dir(&place).unwrap();
        std::os::unix::fs::symlink(&other, &place).unwrap();
        OutputDir::create(&place).unwrap().commit().unwrap();
        assert!(place.is_dir() && !place.is_symlink());
        assert_eq!(names(&other), ["kept"]);
        assert_eq!(names(dir.path()), ["other", "run"]);
    }

    #[test]
    fn what_a_killed_run_left_is_removed_and_what_another_run_writes_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("a.gguf");
        std::fs::write(dir.path().join(".a.gguf.Ab3dE6.part"), "half").unwrap();
        std::fs::create_dir(dir.path().join(".a.gguf.XXXXXX.part")).unwrap();
        std::fs::write(dir.path().join(".a.gguf.XXXXXX.part/model"), "half").unwrap();
        // Another result's, and a name that is not ours.
        std::fs::write(dir.path().join(".b.gguf.Ab3dE6.part"), "").unwrap();
        std::fs::write(dir.path().join(".a.gguf.notes.part"), "").unwrap();
        let running = OutputFile::create(&place).unwrap();
        let folder = OutputDir::create(&place).unwrap();
        let second = OutputFile::create(&place).unwrap();
        assert!(running.temp_path().exists() && folder.path().exists());
        second.commit().unwrap();
        drop((running, folder));
        assert_eq!(
            names(dir.path()),
            [".a.gguf.notes.part", ".b.gguf.Ab3dE6.part", "a.gguf"]
        );
    }
}
