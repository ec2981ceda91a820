//! Causal attention with grouped queries and a gradient, softmax(s·q·kᵀ)·v, over sequences that lie one after
//! another in one batch, with or without a sliding window (<https://arxiv.org/abs/2004.05150>, counted as
//! transformers counts it: the token itself is one of the window). There is no padding: a sequence sees its own
//! rows only.
//!
//! Scores exist for one block of query rows of one head at a time; the backward pass computes them again
//! (<https://arxiv.org/abs/2205.14135>), so memory does not grow with the square of the length.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::composed;
use super::gemm::{Mat, Threads, gemm};
use super::real::{Real, dtype, elements, for_real, tensor, with_elements};

const OP: &str = "attention";
const QUERY_BLOCK: usize = 128;

/// The sizes that attention needs to know.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// The width of one head.
    pub head_dim: usize,
    /// What the products of queries and keys are multiplied by, usually 1/√head_dim.
    pub scale: f64,
    /// The number of keys that a query sees, its own and those before it; all where there is none.
    pub window: Option<usize>,
}

impl Heads {
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// The width of a row of queries.
    pub fn q_width(self) -> usize {
        self.heads * self.head_dim
    }

    /// The width of a row of keys, or values.
    pub fn kv_width(self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The keys that the query at this place of its sequence sees.
    fn seen(self, place: usize) -> Range<usize> {
        let window = self.window.unwrap_or(usize::MAX);
        (place + 1).saturating_sub(window)..place + 1
    }
}

struct Attention {
    heads: Heads,
    /// Where the sequences' queries begin, and the number of rows at the end: `[0, …, rows]`.
    starts: Arc<[usize]>,
    /// The same of their keys and values.
    key_starts: Arc<[usize]>,
}

/// q `[rows, heads · head_dim]`, k and v `[key rows, kv_heads · head_dim]` → `[rows, heads · head_dim]`.
/// `starts` are the rows at which the sequences' queries begin, and last the number of rows; `key_starts` are those
/// of their keys and values. A sequence may have more keys than queries: they precede the first query.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    starts: Arc<[usize]>,
    key_starts: Arc<[usize]>,
) -> Result<Tensor> {
    if !q.device().is_cpu() {
        return composed::attention(q, k, v, heads, &starts, &key_starts);
    }
    q.apply_op3(
        k,
        v,
        Attention {
            heads,
            starts,
            key_starts,
        },
    )
}

/// One sequence's rows: queries (the last ones of the sequence) and all its keys and values.
#[derive(Clone, Copy)]
pub(crate) struct Sequence<'a, T> {
    pub(crate) q: &'a [T],
    pub(crate) k: &'a [T],
    pub(crate) v: &'a [T],
}

impl<T> Sequence<'_, T> {
    fn queries(&self, heads: Heads) -> usize {
        self.q.len() / heads.q_width()
    }
    fn keys(&self, heads: Heads) -> usize {
        self.k.len() / heads.kv_width()
    }
}

