//! Embedding lookup with a gradient: row `ids[i]` of the table becomes row i.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::composed;
use super::frozen::Frozen;
use super::real::{Real, dtype, elements, for_real, tensor, with_elements};

const OP: &str = "embedding";

struct Embedding {
    ids: Arc<[u32]>,
}

/// A table `[vocabulary, d]` and token ids → `[ids, d]`. Only a table that is a variable gets a gradient.
pub fn embedding(table: &Tensor, ids: &Arc<[u32]>) -> Result<Tensor> {
    if !table.device().is_cpu() {
        return composed::embedding(table, ids);
    }
    table.apply_op1(Embedding { ids: ids.clone() })
}

/// The same of a table that gets no gradient.
pub fn frozen_embedding(table: &Frozen, ids: &Arc<[u32]>) -> Result<Tensor> {
    match table {
        Frozen::Dense(table) => embedding(&table.detach(), ids),
        Frozen::Quantized(table) => {
            let op = Embedding { ids: ids.clone() };
            let (_, d) = op.sizes(&table.dims())?;
            let mut out = vec![0.0; ids.len() * d];
            out.par_chunks_mut(d).zip(ids.par_iter()).for_each(|(out, id)| {
                table.dequantize(*id as usize..*id as usize + 1, out);
            });
            tensor(out, &[ids.len(), d])
        }
    }
}

impl Embedding {
    fn sizes(&self, table: &[usize]) -> Result<(usize, usize)> {
        let &[vocabulary, d] = table else {
            candle_core::bail!("{OP}: the table has shape {table:?}")
        };
        if let Some(id) = self.ids.iter().find(|id| **id as usize >= vocabulary) {
            candle_core::bail!("{OP}: token {id} of a vocabulary of {vocabulary}");
        }
        Ok((vocabulary, d))
    }
}

fn forward<T: Real>(table: &[T], ids: &[u32], d: usize) -> Vec<T> {
    let mut out = vec![T::zero(); ids.len() * d];
    out.par_chunks_mut(d).zip(ids).for_each(|(out, id)| {
        out.copy_from_slice(&table[*id as usize * d..][..d]);
    });
    out
}

/// Each row of dy is added to the row of its token: a token that occurs twice gets the sum.
fn backward<T: Real>(dy: &[T], ids: &[u32], (vocabulary, d): (usize, usize)) -> Vec<T> {
    let mut d_table = vec![T::zero(); vocabulary * d];
    for (dy, id) in dy.chunks_exact(d).zip(ids) {
        for (sum, dy) in d_table[*id as usize * d..][..d].iter_mut().zip(dy) {
            *sum += *dy;
        }
    }
    d_table
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, d) = self.sizes(layout.dims())?;
        for_real!(dtype(table), OP, T => {
            let out = forward::<T>(elements(table, layout, OP)?, &self.ids, d);
            Ok((T::to_cpu_storage_owned(out), Shape::from((self.ids.len(), d))))
        })
    }

    fn bwd(&self, table: &Tensor, _res: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let sizes = self.sizes(table.dims())?;
        let dy = dy.contiguous()?;
        for_real!(table.dtype(), OP, T => {
            let d_table = with_elements::<T, _>(&dy, OP, |dy| Ok(backward(dy, &self.ids, sizes)))?;
            Ok(Some(tensor(d_table, table.dims())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::{check, random};

    #[test]
    fn gradients_are_the_differences_with_a_token_twice() {
        let table = random(&[5, 3], 15);
        check(&[&table], |args| embedding(&args[0], &[4, 1, 4, 0].into()));
    }

    #[test]
    fn a_token_beyond_the_table_is_an_error() {
        assert!(embedding(&random(&[5, 3], 15), &[5].into()).is_err());
    }
}
