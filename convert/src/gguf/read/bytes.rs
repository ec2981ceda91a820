//! The bytes of a file: mapped, or in memory.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::Mmap;

use crate::pages;

#[derive(Debug)]
pub(super) enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    pub(super) fn map(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a file"));
        }
        // SAFETY: the map is read-only. If another program truncates the file while it is mapped, the process
        // is killed by SIGBUS; that is the price of not copying gigabytes, as in every reader of this format.
        #[expect(unsafe_code, reason = "memory-mapping is unsafe by nature")]
        let bytes = unsafe { Mmap::map(&file) }?;
        Ok(Self::Mapped(bytes))
    }

    /// Gives the memory of a part of the mapped file back.
    pub(super) fn release(&self, range: Range<usize>) {
        if let Self::Mapped(bytes) = self {
            pages::release(bytes, range);
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }
}
