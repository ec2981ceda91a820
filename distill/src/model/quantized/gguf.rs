//! A matrix of a GGUF file as it is deployed: the file's own blocks, memory-mapped.

use std::ops::Range;

use pipit_convert::import::GgufTensor;

use crate::model::QuantizedRows;

/// Blocks of any type that ggml turns into numbers, with ggml's own kernels.
#[derive(Debug)]
pub struct GgufRows {
    tensor: GgufTensor,
    dims: [usize; 2],
}

impl GgufRows {
    /// A matrix `[out, in]`, or none where the tensor is no matrix. The tensor must have passed its
    /// [`check`](GgufTensor::check).
    pub fn new(tensor: &GgufTensor) -> Option<Self> {
        let &[out, input] = tensor.shape() else {
            return None;
        };
        Some(Self {
            tensor: tensor.clone(),
            dims: [out, input],
        })
    }
}

impl QuantizedRows for GgufRows {
    fn name(&self) -> &str {
        self.tensor.name()
    }

    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn dequantize(&self, rows: Range<usize>, out: &mut [f32]) {
        // What can go wrong was checked when the file was opened; if it does all the same, the loss is NaN and
        // training stops.
        if self.tensor.read_rows(rows, out).is_err() {
            out.fill(f32::NAN);
        }
    }

    fn bytes(&self) -> usize {
        self.tensor.bytes()
    }
}
