//! Attention of candle's own operations. The scores of one layer exist at a time: they are computed again in the
//! backward pass.

use candle_core::{D, Result, Tensor};

use super::given::recomputed;
use super::{moved, wide};
use crate::model::ops::Heads;

/// Where the queries and the keys of a batch's sequences lie.
#[derive(Debug, Clone)]
struct Layout {
    starts: Vec<usize>,
    key_starts: Vec<usize>,
    heads: Heads,
}

/// [`attention`](crate::model::ops::attention()): the sequences are padded to the longest, for this operation only.
pub(in crate::model::ops) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    starts: &[usize],
    key_starts: &[usize],
) -> Result<Tensor> {
    let layout = Layout {
        starts: starts.to_vec(),
        key_starts: key_starts.to_vec(),
        heads,
    };
    recomputed("attention", [q, k, v], move |[q, k, v]| layout.attend(q, k, v))
}

/// The lengths of sequences that begin at these rows.
fn lengths(starts: &[usize]) -> Vec<usize> {
    starts.windows(2).map(|w| w[1] - w[0]).collect()
}

/// `[rows, heads · head_dim]` → `[sequences, heads, longest, head_dim]`. Rows beyond a sequence's end repeat its last
/// one, so that nothing is ever undefined; they must get no gradient.
fn padded(x: &Tensor, starts: &[usize], heads: usize, head_dim: usize) -> Result<Tensor> {
    let lengths = lengths(starts);
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let sequences = starts.iter().zip(&lengths);
    let rows: Vec<Option<usize>> = sequences
        .flat_map(|(start, length)| (0..longest).map(move |i| Some(start + i.min(length - 1))))
        .collect();
    let x = match lengths.iter().all(|length| *length == longest) {
        true => x.clone(),
        false => moved("padding", x, &rows, &real_rows(&lengths, longest))?,
    };
    x.reshape((lengths.len(), longest, heads, head_dim))?
        .transpose(1, 2)?
        .contiguous()
}

/// The rows of the sequences themselves among those of padded ones.
fn real_rows(lengths: &[usize], longest: usize) -> Vec<Option<usize>> {
    let sequences = lengths.iter().enumerate();
    let rows = sequences.flat_map(|(s, length)| (0..*length).map(move |i| Some(s * longest + i)));
    rows.collect()
}

impl Layout {
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let Heads {
            heads,
            kv_heads,
            head_dim: d,
            scale,
            ..
        } = self.heads;
        let q = padded(q, &self.starts, heads, d)?;
        let k = padded(k, &self.key_starts, kv_heads, d)?;
        let v = padded(v, &self.key_starts, kv_heads, d)?;
        let (sequences, _, nq, _) = q.dims4()?;
        let (groups, nk, rows) = (sequences * kv_heads, k.dim(2)?, heads / kv_heads * nq);
        let q = q.reshape((groups, rows, d))?;
        let (k, v) = (k.reshape((groups, nk, d))?, v.reshape((groups, nk, d))?);
        let scores = wide(&q.matmul(&k.t()?)?)?.affine(scale, 0.0)?;
        let scores = scores.reshape((sequences, heads, nq, nk))?;
        let hidden = Tensor::new(f32::NEG_INFINITY, q.device())?
            .to_dtype(scores.dtype())?
            .broadcast_as(scores.shape())?;
        let seen = self.seen(nq, nk, q.device())?.broadcast_as(scores.shape())?;
        let scores = seen.where_cond(&scores, &hidden)?;
        let exp = scores
            .broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?
            .exp()?;
        let probabilities = exp
            .broadcast_div(&exp.sum_keepdim(D::Minus1)?)?
            .to_dtype(v.dtype())?;
        let out = probabilities.reshape((groups, rows, nk))?.matmul(&v)?;
        let out = out
            .reshape((sequences, heads, nq, d))?
            .transpose(1, 2)?
            .reshape((sequences * nq, heads * d))?;
        self.without_padding(&out, nq)
    }

    /// Which keys a query sees, `[sequences, 1, nq, nk]` of zeros and ones.
    fn seen(&self, nq: usize, nk: usize, device: &candle_core::Device) -> Result<Tensor> {
        let (queries, keys) = (lengths(&self.starts), lengths(&self.key_starts));
        let positions: Vec<i64> = queries
            .iter()
            .zip(&keys)
            .flat_map(|(queries, keys)| (0..nq).map(move |i| (keys - queries + i.min(queries - 1)) as i64))
            .collect();
        let at_query = Tensor::from_vec(positions, (queries.len(), 1, nq, 1), device)?;
        let at_key = Tensor::arange(0, nk as i64, device)?.reshape((1, 1, 1, nk))?;
        let seen = at_query.broadcast_ge(&at_key)?;
        match self.heads.window {
            None => Ok(seen),
            Some(window) => seen * at_query.broadcast_sub(&at_key)?.lt(window as i64)?,
        }
    }

    /// The rows of the sequences themselves, of `[sequences · nq, width]`.
    fn without_padding(&self, x: &Tensor, nq: usize) -> Result<Tensor> {
        let lengths = lengths(&self.starts);
        if lengths.iter().all(|length| *length == nq) {
            return Ok(x.clone());
        }
        let sequences = self.starts.iter().zip(&lengths);
        let back: Vec<Option<usize>> = sequences
            .flat_map(|(start, length)| (0..nq).map(move |i| (i < *length).then_some(start + i)))
            .collect();
        moved("padding", x, &real_rows(&lengths, nq), &back)
    }
}
