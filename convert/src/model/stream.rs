//! Streams the planned tensors: slabs of rows are read, merged and quantised in parallel, and written in order.

use std::io::{BufWriter, Write};
use std::path::Path;

use rayon::prelude::*;

use super::plan::{Job, Source};
use super::{ModelError, Plan};
use crate::gguf::{GgufError, Writer};
use crate::output::OutputFile;
use crate::progress::Progress;
use crate::quantize::{self, QuantizeError};

/// The number of elements of a slab. Twice as many slabs as threads are in memory at a time.
const SLAB_ELEMENTS: usize = 1 << 19;

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
        for job in &self.jobs {
            self.write_tensor(job, progress, |bytes| {
                writer.append(job.name(), bytes).map_err(format)
            })?;
        }
        writer.finish().map_err(format)?.flush().map_err(io)?;
        if progress.cancelled() {
            return Err(ModelError::Interrupted);
        }
        output.commit().map_err(io)?;
        Ok(size)
    }

    fn write_tensor(
        &self,
        job: &Job<'_>,
        progress: &dyn Progress,
        mut append: impl FnMut(&[u8]) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let slab = (SLAB_ELEMENTS / job.columns.max(1)).max(1);
        let window = slab * 2 * rayon::current_num_threads();
        for start in (0..job.rows).step_by(window) {
            if progress.cancelled() {
                return Err(ModelError::Interrupted);
            }
            let end = (start + window).min(job.rows);
            let firsts: Vec<_> = (start..end).step_by(slab).collect();
            let slabs = firsts
                .into_par_iter()
                .map(|first| self.encode(job, first, slab.min(end - first)))
                .collect::<Result<Vec<_>, _>>()?;
            for bytes in slabs {
                append(&bytes)?;
                progress.advance(bytes.len() as u64);
            }
        }
        Ok(())
    }

    /// Rows `first..first + n` of the GGUF tensor, as its blocks.
    fn encode(&self, job: &Job<'_>, first: usize, n: usize) -> Result<Vec<u8>, ModelError> {
        let columns = job.columns;
        let mut values = vec![0.0f32; n * columns];
        match &job.source {
            Source::Extra { values: all, .. } => {
                values.copy_from_slice(&all[first * columns..][..n * columns])
            }
            Source::Checkpoint(rule) => {
                self.model.read_rows(rule, first, columns, &mut values)?;
                if self.merge.changes(&rule.hf) {
                    for (row, values) in values.chunks_exact_mut(columns).enumerate() {
                        self.merge
                            .add_to_row(&rule.hf, rule.rows.to_hf(first + row), values);
                    }
                }
                rule.change.apply(&mut values);
            }
        }
        let mut out = Vec::new();
        quantize::quantize(job.choice.kind, &values, columns, job.importance, &mut out).map_err(
            |source: QuantizeError| ModelError::Quantize {
                tensor: job.name().to_owned(),
                source: source.after(first * columns),
            },
        )?;
        Ok(out)
    }
}
