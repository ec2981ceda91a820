//! Gated linear units with a gradient, activation(gate) · up: SwiGLU's and GeGLU's product,
//! <https://arxiv.org/abs/2002.05202>.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::composed;
use super::real::{Real, dtype, elements, for_real, tensor, with_elements};

const CHUNK: usize = 4096;

/// What the gate goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activation {
    /// x · σ(x).
    Silu,
    /// GELU by its tanh formula, x/2 · (1 + tanh(u)) with u = √(2/π) · (x + 0.044715·x³),
    /// <https://arxiv.org/abs/1606.08415>; torch's `gelu(approximate="tanh")`.
    GeluTanh,
}

const ROOT_2_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;

impl Activation {
    /// Every activation here is x · σ(z(x)): this is z and dz/dx. For GELU, (1 + tanh(u)) / 2 = σ(2u).
    #[inline(always)]
    fn argument<T: Real>(self, x: T) -> (T, T) {
        match self {
            Self::Silu => (x, T::one()),
            Self::GeluTanh => {
                let square = x * x;
                let z = T::of(2.0 * ROOT_2_PI) * x * (T::one() + T::of(CUBIC) * square);
                let slope = T::of(2.0 * ROOT_2_PI) * (T::one() + T::of(3.0 * CUBIC) * square);
                (z, slope)
            }
        }
    }

    #[inline(always)]
    fn value<T: Real>(self, x: T) -> T {
        x * self.argument(x).0.sigmoid()
    }

    /// The value, and its derivative σ(z)·(1 + x·z′·(1 − σ(z))).
    #[inline(always)]
    fn value_and_slope<T: Real>(self, x: T) -> (T, T) {
        let (z, slope) = self.argument(x);
        let sigmoid = z.sigmoid();
        (
            x * sigmoid,
            sigmoid * (T::one() + x * slope * (T::one() - sigmoid)),
        )
    }
}

struct Glu(Activation);

/// gate and up of one shape → silu(gate) · up.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if !gate.device().is_cpu() {
        return composed::swiglu(gate, up);
    }
    gate.apply_op2(up, Glu(Activation::Silu))
}

/// gate and up of one shape → gelu(gate) · up, with GELU's tanh formula (`gelu_pytorch_tanh`).
pub fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if !gate.device().is_cpu() {
        return composed::geglu(gate, up);
    }
    gate.apply_op2(up, Glu(Activation::GeluTanh))
}

fn forward<T: Real>(gate: &[T], up: &[T], activation: Activation) -> Vec<T> {
    let mut out = vec![T::zero(); gate.len()];
    out.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks(CHUNK))
        .zip(up.par_chunks(CHUNK))
        .for_each(|((out, gate), up)| {
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = activation.value(*gate) * *up;
            }
        });
    out
}

fn backward<T: Real>(gate: &[T], up: &[T], dy: &[T], activation: Activation) -> (Vec<T>, Vec<T>) {
    let (mut d_gate, mut d_up) = (vec![T::zero(); gate.len()], vec![T::zero(); gate.len()]);
    d_gate
        .par_chunks_mut(CHUNK)
        .zip(d_up.par_chunks_mut(CHUNK))
        .zip(
            gate.par_chunks(CHUNK)
                .zip(up.par_chunks(CHUNK))
                .zip(dy.par_chunks(CHUNK)),
        )
        .for_each(|((d_gate, d_up), ((gate, up), dy))| {
            for ((d_gate, d_up), ((gate, up), dy)) in
                d_gate.iter_mut().zip(d_up).zip(gate.iter().zip(up).zip(dy))
            {
                let (value, slope) = activation.value_and_slope(*gate);
                *d_up = *dy * value;
                *d_gate = *dy * *up * slope;
            }
        });
    (d_gate, d_up)
}

impl CustomOp2 for Glu {
    fn name(&self) -> &'static str {
        match self.0 {
            Activation::Silu => "swiglu",
            Activation::GeluTanh => "geglu",
        }
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let op = self.name();
        if gate_layout.dims() != up_layout.dims() {
            candle_core::bail!(
                "{op}: gate {:?} and up {:?}",
                gate_layout.dims(),
                up_layout.dims()
            );
        }
        for_real!(dtype(gate), op, T => {
            let (gate, up) = (elements::<T>(gate, gate_layout, op)?, elements(up, up_layout, op)?);
            Ok((T::to_cpu_storage_owned(forward(gate, up, self.0)), gate_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let op = self.name();
        let dy = dy.contiguous()?;
        for_real!(gate.dtype(), op, T => {
            let (d_gate, d_up) = with_elements::<T, _>(gate, op, |gate| with_elements::<T, _>(up, op, |up| {
                with_elements::<T, _>(&dy, op, |dy| Ok(backward(gate, up, dy, self.0)))
            }))?;
            Ok((Some(tensor(d_gate, gate.dims())?), Some(tensor(d_up, up.dims())?)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::{check, random};

    #[test]
    fn gradients_are_the_differences() {
        let (gate, up) = (random(&[3, 7], 4), random(&[3, 7], 5));
        check(&[&gate, &up], |args| swiglu(&args[0], &args[1]));
        check(&[&gate, &up], |args| geglu(&args[0], &args[1]));
        // Where the gate is nearly open or closed, too.
        let wide = candle_core::Var::from_tensor(&(gate.as_tensor() * 4.0).unwrap()).unwrap();
        check(&[&wide, &up], |args| geglu(&args[0], &args[1]));
    }

    #[test]
    fn gelu_is_its_formula() {
        for i in -60..=60 {
            let x = f64::from(i) / 8.0;
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            let expected = 0.5 * x * (1.0 + u.tanh());
            assert!((Activation::GeluTanh.value(x) - expected).abs() < 1e-14, "{x}");
            let single = f64::from(Activation::GeluTanh.value(x as f32));
            assert!((single - expected).abs() < 1e-6 * expected.abs().max(1.0), "{x}");
        }
    }
}
