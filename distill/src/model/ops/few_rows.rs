//! x·Wᵀ for a few rows of x, in f32: the products of answers that are drawn token by token.
//!
//! The kernels of the crate `gemm` first copy W into an order of their own, which for a few rows costs as much as the
//! product. Here every row of W is read once, past rows of x that stay in the cache. A row of the result does not
//! depend on how many rows there are.

use std::array::from_fn;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// The most rows that this is for: at 32 the crate `gemm` is as fast.
const MOST: usize = 16;
/// Rows of W that a thread takes at a time.
const PART: usize = 64;
/// A row of W is multiplied with so many rows of x at a time: their sums fit the registers of AVX2, and W is read
/// without a pause.
const X_ROWS: usize = 8;

/// x `[rows, in]`, W `[out, in]` → `[rows, out]`; none where there are too many rows, or a BLAS was built in.
pub(crate) fn product(
    x: &[f32],
    weight: &[f32],
    (rows, input, out): (usize, usize, usize),
) -> Option<Vec<f32>> {
    if rows > MOST || cfg!(any(feature = "mkl", feature = "accelerate")) {
        return None;
    }
    let mut columns = vec![0.0; rows * out];
    if columns.is_empty() || input == 0 {
        return Some(columns);
    }
    columns
        .par_chunks_mut(rows * PART)
        .zip(weight.par_chunks(input * PART))
        .for_each(|(columns, weight)| {
            Arch::new().dispatch(Columns {
                x,
                weight,
                input,
                columns,
            })
        });
    let mut y = Vec::with_capacity(columns.len());
    for i in 0..rows {
        y.extend(columns.iter().skip(i).step_by(rows));
    }
    Some(y)
}

/// Columns of the result, end to end: each the products of a row of W with all rows of x.
struct Columns<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    input: usize,
    columns: &'a mut [f32],
}

impl WithSimd for Columns<'_> {
    type Output = ();

    /// Compiled for every kind of vectors that the machine may have.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows = self.x.len() / self.input;
        let columns = self.columns.chunks_exact_mut(rows);
        for (column, w) in columns.zip(self.weight.chunks_exact(self.input)) {
            let mut at = 0;
            while at < rows {
                let (x, out) = (&self.x[at * self.input..], &mut column[at..]);
                at += match rows - at {
                    X_ROWS.. => dots::<S, X_ROWS>(simd, w, x, out),
                    4.. => dots::<S, 4>(simd, w, x, out),
                    2.. => dots::<S, 2>(simd, w, x, out),
                    _ => dots::<S, 1>(simd, w, x, out),
                };
            }
        }
    }
}

/// The products of w with the first N rows of x, into `out`; N.
#[inline(always)]
fn dots<S: Simd, const N: usize>(simd: S, w: &[f32], x: &[f32], out: &mut [f32]) -> usize {
    let (w_vectors, w_rest) = S::as_simd_f32s(w);
    let x: [_; N] = from_fn(|n| S::as_simd_f32s(&x[n * w.len()..][..w.len()]));
    let x_vectors: [_; N] = from_fn(|n| &x[n].0[..w_vectors.len()]);
    let mut sums = [simd.splat_f32s(0.0); N];
    for (at, w) in w_vectors.iter().enumerate() {
        for (sum, x) in sums.iter_mut().zip(&x_vectors) {
            *sum = simd.mul_add_f32s(*w, x[at], *sum);
        }
    }
    for ((out, sum), (_, x_rest)) in out.iter_mut().zip(sums).zip(x) {
        let rest: f32 = w_rest.iter().zip(x_rest).map(|(w, x)| w * x).sum();
        *out = simd.reduce_sum_f32s(sum) + rest;
    }
    N
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_the_product_that_it_is_alone() {
        let (input, out) = (21, 131);
        let weight: Vec<f32> = (0..out * input).map(|i| (i as f32 * 0.3).cos()).collect();
        let x: Vec<f32> = (0..MOST * input).map(|i| (i as f32 * 0.7).sin()).collect();
        for rows in 1..=MOST {
            let x = &x[..rows * input];
            let y = product(x, &weight, (rows, input, out)).unwrap();
            for (x, y) in x.chunks(input).zip(y.chunks(out)) {
                assert_eq!(y, product(x, &weight, (1, input, out)).unwrap());
                for (w, y) in weight.chunks(input).zip(y) {
                    let dot: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    assert!((f64::from(*y) - dot).abs() < 1e-5);
                }
            }
        }
        assert_eq!(product(&[], &[1.0, 2.0], (0, 2, 1)), Some(Vec::new()));
    }

    #[test]
    fn many_rows_go_another_way() {
        assert_eq!(product(&[1.0; MOST + 1], &[1.0], (MOST + 1, 1, 1)), None);
    }
}