impl<'a, T> Sequence<'a, T> {
    /// These rows of one head of its keys or values, `[rows, head_dim]`.
    fn rows(&self, of: &'a [T], rows: &Range<usize>, kv_head: usize, heads: Heads) -> Mat<'a, T> {
        let (d, width) = (heads.head_dim, heads.kv_width());
        Mat::strided(&of[rows.start * width + kv_head * d..], rows.len(), d, width)
    }
}

/// Attention of several sequences, without a gradient; `out` is filled sequence by sequence,
/// `[queries, heads · head_dim]` each.
pub(crate) fn attend<T: Real>(sequences: &[Sequence<'_, T>], heads: Heads) -> Vec<T> {
    let parts: Vec<Vec<T>> = (0..sequences.len() * heads.kv_heads)
        .into_par_iter()
        .map(|i| attend_group(&sequences[i / heads.kv_heads], i % heads.kv_heads, heads))
        .collect();
    interleave(
        &parts,
        sequences.iter().map(|s| s.queries(heads)),
        heads.kv_heads,
        heads.group() * heads.head_dim,
    )
}

/// Puts the columns of every key-value head side by side: parts `[sequence][kv head]`, each `[rows, width]`.
fn interleave<T: Real>(
    parts: &[Vec<T>],
    rows: impl Iterator<Item = usize>,
    kv_heads: usize,
    width: usize,
) -> Vec<T> {
    let mut out = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    for (sequence, rows) in rows.enumerate() {
        for row in 0..rows {
            for part in &parts[sequence * kv_heads..][..kv_heads] {
                out.extend_from_slice(&part[row * width..][..width]);
            }
        }
    }
    out
}

/// The probabilities of query rows `from..to` for one head, `[to − from, keys]`, over the keys that any of them
/// sees, which are returned.
fn probabilities<T: Real>(
    s: &Sequence<'_, T>,
    heads: Heads,
    head: usize,
    (from, to): (usize, usize),
    out: &mut Vec<T>,
) -> Range<usize> {
    let d = heads.head_dim;
    let offset = s.keys(heads) - s.queries(heads);
    let keys = heads.seen(offset + from).start..offset + to;
    out.clear();
    out.resize((to - from) * keys.len(), T::zero());
    let q = Mat::strided(
        &s.q[from * heads.q_width() + head * d..],
        to - from,
        d,
        heads.q_width(),
    );
    let k = s.rows(s.k, &keys, head / heads.group(), heads);
    gemm(out, keys.len(), 0.0, heads.scale, q, k.t(), Threads::One);
    for (i, row) in out.chunks_exact_mut(keys.len()).enumerate() {
        let seen = heads.seen(offset + from + i);
        let (row, after) = row.split_at_mut(seen.end - keys.start);
        let (before, row) = row.split_at_mut(seen.start - keys.start);
        let max = row
            .iter()
            .fold(T::of(f64::NEG_INFINITY), |max, x| if *x > max { *x } else { max });
        for x in row.iter_mut() {
            *x = (*x - max).exp();
        }
        let sum = row.iter().fold(T::zero(), |sum, x| sum + *x);
        let scale = T::one() / sum;
        for x in row.iter_mut() {
            *x *= scale;
        }
        before.fill(T::zero());
        after.fill(T::zero());
    }
    keys
}

/// The result of the query heads that share one key-value head: `[queries, group · head_dim]`.
fn attend_group<T: Real>(s: &Sequence<'_, T>, kv_head: usize, heads: Heads) -> Vec<T> {
    let (d, group, queries) = (heads.head_dim, heads.group(), s.queries(heads));
    let width = group * d;
    let mut out = vec![T::zero(); queries * width];
    let mut p = Vec::new();
    for from in (0..queries).step_by(QUERY_BLOCK) {
        let to = queries.min(from + QUERY_BLOCK);
        for g in 0..group {
            let keys = probabilities(s, heads, kv_head * group + g, (from, to), &mut p);
            let v = s.rows(s.v, &keys, kv_head, heads);
            let p = Mat::new(&p, to - from, keys.len());
            gemm(
                &mut out[from * width + g * d..],
                width,
                0.0,
                1.0,
                p,
                v,
                Threads::One,
            );
        }
    }
    out
}

/// dq `[queries, group · head_dim]`, dk and dv `[keys, head_dim]` of one key-value head.
/// With P = softmax(S): dS = P ∘ (dP − rowsum(dP ∘ P)), dP = dO·vᵀ.
fn backward_group<T: Real>(s: &Sequence<'_, T>, dy: &[T], kv_head: usize, heads: Heads) -> [Vec<T>; 3] {
    let (d, group, queries, count) = (heads.head_dim, heads.group(), s.queries(heads), s.keys(heads));
    let (width, q_width) = (group * d, heads.q_width());
    let mut dq = vec![T::zero(); queries * width];
    let (mut dk, mut dv) = (vec![T::zero(); count * d], vec![T::zero(); count * d]);
    let (mut p, mut ds) = (Vec::new(), Vec::new());
    for from in (0..queries).step_by(QUERY_BLOCK) {
        let to = queries.min(from + QUERY_BLOCK);
        let rows = to - from;
        for g in 0..group {
            let head = kv_head * group + g;
            let keys = probabilities(s, heads, head, (from, to), &mut p);
            let seen = keys.len();
            let dy = Mat::strided(&dy[from * q_width + head * d..], rows, d, q_width);
            let q = Mat::strided(&s.q[from * q_width + head * d..], rows, d, q_width);
            let (k, v) = (
                s.rows(s.k, &keys, kv_head, heads),
                s.rows(s.v, &keys, kv_head, heads),
            );
            gemm(
                &mut dv[keys.start * d..],
                d,
                1.0,
                1.0,
                Mat::new(&p, rows, seen).t(),
                dy,
                Threads::One,
            );
            ds.clear();
            ds.resize(rows * seen, T::zero());
            gemm(&mut ds, seen, 0.0, 1.0, dy, v.t(), Threads::One);
            for (ds, p) in ds.chunks_exact_mut(seen).zip(p.chunks_exact(seen)) {
                let sum = ds.iter().zip(p).fold(T::zero(), |sum, (ds, p)| sum + *ds * *p);
                for (ds, p) in ds.iter_mut().zip(p) {
                    *ds = *p * (*ds - sum);
                }
            }
            let ds = Mat::new(&ds, rows, seen);
            let dq = &mut dq[from * width + g * d..];
            gemm(dq, width, 0.0, heads.scale, ds, k, Threads::One);
            let dk = &mut dk[keys.start * d..];
            gemm(dk, d, 1.0, heads.scale, ds.t(), q, Threads::One);
        }
    }
    [dq, dk, dv]
}

impl Attention {
    fn sequences<'a, T: Real>(&self, q: &'a [T], k: &'a [T], v: &'a [T]) -> Vec<Sequence<'a, T>> {
        let (q_width, kv_width) = (self.heads.q_width(), self.heads.kv_width());
        let both = self.starts.windows(2).zip(self.key_starts.windows(2));
        both.map(|(w, keys)| Sequence {
            q: &q[w[0] * q_width..w[1] * q_width],
            k: &k[keys[0] * kv_width..keys[1] * kv_width],
            v: &v[keys[0] * kv_width..keys[1] * kv_width],
        })
        .collect()
    }

