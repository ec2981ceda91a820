//! Rotary position embedding in Hugging Face's layout (the two halves of a head are the pairs),
//! <https://arxiv.org/abs/2104.09864>. Its gradient is the inverse rotation.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::composed;
use super::real::{Real, dtype, elements, for_real, tensor, with_elements};

const OP: &str = "rope";

/// The angles of every position: cosine and sine, `[positions, head_dim / 2]` each.
#[derive(Debug)]
pub struct RopeTable {
    head_dim: usize,
    inv_freq: Vec<f32>,
}

impl RopeTable {
    /// From the inverse frequencies, one a pair.
    pub fn new(inv_freq: Vec<f32>) -> Self {
        Self {
            head_dim: inv_freq.len() * 2,
            inv_freq,
        }
    }

    /// Cosine and sine of one position's angles, rounded as Hugging Face rounds them: the angle in f32.
    fn angles(&self, position: u32) -> impl Iterator<Item = (f32, f32)> + '_ {
        self.inv_freq.iter().map(move |freq| {
            let angle = position as f32 * freq;
            (angle.cos(), angle.sin())
        })
    }
}

/// The positions of a batch's rows with their cosines and sines, made once and used by every layer.
#[derive(Debug, Clone)]
pub struct Rotation {
    head_dim: usize,
    /// `[rows, head_dim]`: a row's cosines, then its sines.
    cos_sin: Arc<[f32]>,
    /// The same on another device, made when it is first asked for.
    elsewhere: Arc<OnceLock<[Tensor; 2]>>,
}

impl Rotation {
    /// The width of one head.
    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Cosines and sines, `[rows, 1, head_dim / 2]` each, on a device.
    pub(super) fn on(&self, device: &Device, dtype: DType) -> Result<[Tensor; 2]> {
        if let Some(made) = self.elsewhere.get() {
            return Ok(made.clone());
        }
        let (rows, half) = (self.cos_sin.len() / self.head_dim, self.head_dim / 2);
        let both = Tensor::from_slice(&self.cos_sin, (rows, 2, half), device)?.to_dtype(dtype)?;
        let made = [
            both.narrow(1, 0, 1)?.contiguous()?,
            both.narrow(1, 1, 1)?.contiguous()?,
        ];
        Ok(self.elsewhere.get_or_init(|| made).clone())
    }

    /// For rows that stand at these positions.
    pub fn new(table: &RopeTable, positions: &[u32]) -> Self {
        let half = table.head_dim / 2;
        let mut cos_sin = vec![0.0; positions.len() * table.head_dim];
        for (row, position) in cos_sin.chunks_exact_mut(table.head_dim).zip(positions) {
            for (i, (cos, sin)) in table.angles(*position).enumerate() {
                (row[i], row[half + i]) = (cos, sin);
            }
        }
        Self {
            head_dim: table.head_dim,
            cos_sin: cos_sin.into(),
            elsewhere: Arc::default(),
        }
    }
}

struct Rope(Rotation);

/// x `[rows, heads · head_dim]` → the same, every head of row i turned by the angles of row i's position.
pub fn rope(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::rope(x, rotation);
    }
    x.apply_op1(Rope(rotation.clone()))
}

fn turn<T: Real>(x: &[T], width: usize, rotation: &Rotation, sign: f64) -> Vec<T> {
    let (head_dim, half) = (rotation.head_dim, rotation.head_dim / 2);
    let sign = T::of(sign);
    let mut out = vec![T::zero(); x.len()];
    out.par_chunks_mut(width)
        .zip(x.par_chunks(width))
        .zip(rotation.cos_sin.par_chunks(head_dim))
        .for_each(|((out, x), cos_sin)| {
            let (cos, sin) = cos_sin.split_at(half);
            for (out, x) in out.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim)) {
                let (out_1, out_2) = out.split_at_mut(half);
                let (x_1, x_2) = x.split_at(half);
                for i in 0..half {
                    let (cos, sin) = (T::of(f64::from(cos[i])), T::of(f64::from(sin[i])) * sign);
                    out_1[i] = x_1[i] * cos - x_2[i] * sin;
                    out_2[i] = x_2[i] * cos + x_1[i] * sin;
                }
            }
        });
    out
}

impl Rope {
    fn width(&self, dims: &[usize]) -> Result<usize> {
        let rows = self.0.cos_sin.len() / self.0.head_dim;
        match dims {
            [n, width] if *n == rows && width % self.0.head_dim == 0 => Ok(*width),
            _ => candle_core::bail!("{OP}: x has shape {dims:?}, but there are {rows} positions"),
        }
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = self.width(layout.dims())?;
        for_real!(dtype(x), OP, T => {
            let out = turn::<T>(elements(x, layout, OP)?, width, &self.0, 1.0);
            Ok((T::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let width = self.width(x.dims())?;
        let dy = dy.contiguous()?;
        for_real!(x.dtype(), OP, T => {
            let dx = with_elements::<T, _>(&dy, OP, |dy| Ok(turn(dy, width, &self.0, -1.0)))?;
            Ok(Some(tensor(dx, x.dims())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradcheck::{check, random};

    #[test]
    fn gradients_are_the_differences() {
        let table = RopeTable::new(vec![1.0, 0.3, 0.01]);
        let rotation = Rotation::new(&table, &[0, 5, 2, 100]);
        let x = random(&[4, 12], 3);
        check(&[&x], |args| rope(&args[0], &rotation));
    }
}
