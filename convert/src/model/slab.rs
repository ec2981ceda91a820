//! Slabs of rows on their way: read, merged, changed and quantised in parallel, handed on in order.
//!
//! Memory does not grow with the model: so many slabs are in memory at a time, and the pages of the checkpoint that
//! were read are given back.

use rayon::prelude::*;

use super::plan::{Job, Source};
use super::{ModelError, Plan};
use crate::progress::Progress;
use crate::quantize::{self, QuantizeError};

/// The number of elements of a slab: 1 MiB of f32.
const SLAB_ELEMENTS: usize = 1 << 18;

/// The number of slabs that each thread encodes before all of them are handed on.
const SLABS_PER_THREAD: usize = 4;

/// Some rows of a tensor.
#[derive(Debug, Clone, Copy)]
struct Slab {
    job: usize,
    first: usize,
    rows: usize,
}

impl Plan<'_> {
    /// Encodes all tensors and hands their blocks on, in the order of the file, with the name of the tensor. While
    /// some slabs are handed on, the next are encoded.
    pub(super) fn encode_all(
        &self,
        progress: &dyn Progress,
        mut append: impl FnMut(&str, &[u8]) -> Result<(), ModelError> + Send,
    ) -> Result<(), ModelError> {
        self.prepare_merge()?;
        let slabs: Vec<_> = self.slabs().collect();
        let mut hand_on = |encoded: Vec<(usize, Vec<u8>)>| {
            for (job, bytes) in encoded {
                append(self.jobs[job].name(), &bytes)?;
                progress.advance(bytes.len() as u64);
            }
            Ok(())
        };
        let mut ready = Vec::new();
        for window in slabs.chunks(SLABS_PER_THREAD * rayon::current_num_threads()) {
            if progress.cancelled() {
                return Err(ModelError::Interrupted);
            }
            let (done, next) = rayon::join(|| hand_on(ready), || self.encode_window(window));
            done?;
            ready = next?;
        }
        hand_on(ready)
    }

    /// The bytes that the slabs take at most: each thread's rows in f32, and two windows of blocks.
    pub(super) fn slab_memory(&self) -> u64 {
        let threads = rayon::current_num_threads();
        let elements = |slab: &Slab| slab.rows * self.jobs[slab.job].columns;
        let blocks = |slab: &Slab| {
            let kind = self.jobs[slab.job].choice.kind;
            elements(slab) as u64 * kind.block_bytes() / kind.block_elements()
        };
        let rows = self.slabs().map(|slab| elements(&slab) * size_of::<f32>()).max();
        let blocks = self.slabs().map(|slab| blocks(&slab)).max();
        threads as u64 * (rows.unwrap_or(0) as u64 + 2 * SLABS_PER_THREAD as u64 * blocks.unwrap_or(0))
    }

    fn slabs(&self) -> impl Iterator<Item = Slab> {
        self.jobs.iter().enumerate().flat_map(|(at, job)| {
            let rows = (SLAB_ELEMENTS / job.columns.max(1)).max(1);
            (0..job.rows).step_by(rows).map(move |first| Slab {
                job: at,
                first,
                rows: rows.min(job.rows - first),
            })
        })
    }

    fn encode_window(&self, window: &[Slab]) -> Result<Vec<(usize, Vec<u8>)>, ModelError> {
        let encoded = window
            .par_iter()
            .map_init(Vec::new, |scratch, slab| {
                Ok((slab.job, self.encode(slab, scratch)?))
            })
            .collect();
        let mut jobs: Vec<_> = window.iter().map(|slab| slab.job).collect();
        jobs.dedup();
        for job in jobs {
            if let Source::Checkpoint(rule) = &self.jobs[job].source {
                self.model.release(rule);
            }
        }
        encoded
    }

    /// The rows as the blocks that stand in the file.
    fn encode(&self, slab: &Slab, values: &mut Vec<f32>) -> Result<Vec<u8>, ModelError> {
        let Slab { first, rows, .. } = *slab;
        let job = &self.jobs[slab.job];
        let columns = job.columns;
        let failed = |source: QuantizeError| ModelError::Quantize {
            tensor: job.name().to_owned(),
            source: source.after(first * columns),
        };
        if let Some(blocks) = self.unchanged(job, first, rows) {
            quantize::check_blocks(job.choice.kind, blocks).map_err(failed)?;
            return Ok(blocks.to_vec());
        }
        values.resize(rows * columns, 0.0);
        match &job.source {
            Source::Extra { values: all, .. } => {
                values.copy_from_slice(&all[first * columns..][..rows * columns]);
            }
            Source::Checkpoint(rule) => {
                self.merged_rows(rule, first, columns, values)?;
            }
        }
        let mut blocks = Vec::new();
        quantize::quantize(job.choice.kind, values, columns, job.importance, &mut blocks).map_err(failed)?;
        Ok(blocks)
    }

    /// The blocks of a quantised file, where they need not be quantised again: decoding and encoding them would
    /// not give the same bits.
    fn unchanged(&self, job: &Job<'_>, first: usize, rows: usize) -> Option<&[u8]> {
        match &job.source {
            Source::Checkpoint(rule) if !self.merge.changes(&rule.hf) => {
                self.model.blocks(rule, job.choice.kind, first, rows, job.columns)
            }
            _ => None,
        }
    }
}
