//! Writes a planned file: the header, then the tensors slab by slab.

use std::io::{BufWriter, Write};
use std::path::Path;

use super::{ModelError, Plan};
use crate::gguf::{GgufError, Writer};
use crate::output::OutputFile;
use crate::progress::Progress;

impl Plan<'_> {
    /// Writes the file. It stands under its name when it is whole, and not at all otherwise.
    pub fn write(&self, path: &Path, progress: &dyn Progress) -> Result<u64, ModelError> {
        let io = |source| ModelError::Write {
            path: path.to_path_buf(),
            source,
        };
        let format = |e: GgufError| {
            io(match e {
                GgufError::Write(e) => e,
                other => std::io::Error::other(other),
            })
        };
        let size = self.file_size().map_err(format)?;
        let mut output = OutputFile::create(path).map_err(io)?;
        progress.start(
            "converting",
            self.header
                .tensors
                .iter()
                .filter_map(|tensor| tensor.size())
                .sum(),
        );
        let buffer = BufWriter::with_capacity(1 << 20, output.file_mut());
        let mut writer = Writer::new(buffer, &self.header).map_err(format)?;
        self.encode_all(progress, |tensor, bytes| {
            writer.append(tensor, bytes).map_err(format)
        })?;
        writer.finish().map_err(format)?.flush().map_err(io)?;
        if progress.cancelled() {
            return Err(ModelError::Interrupted);
        }
        output.commit().map_err(io)?;
        Ok(size)
    }
}
