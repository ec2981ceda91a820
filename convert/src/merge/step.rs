//! What one adapter does to some rows of one tensor.

use std::sync::OnceLock;

use crate::adapter::{LoraModule, TokenRows};
use crate::checkpoint::{CheckpointError, TensorView};

/// One change of a tensor.
#[derive(Debug, Clone)]
pub(super) enum Step<'a> {
    /// The adapter brings the tensor whole.
    Replace(TensorView<'a>),
    /// It brings some rows.
    Rows(&'a TokenRows),
    /// It adds `scale · values` to a vector.
    Add { values: &'a [f32], scale: f32 },
    /// It adds `scale · B · A`, and with DoRA gives every row, or every column of embeddings, its length.
    LowRank {
        module: &'a LoraModule,
        scale: f32,
        /// The lengths of the columns before they are given new ones, once they are known.
        columns: OnceLock<Vec<f32>>,
    },
}

impl<'a> Step<'a> {
    pub(super) fn low_rank(module: &'a LoraModule, scale: f32) -> Self {
        Self::LowRank {
            module,
            scale,
            columns: OnceLock::new(),
        }
    }

    /// The shape of a tensor that it fits, given the one that the tensor has.
    pub(super) fn shape(&self, tensor: &[usize]) -> Vec<usize> {
        match self {
            Self::Replace(view) => view.shape.to_vec(),
            Self::Rows(tokens) => vec![tensor.first().copied().unwrap_or(0), tokens.columns],
            Self::Add { values, .. } => vec![values.len()],
            Self::LowRank { module, .. } => vec![module.n_out, module.n_in],
        }
    }

    /// Whether the other does the same to a tensor that is shared.
    pub(super) fn is_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Replace(a), Self::Replace(b)) => a.dtype == b.dtype && a.bytes == b.bytes,
            (Self::Rows(a), Self::Rows(b)) => a == b,
            (
                Self::LowRank { module: a, scale, .. },
                Self::LowRank {
                    module: b,
                    scale: other,
                    ..
                },
            ) => {
                // DoRA gives rows their lengths in a linear layer and columns in embeddings.
                let plain = a.magnitude.is_none() && b.magnitude.is_none();
                plain && scale == other && a.lora_a == b.lora_a && a.lora_b == b.lora_b
            }
            _ => false,
        }
    }

    /// The matrices and the place for the lengths of the columns, where it needs them.
    pub(super) fn needs_columns(&self) -> Option<(&'a LoraModule, f32, &OnceLock<Vec<f32>>)> {
        match self {
            Self::LowRank {
                module,
                scale,
                columns,
            } if module.embedding && module.magnitude.is_some() => Some((module, *scale, columns)),
            _ => None,
        }
    }

    /// Changes rows of `columns` elements. `row` says which row of the tensor the n-th is.
    pub(super) fn apply(
        &self,
        row: impl Fn(usize) -> usize,
        columns: usize,
        values: &mut [f32],
    ) -> Result<(), CheckpointError> {
        match self {
            Self::Replace(view) => {
                for (at, values) in values.chunks_exact_mut(columns).enumerate() {
                    view.read_f32(row(at) * columns, values)?;
                }
            }
            Self::Rows(tokens) => {
                for (at, values) in values.chunks_exact_mut(columns).enumerate() {
                    if let Some(new) = tokens.rows.get(&row(at)) {
                        values.copy_from_slice(new);
                    }
                }
            }
            Self::Add { values: add, scale } => {
                for (at, values) in values.chunks_exact_mut(columns).enumerate() {
                    let add = &add[row(at) * columns..][..columns];
                    for (value, add) in values.iter_mut().zip(add) {
                        *value += scale * add;
                    }
                }
            }
            Self::LowRank {
                module,
                scale,
                columns: lengths,
            } => {
                add_low_rank((*module).into(), *scale, &row, columns, values);
                match (&module.magnitude, lengths.get()) {
                    (None, _) => {}
                    (Some(magnitude), Some(lengths)) => {
                        let factors: Vec<f32> = magnitude.iter().zip(lengths).map(|(m, l)| m / l).collect();
                        for values in values.chunks_exact_mut(columns) {
                            for (value, factor) in values.iter_mut().zip(&factors) {
                                *value *= factor;
                            }
                        }
                    }
                    (Some(magnitude), None) => {
                        for (at, values) in values.chunks_exact_mut(columns).enumerate() {
                            let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
                            let factor = magnitude[row(at)] / squares.sqrt() as f32;
                            values.iter_mut().for_each(|value| *value *= factor);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// The two matrices of a low-rank adapter.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// The inner dimension.
    pub rank: usize,
    /// `[rank, columns]`, row-major.
    pub lora_a: &'a [f32],
    /// `[rows, rank]`, row-major.
    pub lora_b: &'a [f32],
}

impl<'a> From<&'a LoraModule> for LowRank<'a> {
    fn from(module: &'a LoraModule) -> Self {
        Self {
            rank: module.rank,
            lora_a: &module.lora_a,
            lora_b: &module.lora_b,
        }
    }
}

/// `values += scale · B · A`, for some rows; `row` says which row of B the n-th is. Every element is summed over the rank
/// in one order, so the result does not depend on how the rows are cut into slabs.
pub fn add_low_rank(
    LowRank { rank, lora_a, lora_b }: LowRank<'_>,
    scale: f32,
    row: impl Fn(usize) -> usize,
    columns: usize,
    values: &mut [f32],
) {
    let mut delta = vec![0.0f32; columns];
    for (at, values) in values.chunks_exact_mut(columns).enumerate() {
        let b = &lora_b[row(at) * rank..][..rank];
        delta.fill(0.0);
        // Four rows of A at a time: the sum is read and written once for them.
        let (fours, rest) = b.as_chunks::<4>();
        let (a_fours, a_rest) = lora_a.split_at(fours.len() * 4 * columns);
        for (b, a) in fours.iter().zip(a_fours.chunks_exact(4 * columns)) {
            let (a0, a) = a.split_at(columns);
            let (a1, a) = a.split_at(columns);
            let (a2, a3) = a.split_at(columns);
            for ((((delta, a0), a1), a2), a3) in delta.iter_mut().zip(a0).zip(a1).zip(a2).zip(a3) {
                *delta += b[0] * a0 + b[1] * a1 + b[2] * a2 + b[3] * a3;
            }
        }
        for (b, a) in rest.iter().zip(a_rest.chunks_exact(columns)) {
            for (delta, a) in delta.iter_mut().zip(a) {
                *delta += b * a;
            }
        }
        for (value, delta) in values.iter_mut().zip(&delta) {
            *value += scale * delta;
        }
    }
}
