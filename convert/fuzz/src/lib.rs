//! What the fuzz targets share: a folder in memory that takes the place of a checkpoint's or an adapter's.

use std::path::Path;

use tempfile::TempDir;

/// A folder whose files are replaced for each input.
pub struct Folder(TempDir);

impl Folder {
    /// An empty folder, in memory where there is such a file system.
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let dir = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        Self(dir.expect("a temporary folder"))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Replaces a file. The old one may be mapped still, so it is not written over.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        let path = self.0.path().join(name);
        let _ = std::fs::remove_file(&path);
        std::fs::write(path, bytes).expect("a file in memory");
    }
}

impl Default for Folder {
    fn default() -> Self {
        Self::new()
    }
}

/// Two files out of one input: two bytes with the length of the first, then both.
pub fn two(data: &[u8]) -> (&[u8], &[u8]) {
    let (length, rest) = match data {
        [low, high, rest @ ..] => (usize::from(u16::from_le_bytes([*low, *high])), rest),
        short => (0, short),
    };
    rest.split_at(length.min(rest.len()))
}
