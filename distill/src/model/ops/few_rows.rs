//! x·Wᵀ for a few rows of x: the products of answers that are drawn token by token.
//!
//! The kernels of the crate `gemm` first copy W into an order of their own, which for a few rows costs more than the
//! product. Here every row of W is read once, past rows of x that stay in the cache: the time is that of reading W.
//! A row of the result does not depend on how many rows there are.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::real::Real;

/// The most rows that this is for.
const MOST: usize = 16;
/// Numbers that are multiplied together, and added up apart.
const LANES: usize = 8;
/// Rows of W that a thread takes at a time.
const PART: usize = 64;

/// Whether a product with so many rows of x is computed here.
pub(crate) fn is_for(rows: usize) -> bool {
    rows <= MOST
}

/// x `[rows, in]`, W `[out, in]` → `[rows, out]`.
pub(crate) fn product<T: Real>(x: &[T], weight: &[T], (rows, input, out): (usize, usize, usize)) -> Vec<T> {
    let mut y = vec![T::zero(); rows * out];
    if y.is_empty() || input == 0 {
        return y;
    }
    let mut columns = vec![T::zero(); rows * out];
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
    for (j, column) in columns.chunks_exact(rows).enumerate() {
        for (i, value) in column.iter().enumerate() {
            y[i * out + j] = *value;
        }
    }
    y
}

/// Columns of the result, end to end: each the products of a row of W with all rows of x.
struct Columns<'a, T> {
    x: &'a [T],
    weight: &'a [T],
    input: usize,
    columns: &'a mut [T],
}

impl<T: Real> WithSimd for Columns<'_, T> {
    type Output = ();

    /// What is written here is compiled for every kind of vectors that the machine may have.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let rows = self.x.len() / self.input;
        let columns = self.columns.chunks_exact_mut(rows);
        for (column, w) in columns.zip(self.weight.chunks_exact(self.input)) {
            let mut at = 0;
            while at < rows {
                let x = &self.x[at * self.input..];
                let left = &mut column[at..];
                at += match rows - at {
                    8.. => dots::<T, 8>(w, x, left),
                    4.. => dots::<T, 4>(w, x, left),
                    2.. => dots::<T, 2>(w, x, left),
                    _ => dots::<T, 1>(w, x, left),
                };
            }
        }
    }
}

/// The products of w with the first R rows of x, into `out`; R.
#[inline(always)]
fn dots<T: Real, const R: usize>(w: &[T], x: &[T], out: &mut [T]) -> usize {
    let input = w.len();
    let (w_lanes, w_rest) = w.as_chunks::<LANES>();
    let x: [&[T]; R] = std::array::from_fn(|r| &x[r * input..(r + 1) * input]);
    let x_lanes: [&[[T; LANES]]; R] = std::array::from_fn(|r| &x[r].as_chunks::<LANES>().0[..w_lanes.len()]);
    let mut sums = [[T::zero(); LANES]; R];
    for (at, w) in w_lanes.iter().enumerate() {
        for (sums, x) in sums.iter_mut().zip(&x_lanes) {
            let x = &x[at];
            for lane in 0..LANES {
                sums[lane] += w[lane] * x[lane];
            }
        }
    }
    for ((out, sums), x) in out.iter_mut().zip(&sums).zip(&x) {
        let halves = [
            sums[0] + sums[4],
            sums[1] + sums[5],
            sums[2] + sums[6],
            sums[3] + sums[7],
        ];
        let mut sum = (halves[0] + halves[2]) + (halves[1] + halves[3]);
        for (w, x) in w_rest.iter().zip(&x[input - w_rest.len()..]) {
            sum += *w * *x;
        }
        *out = sum;
    }
    R
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_the_product_that_it_is_alone() {
        let (input, out) = (21, 131);
        let weight: Vec<f64> = (0..out * input).map(|i| (i as f64 * 0.3).cos()).collect();
        let x: Vec<f64> = (0..MOST * input).map(|i| (i as f64 * 0.7).sin()).collect();
        for rows in 1..=MOST {
            let x = &x[..rows * input];
            let y = product(x, &weight, (rows, input, out));
            for (x, y) in x.chunks(input).zip(y.chunks(out)) {
                assert_eq!(y, product(x, &weight, (1, input, out)));
                for (w, y) in weight.chunks(input).zip(y) {
                    let dot: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                    assert!((y - dot).abs() < 1e-12);
                }
            }
        }
        assert!(product::<f32>(&[], &[1.0, 2.0], (0, 2, 1)).is_empty());
    }
}
