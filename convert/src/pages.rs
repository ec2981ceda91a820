//! The memory that mapped files take.

use std::ops::Range;

use memmap2::{Mmap, UncheckedAdvice};

/// Gives the pages of a part of a mapped file back. Reading them again brings them back, from the system's cache or
/// from the disk; without this, a process that reads a whole file through a map has all of it resident.
pub(crate) fn release(map: &Mmap, range: Range<usize>) {
    if range.is_empty() || range.end > map.len() {
        return;
    }
    let (start, length) = (range.start, range.len());
    // SAFETY: the map is read-only and backed by a file, so that dropping its pages loses nothing.
    #[expect(unsafe_code, reason = "on other maps the advice would lose what was written")]
    let advised = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, length) };
    if let Err(e) = advised {
        // It is only an advice: the system takes the pages back when it needs them.
        tracing::debug!("cannot give mapped pages back: {e}");
    }
}
