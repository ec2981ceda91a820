//! Writes a planned file, whole or in parts, so that all of it appears under its name or nothing does.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{GgufError, Header, Writer, split};
use crate::checksum::hex;
use crate::output::OutputFile;

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct WrittenFile {
    /// Where it stands.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Its checksum, in hexadecimal digits.
    pub sha256: String,
}

/// Writes the tensors of a planned file, or of its parts one after the other.
///
/// Until [`FilesWriter::commit`] there are only hidden files, and dropping this removes them.
#[derive(Debug)]
pub struct FilesWriter<'a> {
    waiting: VecDeque<(PathBuf, Cow<'a, Header>)>,
    current: Option<(PathBuf, Writer<BufWriter<Summed>>)>,
    done: Vec<(WrittenFile, OutputFile)>,
}

impl<'a> FilesWriter<'a> {
    /// Plans the file `path`, or, with `max_part_bytes`, as many parts as [`split::cut`] makes.
    pub fn create(path: &Path, header: &'a Header, max_part_bytes: Option<u64>) -> Result<Self, GgufError> {
        let headers = match max_part_bytes {
            None => vec![Cow::Borrowed(header)],
            Some(bytes) => split::cut(header, bytes)?,
        };
        let paths = split::paths(path, headers.len());
        let mut writer = Self {
            waiting: paths.into_iter().zip(headers).collect(),
            current: None,
            done: Vec::new(),
        };
        writer.next_file()?;
        Ok(writer)
    }

    /// Appends bytes to the tensor whose turn it is; `name` must be its name.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), GgufError> {
        while self
            .current
            .as_ref()
            .is_some_and(|(_, writer)| writer.is_complete())
            && !self.waiting.is_empty()
        {
            self.next_file()?;
        }
        match &mut self.current {
            Some((_, writer)) => writer.append(name, bytes),
            None => Err(GgufError::Unwritable(format!(
                "there is no place for tensor {name}"
            ))),
        }
    }

    /// Ends the last file. Every tensor must be complete. The result has no name yet, and [`FilesWriter::unnamed`]
    /// shows it.
    pub fn finish(&mut self) -> Result<(), GgufError> {
        while self.current.is_some() {
            self.next_file()?;
        }
        Ok(())
    }

    /// The finished result, for a look before it gets its name.
    pub fn unnamed(&self) -> io::Result<Unnamed> {
        if let [(_, only)] = &self.done[..] {
            return Ok(Unnamed {
                path: only.temp_path().to_path_buf(),
                _links: None,
            });
        }
        // Readers find parts by their names.
        let links = tempfile::tempdir()?;
        let mut first = None;
        for (file, output) in &self.done {
            let link = links.path().join(file.path.file_name().unwrap_or_default());
            std::os::unix::fs::symlink(std::path::absolute(output.temp_path())?, &link)?;
            first.get_or_insert(link);
        }
        Ok(Unnamed {
            path: first.unwrap_or_default(),
            _links: Some(links),
        })
    }

    /// Syncs all files and gives them their names. Every tensor must be complete.
    ///
    /// The first part is what a reader opens, so it gets its name last; an older first part goes before the
    /// other parts are replaced. At every moment there is the old model, or none, or the new one.
    pub fn commit(mut self) -> Result<Vec<WrittenFile>, GgufError> {
        self.finish()?;
        for (_, output) in &self.done {
            output.sync()?;
        }
        let mut files = Vec::with_capacity(self.done.len());
        if let [(first, _), _, ..] = &self.done[..]
            && let Err(e) = std::fs::remove_file(&first.path)
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(e.into());
        }
        for (file, output) in self.done.into_iter().rev() {
            output.rename()?;
            files.push(file);
        }
        files.reverse();
        Ok(files)
    }

    fn next_file(&mut self) -> Result<(), GgufError> {
        if let Some((path, writer)) = self.current.take() {
            let summed = writer.finish()?.into_inner().map_err(|e| e.into_error())?;
            let file = WrittenFile {
                path,
                bytes: summed.bytes,
                sha256: hex(&summed.hash.finalize()),
            };
            self.done.push((file, summed.file));
        }
        if let Some((path, header)) = self.waiting.pop_front() {
            let summed = Summed {
                file: OutputFile::create(&path)?,
                hash: Sha256::new(),
                bytes: 0,
            };
            let buffer = BufWriter::with_capacity(1 << 20, summed);
            self.current = Some((path, Writer::new(buffer, &header)?));
        }
        Ok(())
    }
}

/// A result that has no name yet.
#[derive(Debug)]
pub struct Unnamed {
    path: PathBuf,
    /// Where parts have the names that readers find them by.
    _links: Option<TempDir>,
}

impl Unnamed {
    /// The file, or the first part.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A file whose checksum is known when its last byte is written.
#[derive(Debug)]
struct Summed {
    file: OutputFile,
    hash: Sha256,
    bytes: u64,
}

impl Write for Summed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.file_mut().write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.file_mut().flush()
    }
}
