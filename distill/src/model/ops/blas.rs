//! Matrix products by the machine's BLAS, with the features `mkl` (Intel) and `accelerate` (Apple), which link it
//! through candle.

use std::ffi::{c_char, c_int};

use candle_core::DType;

use super::gemm::Mat;
use super::real::Real;

macro_rules! declare {
    ($name:ident, $t:ty) => {
        #[expect(unsafe_code, reason = "BLAS is a C interface")]
        unsafe extern "C" {
            fn $name(
                transa: *const c_char,
                transb: *const c_char,
                m: *const c_int,
                n: *const c_int,
                k: *const c_int,
                alpha: *const $t,
                a: *const $t,
                lda: *const c_int,
                b: *const $t,
                ldb: *const c_int,
                beta: *const $t,
                c: *mut $t,
                ldc: *const c_int,
            );
        }
    };
}
declare!(sgemm_, f32);
declare!(dgemm_, f64);

/// `out = alpha · a · b + keep · out`, as [`super::gemm::gemm`], which has checked the sizes. False where BLAS cannot
/// do it: a size beyond its 32-bit integers, or a matrix that is neither row by row nor column by column.
pub(super) fn gemm<T: Real>(
    out: &mut [T],
    out_stride: usize,
    keep: f64,
    alpha: f64,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
) -> bool {
    // BLAS counts column by column: there our rows are columns, and outᵀ = bᵀ·aᵀ.
    let side = |mat: &Mat<'_, T>| -> Option<(c_char, c_int)> {
        let (trans, stride) = match (mat.row_stride, mat.col_stride) {
            (stride, 1) => (b'N', stride.max(mat.cols)),
            (1, stride) => (b'T', stride.max(mat.rows)),
            _ => return None,
        };
        Some((trans as c_char, c_int::try_from(stride.max(1)).ok()?))
    };
    let sizes = [a.rows, b.cols, a.cols, out_stride].map(c_int::try_from);
    let (Some((trans_a, lda)), Some((trans_b, ldb)), [Ok(m), Ok(n), Ok(k), Ok(ldc)]) =
        (side(&a), side(&b), sizes)
    else {
        return false;
    };
    let (a, b, c) = (a.data.as_ptr(), b.data.as_ptr(), out.as_mut_ptr());
    // SAFETY: the caller has checked that every address of a, b and out lies in its slice; out is borrowed mutably;
    // the pointers are cast to the type that T is, and the scalars live through the call.
    #[expect(unsafe_code, reason = "BLAS is a C interface")]
    unsafe {
        macro_rules! call {
            ($name:ident, $t:ty) => {{
                let (alpha, keep) = (alpha as $t, keep as $t);
                $name(
                    &trans_b,
                    &trans_a,
                    &n,
                    &m,
                    &k,
                    &alpha,
                    b.cast(),
                    &ldb,
                    a.cast(),
                    &lda,
                    &keep,
                    c.cast(),
                    &ldc,
                );
            }};
        }
        match T::DTYPE {
            DType::F32 => call!(sgemm_, f32),
            DType::F64 => call!(dgemm_, f64),
            _ => return false,
        }
    }
    true
}
