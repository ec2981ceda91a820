//! Writes a planned file: the header, then the tensors slab by slab.

use std::path::Path;

use super::{ModelError, Plan};
use crate::gguf::{FilesWriter, GgufError, WrittenFile};
use crate::progress::Progress;

impl Plan<'_> {
    /// Writes the file, or parts of at most so many bytes of tensors. All of it stands under its name when it is
    /// whole, and nothing otherwise.
    pub fn write(
        &self,
        path: &Path,
        max_part_bytes: Option<u64>,
        progress: &dyn Progress,
    ) -> Result<Vec<WrittenFile>, ModelError> {
        let writer = self.write_unnamed(path, max_part_bytes, progress)?;
        writer.commit().map_err(|e| unwritten(path, e))
    }

    /// Writes everything, and gives it no name: [`FilesWriter::commit`] does, and dropping the writer removes it all.
    pub fn write_unnamed(
        &self,
        path: &Path,
        max_part_bytes: Option<u64>,
        progress: &dyn Progress,
    ) -> Result<FilesWriter<'_>, ModelError> {
        let format = |e: GgufError| unwritten(path, e);
        let mut writer = FilesWriter::create(path, &self.header, max_part_bytes).map_err(format)?;
        progress.start(
            "converting",
            self.header
                .tensors
                .iter()
                .filter_map(|tensor| tensor.size())
                .sum(),
        );
        self.encode_all(progress, |tensor, bytes| {
            writer.append(tensor, bytes).map_err(format)
        })?;
        if progress.cancelled() {
            return Err(ModelError::Interrupted);
        }
        writer.finish().map_err(format)?;
        Ok(writer)
    }
}

/// The error that a result at `path` cannot be written.
fn unwritten(path: &Path, error: GgufError) -> ModelError {
    ModelError::Write {
        path: path.to_path_buf(),
        source: error.into(),
    }
}
