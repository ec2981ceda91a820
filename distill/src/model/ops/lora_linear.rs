//! A frozen linear layer with its low-rank adapter in one operation, <https://arxiv.org/abs/2106.09685>:
//! y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ. Of the forward pass only drop(x)·Aᵀ, `[rows, r]`, is kept.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType as _};
use rayon::prelude::*;

use super::composed;
use super::frozen::Frozen;
use super::gemm::{Mat, Threads, gemm};
use super::linear;
use super::real::{Real, dtype, elements, for_real, tensor, with_elements};
use crate::random::mix;

const OP: &str = "lora_linear";

/// Which inputs of A are dropped: each with a chance, decided by a hash of the seed and its place.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// The chance of being dropped, in [0, 1).
    pub chance: f64,
    /// Decides, with the place of an element, whether it is dropped.
    pub seed: u64,
}

impl Dropout {
    /// 0 for a dropped element, 1 / (1 − chance) for one that stays.
    fn factor<T: Real>(self, index: usize) -> T {
        let uniform = (mix(self.seed ^ mix(index as u64)) >> 11) as f64 / (1u64 << 53) as f64;
        if uniform < self.chance {
            T::zero()
        } else {
            T::of(1.0 / (1.0 - self.chance))
        }
    }

    /// The factors of all elements of x, as a tensor without a gradient.
    pub(crate) fn mask(self, x: &Tensor) -> Result<Tensor> {
        let factors: Vec<f32> = (0..x.elem_count())
            .into_par_iter()
            .map(|i| self.factor(i))
            .collect();
        Tensor::from_vec(factors, x.dims(), x.device())?.to_dtype(x.dtype())
    }

    fn apply<T: Real>(self, x: &[T]) -> Vec<T> {
        x.par_iter()
            .enumerate()
            .map(|(i, x)| *x * self.factor(i))
            .collect()
    }
}

/// By x, `lora_a` and `lora_b`.
type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

struct LoraLinear {
    weight: Frozen,
    scale: f64,
    dropout: Option<Dropout>,
    /// drop(x)·Aᵀ `[rows, r]`, kept for the backward pass.
    down: OnceLock<Tensor>,
}

/// x `[rows, in]`, frozen weight `[out, in]`, `lora_a` `[r, in]`, `lora_b` `[out, r]` → `[rows, out]`.
pub fn lora_linear(
    x: &Tensor,
    weight: &Frozen,
    lora_a: &Tensor,
    lora_b: &Tensor,
    scale: f64,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    if composed::is_for(x) {
        return composed::lora_linear(x, weight, lora_a, lora_b, scale, dropout);
    }
    let op = LoraLinear {
        weight: weight.clone(),
        scale,
        dropout,
        down: OnceLock::new(),
    };
    x.apply_op3(lora_a, lora_b, op)
}

