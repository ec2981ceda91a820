//! RMSNorm with a gradient: y = x · w / √(mean(x²) + ε), <https://arxiv.org/abs/1910.07467>, and Gemma's, whose
//! factor is 1 + w.
//!
//! Fused, parallel over rows; nothing is kept for the backward pass but the argument itself.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::composed;
use super::real::{Real, dtype, elements, for_real, tensor, with_elements};

const OP: &str = "rms_norm";

struct RmsNorm {
    eps: f64,
    /// What is added to the weight: 0, or 1 in Gemma.
    offset: f64,
}

/// x `[rows, d]`, weight `[d]` → `[rows, d]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::rms_norm(x, weight, eps);
    }
    x.apply_op2(weight, RmsNorm { eps, offset: 0.0 })
}

/// The same with the factor 1 + weight. Source: transformers models/gemma3, `Gemma3RMSNorm`.
pub fn rms_norm_plus_one(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::rms_norm(x, &(weight + 1.0)?, eps);
    }
    x.apply_op2(weight, RmsNorm { eps, offset: 1.0 })
}

/// Every head of x `[rows, heads · head_dim]` through a norm of its own, which sees `[rows · heads, head_dim]`.
pub fn per_head(x: &Tensor, head_dim: usize, norm: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    norm(&x.reshape(((), head_dim))?)?.reshape(x.shape())
}

fn forward<T: Real>(x: &[T], weight: &[T], norm: &RmsNorm) -> Vec<T> {
    let (d, offset) = (weight.len(), T::of(norm.offset));
    let mut out = vec![T::zero(); x.len()];
    out.par_chunks_mut(d).zip(x.par_chunks(d)).for_each(|(out, x)| {
        let scale = inverse_rms(x, norm.eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = *x * scale * (offset + *weight);
        }
    });
    out
}

fn inverse_rms<T: Real>(x: &[T], eps: f64) -> T {
    let mean = dot(x, x) / T::of(x.len() as f64);
    T::one() / (mean + T::of(eps)).sqrt()
}

/// A dot product in eight lanes: exact order, whatever the vector width.
fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::zero(); 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let mut rest = T::zero();
    for (a, b) in a8.remainder().iter().zip(b8.remainder()) {
        rest += *a * *b;
    }
    for (a, b) in a8.zip(b8) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += *a * *b;
        }
    }
    lanes.into_iter().fold(rest, |sum, lane| sum + lane)
}

/// dx, and dw where it is asked for. With x̂ = x·s, f the factor and g = dy·f: dx = s·(g − x̂·mean(g·x̂)),
/// dw = Σ dy·x̂.
fn backward<T: Real>(
    x: &[T],
    weight: &[T],
    dy: &[T],
    norm: &RmsNorm,
    with_dw: bool,
) -> (Vec<T>, Option<Vec<T>>) {
    let (d, offset) = (weight.len(), T::of(norm.offset));
    let mut dx = vec![T::zero(); x.len()];
    dx.par_chunks_mut(d)
        .zip(x.par_chunks(d))
        .zip(dy.par_chunks(d))
        .for_each(|((dx, x), dy)| {
            let scale = inverse_rms(x, norm.eps);
            for ((dx, dy), weight) in dx.iter_mut().zip(dy).zip(weight) {
                *dx = *dy * (offset + *weight);
            }
            let mean = dot(dx, x) * scale * scale / T::of(d as f64);
            for (dx, x) in dx.iter_mut().zip(x) {
                *dx = scale * (*dx - *x * mean);
            }
        });
    let dw = with_dw.then(|| {
        let mut dw = vec![T::zero(); d];
        for (x, dy) in x.chunks_exact(d).zip(dy.chunks_exact(d)) {
            let scale = inverse_rms(x, norm.eps);
            for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += *dy * *x * scale;
            }
        }
        dw
    });
    (dx, dw)
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let d = weight_layout.shape().elem_count();
        if x_layout.dims().last() != Some(&d) {
            candle_core::bail!("{OP}: x has shape {:?}, the weight {d} elements", x_layout.dims());
        }
        for_real!(dtype(x), OP, T => {
            let out = forward::<T>(elements(x, x_layout, OP)?, elements(weight, weight_layout, OP)?, self);
            Ok((<T as candle_core::WithDType>::to_cpu_storage_owned(out), x_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        for_real!(x.dtype(), OP, T => {
            let (dx, dw) = with_elements::<T, _>(x, OP, |x| with_elements::<T, _>(weight, OP, |w| {
                with_elements::<T, _>(&dy, OP, |dy| Ok(backward::<T>(x, w, dy, self, weight.track_op())))
            }))?;
            let dw = dw.map(|dw| tensor(dw, weight.dims())).transpose()?;
            Ok((Some(tensor(dx, x.dims())?), dw))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::{check, random};

    #[test]
    fn gradients_are_the_differences() {
        let (x, weight) = (random(&[5, 19], 1), random(&[19], 2));
        check(&[&x, &weight], |args| rms_norm(&args[0], &args[1], 1e-5));
        check(&[&x, &weight], |args| rms_norm_plus_one(&args[0], &args[1], 1e-5));
        let (x, weight) = (random(&[3, 12], 1), random(&[4], 2));
        check(&[&x, &weight], |args| {
            per_head(&args[0], 4, |x| rms_norm(x, &args[1], 1e-5))
        });
    }

    #[test]
    fn a_weight_of_zero_is_a_factor_of_one_in_gemma() {
        let x = random(&[2, 5], 1);
        let (zeros, ones) = (
            random(&[5], 2).zeros_like().unwrap(),
            random(&[5], 2).ones_like().unwrap(),
        );
        let values = |y: Tensor| y.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(
            values(rms_norm_plus_one(&x, &zeros, 1e-5).unwrap()),
            values(rms_norm(&x, &ones, 1e-5).unwrap())
        );
    }
}
