//! The keys and values of tokens that were already seen, for generation.

use candle_core::{Result, Tensor};

use super::ops::{Heads, Sequence, attend, with_elements};

/// The cache of several sequences, each of its own length.
#[derive(Debug)]
pub struct KvCache {
    /// `[layer][sequence]`.
    layers: Vec<Vec<Rows>>,
    lengths: Vec<usize>,
}

#[derive(Debug, Clone, Default)]
struct Rows {
    k: Vec<f32>,
    v: Vec<f32>,
}

impl KvCache {
    /// An empty cache.
    pub fn new(layers: usize, sequences: usize) -> Self {
        Self {
            layers: vec![vec![Rows::default(); sequences]; layers],
            lengths: vec![0; sequences],
        }
    }

    /// Puts the same keys and values, `[n, kv_width]`, before those of every sequence of a layer, which must be empty.
    pub(crate) fn put_before(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let (count, k, v) = (
            k.dim(0)?,
            k.flatten_all()?.to_vec1()?,
            v.flatten_all()?.to_vec1()?,
        );
        self.layers[layer].fill(Rows { k, v });
        self.lengths.fill(count);
        Ok(())
    }

    /// How many rows each sequence holds: its tokens, and virtual ones before them.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Forgets the sequences for which `keep` is false; the others move up.
    pub fn retain(&mut self, keep: &[bool]) {
        for layer in &mut self.layers {
            let mut keep = keep.iter();
            layer.retain(|_| keep.next().copied().unwrap_or(false));
        }
        let mut keep = keep.iter();
        self.lengths.retain(|_| keep.next().copied().unwrap_or(false));
    }

    /// Appends the new rows' keys and values (already turned by their positions) and attends from the new
    /// rows to all. `starts` are the rows at which the sequences begin, and last the number of rows.
    pub(crate) fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: Heads,
        starts: &[usize],
    ) -> Result<Tensor> {
        const OP: &str = "cached attention";
        let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
        let rows = &mut self.layers[layer];
        for (tensor, values) in [(k, false), (v, true)] {
            with_elements::<f32, _>(tensor, OP, |new| {
                for (rows, w) in rows.iter_mut().zip(starts.windows(2)) {
                    let into = if values { &mut rows.v } else { &mut rows.k };
                    into.extend_from_slice(&new[w[0] * kv_width..w[1] * kv_width]);
                }
                Ok(())
            })?;
        }
        let out = with_elements::<f32, _>(q, OP, |q| {
            let sequences: Vec<_> = rows
                .iter()
                .zip(starts.windows(2))
                .map(|(rows, w)| Sequence {
                    q: &q[w[0] * q_width..w[1] * q_width],
                    k: &rows.k,
                    v: &rows.v,
                })
                .collect();
            Ok(attend(&sequences, heads))
        })?;
        Tensor::from_vec(out, q.dims(), q.device())
    }

    /// Counts the rows that all layers have now appended.
    pub(crate) fn advance(&mut self, starts: &[usize]) {
        for (length, w) in self.lengths.iter_mut().zip(starts.windows(2)) {
            *length += w[1] - w[0];
        }
    }
}
