//! The keys and values of tokens that were already seen, for generation.

use candle_core::{Device, Result, Tensor};

use super::ops::{Heads, Sequence, attend, attention, is_composed, with_elements};

/// The cache of several sequences, each of its own length.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
    lengths: Vec<usize>,
}

/// The keys and values of one layer.
#[derive(Debug, Clone)]
enum Layer {
    /// In f32 on the CPU, sequence by sequence.
    Cpu(Vec<Rows>),
    /// On another device or of another type: those of all sequences end to end, `[rows, kv_width]` each.
    Tensors([Tensor; 2]),
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
            layers: vec![Layer::Cpu(vec![Rows::default(); sequences]); layers],
            lengths: vec![0; sequences],
        }
    }

    /// Puts the same keys and values, `[n, kv_width]`, before those of every sequence of a layer, which must be empty.
    pub(crate) fn put_before(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let sequences = self.lengths.len();
        if sequences == 0 {
            return Ok(());
        }
        self.lengths.fill(k.dim(0)?);
        self.layers[layer] = if is_composed(k) {
            Layer::Tensors([k.repeat((sequences, 1))?, v.repeat((sequences, 1))?])
        } else {
            let (k, v) = (k.flatten_all()?.to_vec1()?, v.flatten_all()?.to_vec1()?);
            Layer::Cpu(vec![Rows { k, v }; sequences])
        };
        Ok(())
    }

    /// How many rows each sequence holds: its tokens, and virtual ones before them.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Forgets the sequences for which `keep` is false; the others move up.
    pub fn retain(&mut self, keep: &[bool]) -> Result<()> {
        let keep = |i: usize| keep.get(i).copied().unwrap_or(false);
        self.times(|i| usize::from(keep(i)))
    }

    /// Every sequence so many times, its copies one after another.
    pub fn repeat(&mut self, copies: usize) -> Result<()> {
        self.times(|_| copies)
    }

    /// Sequence i as often as `count` says, its copies one after another.
    fn times(&mut self, count: impl Fn(usize) -> usize) -> Result<()> {
        let starts = starts(&self.lengths);
        let order: Vec<usize> = (0..self.lengths.len())
            .flat_map(|i| std::iter::repeat_n(i, count(i)))
            .collect();
        for layer in &mut self.layers {
            match layer {
                Layer::Cpu(sequences) => {
                    let all = std::mem::take(sequences).into_iter().enumerate();
                    *sequences = all
                        .flat_map(|(i, rows)| std::iter::repeat_n(rows, count(i)))
                        .collect();
                }
                // A GPU has no tensors without rows.
                Layer::Tensors(_) if order.is_empty() => *layer = Layer::Cpu(Vec::new()),
                Layer::Tensors(both) => {
                    let rows = order.iter().flat_map(|i| starts[*i] as u32..starts[i + 1] as u32);
                    let rows = index(rows.collect(), both[0].device())?;
                    for tensor in both {
                        *tensor = tensor.index_select(&rows, 0)?;
                    }
                }
            }
        }
        self.lengths = order.into_iter().map(|i| self.lengths[i]).collect();
        Ok(())
    }

    /// Takes up the sequences of another cache of the model, behind its own.
    pub fn append(&mut self, other: Self) -> Result<()> {
        if self.lengths.is_empty() {
            *self = other;
            return Ok(());
        }
        for (layer, more) in self.layers.iter_mut().zip(other.layers) {
            match (layer, more) {
                (Layer::Cpu(sequences), Layer::Cpu(more)) => sequences.extend(more),
                (Layer::Tensors(both), Layer::Tensors(more)) => {
                    for (tensor, more) in both.iter_mut().zip(&more) {
                        *tensor = Tensor::cat(&[&*tensor, more], 0)?;
                    }
                }
                _ => candle_core::bail!("two caches of one model are in two places"),
            }
        }
        self.lengths.extend(other.lengths);
        Ok(())
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
        let layer = &mut self.layers[layer];
        match layer {
            Layer::Cpu(sequences) if !is_composed(k) => attend_on_cpu(sequences, [q, k, v], heads, starts),
            _ => attend_elsewhere(layer, &self.lengths, [q, k, v], heads, starts),
        }
    }

    /// Counts the rows that all layers have now appended.
    pub(crate) fn advance(&mut self, starts: &[usize]) {
        for (length, w) in self.lengths.iter_mut().zip(starts.windows(2)) {
            *length += w[1] - w[0];
        }
    }
}

/// Where sequences of these lengths begin end to end, and last their sum.
fn starts(lengths: &[usize]) -> Vec<usize> {
    let mut sum = 0;
    let ends = lengths.iter().map(|length| {
        sum += length;
        sum
    });
    std::iter::once(0).chain(ends).collect()
}

fn index(rows: Vec<u32>, device: &Device) -> Result<Tensor> {
    let count = rows.len();
    Tensor::from_vec(rows, count, device)
}

fn attend_on_cpu(
    sequences: &mut [Rows],
    [q, k, v]: [&Tensor; 3],
    heads: Heads,
    starts: &[usize],
) -> Result<Tensor> {
    const OP: &str = "cached attention";
    let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
    for (tensor, values) in [(k, false), (v, true)] {
        with_elements::<f32, _>(tensor, OP, |new| {
            for (rows, w) in sequences.iter_mut().zip(starts.windows(2)) {
                let into = if values { &mut rows.v } else { &mut rows.k };
                into.extend_from_slice(&new[w[0] * kv_width..w[1] * kv_width]);
            }
            Ok(())
        })?;
    }
    let out = with_elements::<f32, _>(q, OP, |q| {
        let sequences: Vec<_> = sequences
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

fn attend_elsewhere(
    layer: &mut Layer,
    lengths: &[usize],
    [q, k, v]: [&Tensor; 3],
    heads: Heads,
    new: &[usize],
) -> Result<Tensor> {
    let old = starts(lengths);
    let whole: Vec<usize> = old.iter().zip(new).map(|(old, new)| old + new).collect();
    let both = match layer {
        Layer::Cpu(_) => [k.clone(), v.clone()],
        Layer::Tensors([old_k, old_v]) => {
            // A sequence's new rows go behind its old ones.
            let count = old.last().copied().unwrap_or(0);
            let sequences = old.windows(2).zip(new.windows(2));
            let rows = sequences.flat_map(|(old, new)| {
                let new = count + new[0]..count + new[1];
                (old[0]..old[1]).chain(new).map(|row| row as u32)
            });
            let rows = index(rows.collect(), k.device())?;
            let put = |old: &Tensor, new: &Tensor| Tensor::cat(&[old, new], 0)?.index_select(&rows, 0);
            [put(old_k, k)?, put(old_v, v)?]
        }
    };
    let out = attention(q, &both[0], &both[1], heads, new.into(), whole.into())?;
    *layer = Layer::Tensors(both);
    Ok(out)
}
