//! SwiGLU's product with a gradient: silu(gate) · up, <https://arxiv.org/abs/2002.05202>.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::composed;
use super::real::{Real, dtype, elements, for_real, tensor, with_elements};

const OP: &str = "swiglu";
const CHUNK: usize = 4096;

struct SwiGlu;

/// gate and up of one shape → silu(gate) · up.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if !gate.device().is_cpu() {
        return composed::swiglu(gate, up);
    }
    gate.apply_op2(up, SwiGlu)
}

fn forward<T: Real>(gate: &[T], up: &[T]) -> Vec<T> {
    let mut out = vec![T::zero(); gate.len()];
    out.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks(CHUNK))
        .zip(up.par_chunks(CHUNK))
        .for_each(|((out, gate), up)| {
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = *gate * gate.sigmoid() * *up;
            }
        });
    out
}

/// d silu(g)/dg = σ(g)·(1 + g·(1 − σ(g))).
fn backward<T: Real>(gate: &[T], up: &[T], dy: &[T]) -> (Vec<T>, Vec<T>) {
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
                let sigmoid = gate.sigmoid();
                *d_up = *dy * *gate * sigmoid;
                *d_gate = *dy * *up * sigmoid * (T::one() + *gate * (T::one() - sigmoid));
            }
        });
    (d_gate, d_up)
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if gate_layout.dims() != up_layout.dims() {
            candle_core::bail!(
                "{OP}: gate {:?} and up {:?}",
                gate_layout.dims(),
                up_layout.dims()
            );
        }
        for_real!(dtype(gate), OP, T => {
            let out = forward::<T>(elements(gate, gate_layout, OP)?, elements(up, up_layout, OP)?);
            Ok((T::to_cpu_storage_owned(out), gate_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        for_real!(gate.dtype(), OP, T => {
            let (d_gate, d_up) = with_elements::<T, _>(gate, OP, |gate| with_elements::<T, _>(up, OP, |up| {
                with_elements::<T, _>(&dy, OP, |dy| Ok(backward(gate, up, dy)))
            }))?;
            Ok((Some(tensor(d_gate, gate.dims())?), Some(tensor(d_up, up.dims())?)))
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::model::ops::gradcheck::{check, random};

    #[test]
    fn gradients_are_the_differences() {
        let (gate, up) = (random(&[3, 7], 4), random(&[3, 7], 5));
        check(&[&gate, &up], |args| super::swiglu(&args[0], &args[1]));
    }
}
