//! Matrix products over slices, on the same kernels as candle's own `matmul` (the crate `gemm`).

use gemm::Parallelism;

use super::real::Real;

/// A matrix inside a slice: element (i, j) stands at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    pub(super) data: &'a [T],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A row-major matrix, `rows × cols`, without gaps.
    pub(crate) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows start `row_stride` elements apart.
    pub(crate) fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// The transposed matrix, without a copy.
    pub(crate) fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// `out = alpha · a · b + keep · out` with `out` row-major `a.rows × b.cols`, rows `out_stride` apart.
/// With `keep` 0 the old content of `out` is not read.
///
/// # Panics
/// When the shapes do not fit each other or leave their slices.
pub(crate) fn gemm<T: Real>(
    out: &mut [T],
    out_stride: usize,
    keep: f64,
    alpha: f64,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    threads: Threads,
) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert_eq!(k, b.rows, "inner dimensions");
    assert!(
        (m - 1) * out_stride + n <= out.len(),
        "the product leaves its slice"
    );
    for mat in [&a, &b] {
        assert!(
            mat.rows == 0
                || mat.cols == 0
                || (mat.rows - 1) * mat.row_stride + (mat.cols - 1) * mat.col_stride < mat.data.len(),
            "a factor leaves its slice"
        );
    }
    #[cfg(any(feature = "mkl", feature = "accelerate"))]
    if threads == Threads::All && super::blas::gemm(out, out_stride, keep, alpha, a, b) {
        return;
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    // SAFETY: the asserts above bound every address that is read (a, b) and written (out); `out` is borrowed
    // mutably, so it overlaps neither factor; T is f32 or f64, for which the crate has kernels.
    #[expect(unsafe_code, reason = "the crate gemm has no safe interface")]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            keep != 0.0,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::of(keep),
            T::of(alpha),
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// How many threads a product may use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling one: for products inside a parallel loop.
    One,
    /// All of rayon's.
    All,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_three_loops() {
        let (m, k, n) = (5, 7, 6);
        let a: Vec<f64> = (0..m * k).map(|i| (i as f64 * 0.7).sin()).collect();
        let b: Vec<f64> = (0..n * k).map(|i| (i as f64 * 0.3).cos()).collect();
        let old: Vec<f64> = (0..m * n).map(|i| i as f64).collect();
        let mut out = old.clone();
        // b is stored transposed, as a linear layer's weight is.
        gemm(
            &mut out,
            n,
            0.5,
            2.0,
            Mat::new(&a, m, k),
            Mat::new(&b, n, k).t(),
            Threads::All,
        );
        for i in 0..m {
            for j in 0..n {
                let dot: f64 = (0..k).map(|x| a[i * k + x] * b[j * k + x]).sum();
                assert!((out[i * n + j] - (0.5 * old[i * n + j] + 2.0 * dot)).abs() < 1e-12);
            }
        }
    }
}
