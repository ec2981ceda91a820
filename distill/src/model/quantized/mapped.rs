//! A frozen matrix of a checkpoint folder, read from the memory-mapped file when it is needed: no copy in f32.

use std::ops::Range;
use std::sync::Arc;

use pipit_convert::checkpoint::{Checkpoint, CheckpointError};

use crate::model::QuantizedRows;

/// A matrix in the type that the checkpoint has it in: bf16 and f16 take half of f32's room.
#[derive(Debug)]
pub struct MappedRows {
    checkpoint: Arc<Checkpoint>,
    name: String,
    dims: [usize; 2],
    bytes: usize,
}

impl MappedRows {
    /// The checkpoint's matrix of this name; none where the tensor is no matrix.
    pub fn new(checkpoint: &Arc<Checkpoint>, name: &str) -> Result<Option<Self>, CheckpointError> {
        let view = checkpoint.tensor(name)?;
        let &[out, input] = view.shape else {
            return Ok(None);
        };
        Ok(Some(Self {
            checkpoint: checkpoint.clone(),
            name: name.to_owned(),
            dims: [out, input],
            bytes: view.bytes.len(),
        }))
    }

    /// Whether no number of the matrix is NaN or infinite. Reads all of it, and gives the memory back.
    pub fn is_finite(&self) -> bool {
        let [out, input] = self.dims;
        let mut row = vec![0.0; input];
        let finite = (0..out).all(|at| {
            self.dequantize(at..at + 1, &mut row);
            row.iter().all(|x| x.is_finite())
        });
        self.checkpoint.release(&self.name);
        finite
    }
}

impl QuantizedRows for MappedRows {
    fn name(&self) -> &str {
        &self.name
    }

    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn dequantize(&self, rows: Range<usize>, out: &mut [f32]) {
        let read = self
            .checkpoint
            .tensor(&self.name)
            .and_then(|view| view.read_f32(rows.start * self.dims[1], out));
        // It could be read when it was opened; if it cannot now, the loss is NaN and training stops.
        if read.is_err() {
            out.fill(f32::NAN);
        }
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}