    fn check(&self, q: &[usize], k: &[usize], v: &[usize]) -> Result<()> {
        let rows = self.starts.last().copied().unwrap_or(0);
        let kv = [
            self.key_starts.last().copied().unwrap_or(0),
            self.heads.kv_width(),
        ];
        let mut lengths = self.starts.windows(2).zip(self.key_starts.windows(2));
        let enough = self.starts.len() == self.key_starts.len()
            && lengths.all(|(queries, keys)| keys[1] - keys[0] >= queries[1] - queries[0]);
        if q != [rows, self.heads.q_width()] || k != kv || v != kv || !enough {
            candle_core::bail!(
                "{OP}: q {q:?}, k {k:?}, v {v:?} do not fit {:?}, {rows} rows",
                self.heads
            );
        }
        Ok(())
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.check(q_layout.dims(), k_layout.dims(), v_layout.dims())?;
        for_real!(dtype(q), OP, T => {
            let (q, k) = (elements::<T>(q, q_layout, OP)?, elements(k, k_layout, OP)?);
            let out = attend(&self.sequences(q, k, elements(v, v_layout, OP)?), self.heads);
            Ok((T::to_cpu_storage_owned(out), q_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (heads, kv_heads) = (self.heads, self.heads.kv_heads);
        let rows = |starts: &'_ Arc<[usize]>| starts.windows(2).map(|w| w[1] - w[0]).collect::<Vec<_>>();
        let (rows, key_rows) = (rows(&self.starts), rows(&self.key_starts));
        for_real!(q.dtype(), OP, T => {
            let parts: Vec<[Vec<T>; 3]> =
                with_elements::<T, _>(q, OP, |q| with_elements::<T, _>(k, OP, |k| {
                    with_elements::<T, _>(v, OP, |v| with_elements::<T, _>(&dy, OP, |dy| {
                        let sequences = self.sequences(q, k, v);
                        Ok((0..sequences.len() * kv_heads).into_par_iter().map(|i| {
                            let s = i / kv_heads;
                            let dy = &dy[self.starts[s] * heads.q_width()..self.starts[s + 1] * heads.q_width()];
                            backward_group(&sequences[s], dy, i % kv_heads, heads)
                        }).collect())
                    }))
                }))?;
            let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
            for [q, k, v] in parts {
                dq.push(q);
                dk.push(k);
                dv.push(v);
            }
            let join = |parts: &[Vec<T>], rows: &[usize], width, dims: &[usize]| {
                tensor(interleave(parts, rows.iter().copied(), kv_heads, width), dims)
            };
            Ok((
                Some(join(&dq, &rows, heads.group() * heads.head_dim, q.dims())?),
                Some(join(&dk, &key_rows, heads.head_dim, k.dims())?),
                Some(join(&dv, &key_rows, heads.head_dim, v.dims())?),
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::{check, random};

    const HEADS: Heads = Heads {
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        scale: 0.4,
        window: None,
    };

    fn windowed(window: usize) -> Heads {
        Heads {
            window: Some(window),
            ..HEADS
        }
    }

    #[test]
    fn gradients_are_the_differences() {
        let (q, k, v) = (random(&[8, 24], 6), random(&[8, 12], 7), random(&[8, 12], 8));
        for heads in [HEADS, windowed(2), windowed(100)] {
            check(&[&q, &k, &v], |args| {
                attention(
                    &args[0],
                    &args[1],
                    &args[2],
                    heads,
                    [0, 3, 8].into(),
                    [0, 3, 8].into(),
                )
            });
        }
    }

    /// Attention as its formula says, query by query and key by key.
    fn by_hand(q: &[f64], k: &[f64], v: &[f64], heads: Heads) -> Vec<f64> {
        let (d, q_width, kv_width) = (heads.head_dim, heads.q_width(), heads.kv_width());
        let mut out = vec![0.0; q.len()];
        for i in 0..q.len() / q_width {
            for head in 0..heads.heads {
                let kv = head / heads.group() * d;
                let sees = |j: usize| j <= i && heads.window.is_none_or(|window| i - j < window);
                let score = |j: usize| -> f64 {
                    let (q, k) = (&q[i * q_width + head * d..][..d], &k[j * kv_width + kv..][..d]);
                    (heads.scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>()).exp()
                };
                let sum: f64 = (0..=i).filter(|j| sees(*j)).map(score).sum();
                for j in (0..=i).filter(|j| sees(*j)) {
                    for x in 0..d {
                        out[i * q_width + head * d + x] += score(j) / sum * v[j * kv_width + kv + x];
                    }
                }
            }
        }
        out
    }

    #[test]
    fn gradients_reach_keys_that_precede_the_queries() {
        let (q, k, v) = (random(&[8, 24], 6), random(&[14, 12], 7), random(&[14, 12], 8));
        for heads in [HEADS, windowed(3)] {
            check(&[&q, &k, &v], |args| {
                attention(
                    &args[0],
                    &args[1],
                    &args[2],
                    heads,
                    [0, 3, 8].into(),
                    [0, 5, 14].into(),
                )
            });
        }
        let too_few = attention(&q, &k, &v, HEADS, [0, 3, 8].into(), [0, 2, 14].into());
        assert!(too_few.is_err(), "a query without its own key");
    }

    #[test]
    fn blocks_of_queries_windows_and_a_cache_are_the_formula() {
        let rows = QUERY_BLOCK + 9;
        let [q, k, v] = [24, 12, 12].map(|width| {
            random(&[rows, width], width as u64)
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()
        });
        for heads in [
            HEADS,
            windowed(1),
            windowed(7),
            windowed(QUERY_BLOCK),
            windowed(rows),
        ] {
            let expected = by_hand(&q, &k, &v, heads);
            let near = |ours: &[f64], from: usize| {
                for (a, b) in ours.iter().zip(&expected[from * 24..]) {
                    assert!((a - b).abs() < 1e-12, "{heads:?}");
                }
            };
            near(&attend(&[Sequence { q: &q, k: &k, v: &v }], heads), 0);
            // The last queries of a sequence whose other keys stand in a cache.
            for (from, to) in [
                (0, 1),
                (1, 2),
                (5, 40),
                (QUERY_BLOCK - 1, QUERY_BLOCK),
                (rows - 1, rows),
            ] {
                let some = Sequence {
                    q: &q[from * 24..to * 24],
                    k: &k[..to * 12],
                    v: &v[..to * 12],
                };
                near(&attend(&[some], heads), from);
            }
        }
    }
}
