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
        let format = |e: GgufError| ModelError::Write {
            path: path.to_path_buf(),
            source: match e {
                GgufError::Write(e) => e,
                other => std::io::Error::other(other),
            },
        };
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
        writer.commit().map_err(format)
    }
}
