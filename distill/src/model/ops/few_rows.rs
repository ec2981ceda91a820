//! x·Wᵀ for a few rows of x, in f32: the products of answers that are drawn token by token.
//!
//! The kernels of the crate `gemm` first copy W into an order of their own, which for a few rows costs as much as the
//! product. Here every row of W comes from memory once, and is asked for before it is needed: else multiplying and
//! reading take turns. A row of the result does not depend on how many rows there are.

use std::array::from_fn;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// The most rows that this is for: at 32 the crate `gemm` is as fast.
const MOST: usize = 16;
/// Rows of W that a thread takes at a time.
const PART: usize = 64;
/// So many rows of W meet so many rows of x at a time: 8 sums for 6 reads, which the registers of AVX2 hold.
const W_ROWS: usize = 2;
const X_ROWS: usize = 4;
/// How many bytes before its use a part of W is asked for: of 2, 4.5 and 9 KiB the last was the fastest.
const AHEAD_BYTES: usize = 9 * 1024;

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
        let columns = self.columns.chunks_mut(W_ROWS * rows);
        for (columns, w) in columns.zip(self.weight.chunks(W_ROWS * self.input)) {
            match columns.len() == W_ROWS * rows {
                true => pass::<S, W_ROWS>(simd, w, self.x, self.input, columns),
                false => {
                    for (column, w) in columns.chunks_mut(rows).zip(w.chunks(self.input)) {
                        pass::<S, 1>(simd, w, self.x, self.input, column);
                    }
                }
            }
        }
    }
}

/// The products of W rows of w with all rows of x, `[W, rows]`.
#[inline(always)]
fn pass<S: Simd, const W: usize>(simd: S, w: &[f32], x: &[f32], input: usize, columns: &mut [f32]) {
    let rows = x.len() / input;
    let mut at = 0;
    while at < rows {
        let x = &x[at * input..];
        let mut put = |w: usize, x: usize, y| columns[w * rows + at + x] = y;
        at += match rows - at {
            // w has been read once, and what follows it asked for, when its second rows of x come.
            X_ROWS.. if at == 0 => dots::<S, W, X_ROWS, true>(simd, w, x, input, &mut put),
            X_ROWS.. => dots::<S, W, X_ROWS, false>(simd, w, x, input, &mut put),
            2.. => dots::<S, W, 2, true>(simd, w, x, input, &mut put),
            _ => dots::<S, W, 1, true>(simd, w, x, input, &mut put),
        };
    }
}

/// The products of W rows of w with the first X rows of x, put away by their places; X. `ASK` for what follows w.
#[inline(always)]
fn dots<S: Simd, const W: usize, const X: usize, const ASK: bool>(
    simd: S,
    w: &[f32],
    x: &[f32],
    input: usize,
    put: &mut impl FnMut(usize, usize, f32),
) -> usize {
    let w: [_; W] = from_fn(|i| S::as_simd_f32s(&w[i * input..][..input]));
    let x: [_; X] = from_fn(|i| S::as_simd_f32s(&x[i * input..][..input]));
    let vectors = w[0].0.len();
    let w_vectors = w.map(|(vectors_of, _)| &vectors_of[..vectors]);
    let x_vectors = x.map(|(vectors_of, _)| &vectors_of[..vectors]);
    let mut sums = [[simd.splat_f32s(0.0); X]; W];
    for at in 0..vectors {
        let x: [_; X] = from_fn(|i| x_vectors[i][at]);
        for (sums, w) in sums.iter_mut().zip(&w_vectors) {
            if ASK {
                ask_for(&raw const w[at], AHEAD_BYTES);
            }
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = simd.mul_add_f32s(w[at], x, *sum);
            }
        }
    }
    for (i, (sums, (_, w_rest))) in sums.iter().zip(w).enumerate() {
        for (j, (sum, (_, x_rest))) in sums.iter().zip(x).enumerate() {
            let rest: f32 = w_rest.iter().zip(x_rest).map(|(w, x)| w * x).sum();
            put(i, j, simd.reduce_sum_f32s(*sum) + rest);
        }
    }
    X
}

/// Tells the processor that what lies so many bytes behind `place` will be needed.
#[inline(always)]
fn ask_for<T>(place: *const T, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "the intrinsic takes a pointer")]
    // SAFETY: a hint, which may name any address: nothing is read.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(place.cast::<i8>().wrapping_add(bytes));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (place, bytes);
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