impl LoraLinear {
    fn dropped<'a, T: Real>(&self, x: &'a [T]) -> std::borrow::Cow<'a, [T]> {
        match self.dropout {
            Some(dropout) => dropout.apply(x).into(),
            None => x.into(),
        }
    }

    fn backward<T: Real>(&self, x: &Tensor, a: &Tensor, b: &Tensor, dy: &Tensor) -> Result<Gradients> {
        let (rows, input, out) = self.weight.sizes(x.dims())?;
        let r = a.dims()[0];
        let Some(down) = self.down.get() else {
            candle_core::bail!("{OP}: backward before forward")
        };
        with_elements::<T, _>(dy, OP, |dy| {
            let dy_mat = Mat::new(dy, rows, out);
            let mut db = vec![T::zero(); out * r];
            with_elements::<T, _>(down, OP, |down| {
                gemm(
                    &mut db,
                    r,
                    0.0,
                    self.scale,
                    dy_mat.t(),
                    Mat::new(down, rows, r),
                    Threads::All,
                );
                Ok(())
            })?;
            let mut d_down = vec![T::zero(); rows * r];
            with_elements::<T, _>(b, OP, |b| {
                gemm(
                    &mut d_down,
                    r,
                    0.0,
                    self.scale,
                    dy_mat,
                    Mat::new(b, out, r),
                    Threads::All,
                );
                Ok(())
            })?;
            let d_down = Mat::new(&d_down, rows, r);
            let mut da = vec![T::zero(); r * input];
            with_elements::<T, _>(x, OP, |x| {
                let x = self.dropped(x);
                gemm(
                    &mut da,
                    input,
                    0.0,
                    1.0,
                    d_down.t(),
                    Mat::new(&x, rows, input),
                    Threads::All,
                );
                Ok(())
            })?;
            let dx = if x.track_op() {
                let mut dx = self.weight.backward_x(OP, dy, (rows, input, out))?;
                with_elements::<T, _>(a, OP, |a| {
                    let a = Mat::new(a, r, input);
                    match self.dropout {
                        None => gemm(&mut dx, input, 1.0, 1.0, d_down, a, Threads::All),
                        Some(dropout) => {
                            let mut through = vec![T::zero(); rows * input];
                            gemm(&mut through, input, 0.0, 1.0, d_down, a, Threads::All);
                            dx.par_iter_mut()
                                .zip(through)
                                .enumerate()
                                .for_each(|(i, (dx, through))| {
                                    *dx += through * dropout.factor(i);
                                });
                        }
                    }
                    Ok(())
                })?;
                Some(tensor(dx, x.dims())?)
            } else {
                None
            };
            Ok((dx, Some(tensor(da, a.dims())?), Some(tensor(db, b.dims())?)))
        })
    }
}

impl CustomOp3 for LoraLinear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, input, out) = self.weight.sizes(x_layout.dims())?;
        let r = match (a_layout.dims(), b_layout.dims()) {
            (&[r, a_in], &[b_out, b_r]) if a_in == input && b_out == out && b_r == r => r,
            (a, b) => candle_core::bail!("{OP}: lora_A {a:?} and lora_B {b:?} for [{out}, {input}]"),
        };
        for_real!(dtype(x), OP, T => {
            let x = elements::<T>(x, x_layout, OP)?;
            let (a, b) = (elements::<T>(a, a_layout, OP)?, elements::<T>(b, b_layout, OP)?);
            let mut y = self.weight.forward(OP, x, (rows, input, out))?;
            let down = linear::forward(&self.dropped(x), a, (rows, input, r));
            gemm(&mut y, out, 1.0, self.scale, Mat::new(&down, rows, r), Mat::new(b, out, r).t(), Threads::All);
            let _ = self.down.set(tensor(down, &[rows, r])?);
            Ok((T::to_cpu_storage_owned(y), Shape::from((rows, out))))
        })
    }

    fn bwd(&self, x: &Tensor, a: &Tensor, b: &Tensor, _res: &Tensor, dy: &Tensor) -> Result<Gradients> {
        for_real!(x.dtype(), OP, T => self.backward::<T>(x, a, b, &dy.contiguous()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::{check, random};

    #[test]
    fn gradients_are_the_differences() {
        let (x, weight) = (random(&[5, 6], 11), random(&[7, 6], 12));
        let (a, b) = (random(&[2, 6], 13), random(&[7, 2], 14));
        let weight = Frozen::Dense(weight.as_tensor().clone());
        for dropout in [None, Some(Dropout { chance: 0.4, seed: 3 })] {
            check(&[&x, &a, &b], |args| {
                lora_linear(&args[0], &weight, &args[1], &args[2], 1.7, dropout)
            });
        }
    }

    #[test]
    fn dropout_drops_its_share_and_keeps_the_mean() {
        let kept = Dropout { chance: 0.3, seed: 7 }.apply(&vec![1.0f64; 100_000]);
        let dropped = kept.iter().filter(|x| **x == 0.0).count() as f64 / 1e5;
        assert!((dropped - 0.3).abs() < 0.01, "{dropped}");
        assert!((kept.iter().sum::<f64>() / 1e5 - 1.0).abs() < 0.01);
    }
}
