//! Linear layers, y = x·Wᵀ. [`frozen_linear`] never computes a gradient of W, which candle's own matmul
//! computes and keeps; [`linear`] does.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, WithDType};

use super::composed;
use super::frozen::Frozen;
use super::gemm::{Mat, Threads, gemm};
use super::real::{Real, dtype, elements, for_real, tensor, with_elements};

const OP: &str = "linear";

struct FrozenLinear {
    weight: Frozen,
    drawn: bool,
}

struct Linear;

/// x `[rows, in]`, a weight `[out, in]` that stays as it is → `[rows, out]`.
pub fn frozen_linear(x: &Tensor, weight: &Frozen) -> Result<Tensor> {
    if composed::is_for(x) {
        return composed::frozen_linear(x, weight);
    }
    x.apply_op1(FrozenLinear {
        weight: weight.clone(),
        drawn: false,
    })
}

/// The same for tokens that are drawn, without a gradient: few of them go a faster way, with bits of its own.
pub fn drawn_linear(x: &Tensor, weight: &Frozen) -> Result<Tensor> {
    if composed::is_for(x) {
        return composed::frozen_linear(x, weight);
    }
    x.apply_op1_no_bwd(&FrozenLinear {
        weight: weight.clone(),
        drawn: true,
    })
}

/// x `[rows, in]`, a weight `[out, in]` that is trained → `[rows, out]`.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if composed::is_for(x) {
        return composed::linear(x, weight);
    }
    x.apply_op2(weight, Linear)
}

/// (rows, in, out), or an error when the shapes do not fit.
pub(crate) fn sizes(x: &[usize], weight: &[usize]) -> Result<(usize, usize, usize)> {
    match (x, weight) {
        (&[rows, width], &[out, input]) if width == input => Ok((rows, input, out)),
        _ => candle_core::bail!("{OP}: x has shape {x:?}, the weight {weight:?}"),
    }
}

/// x·Wᵀ.
pub(crate) fn forward<T: Real>(x: &[T], weight: &[T], (rows, input, out): (usize, usize, usize)) -> Vec<T> {
    let mut y = vec![T::zero(); rows * out];
    gemm(
        &mut y,
        out,
        0.0,
        1.0,
        Mat::new(x, rows, input),
        Mat::new(weight, out, input).t(),
        Threads::All,
    );
    y
}

/// dx = dy·W.
pub(crate) fn backward_x<T: Real>(
    dy: &[T],
    weight: &[T],
    (rows, input, out): (usize, usize, usize),
) -> Vec<T> {
    let mut dx = vec![T::zero(); rows * input];
    gemm(
        &mut dx,
        input,
        0.0,
        1.0,
        Mat::new(dy, rows, out),
        Mat::new(weight, out, input),
        Threads::All,
    );
    dx
}

/// dW = dyᵀ·x.
fn backward_w<T: Real>(dy: &[T], x: &[T], (rows, input, out): (usize, usize, usize)) -> Vec<T> {
    let mut dw = vec![T::zero(); out * input];
    gemm(
        &mut dw,
        input,
        0.0,
        1.0,
        Mat::new(dy, rows, out).t(),
        Mat::new(x, rows, input),
        Threads::All,
    );
    dw
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes = self.weight.sizes(layout.dims())?;
        for_real!(dtype(x), OP, T => {
            let x = elements(x, layout, OP)?;
            let y = match self.drawn {
                true => self.weight.forward_drawn::<T>(OP, x, sizes)?,
                false => self.weight.forward::<T>(OP, x, sizes)?,
            };
            Ok((T::to_cpu_storage_owned(y), Shape::from((sizes.0, sizes.2))))
        })
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let sizes = self.weight.sizes(x.dims())?;
        let dy = dy.contiguous()?;
        for_real!(x.dtype(), OP, T => {
            let dx = with_elements::<T, _>(&dy, OP, |dy| self.weight.backward_x(OP, dy, sizes))?;
            Ok(Some(tensor(dx, x.dims())?))
        })
    }
}

impl CustomOp2 for Linear {
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
        let sizes = sizes(x_layout.dims(), weight_layout.dims())?;
        for_real!(dtype(x), OP, T => {
            let y = forward::<T>(elements(x, x_layout, OP)?, elements(weight, weight_layout, OP)?, sizes);
            Ok((T::to_cpu_storage_owned(y), Shape::from((sizes.0, sizes.2))))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let sizes = sizes(x.dims(), weight.dims())?;
        let dy = dy.contiguous()?;
        for_real!(x.dtype(), OP, T => with_elements::<T, _>(&dy, OP, |dy| {
            let dx = x.track_op().then(|| with_elements::<T, _>(weight, OP, |w| {
                tensor(backward_x(dy, w, sizes), x.dims())
            }));
            let dw = with_elements::<T, _>(x, OP, |x| tensor(backward_w(dy, x, sizes), weight.dims()))?;
            Ok((dx.transpose()?, Some(dw)))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::{check, random};

    #[test]
    fn gradients_are_the_differences() {
        let (x, weight) = (random(&[5, 4], 9), random(&[3, 4], 10));
        check(&[&x, &weight], |args| linear(&args[0], &args[1]));
        let frozen = Frozen::Dense(weight.as_tensor().clone());
        check(&[&x], |args| frozen_linear(&args[0], &frozen));
    }

    #[test]
    fn a_frozen_weight_gets_no_gradient() {
        let (x, weight) = (random(&[5, 4], 9), random(&[3, 4], 10));
        let y = frozen_linear(&x, &Frozen::Dense(weight.as_tensor().clone())).unwrap();
        assert!(y.sum_all().unwrap().backward().unwrap().get(&weight).is_none());
    }
}
