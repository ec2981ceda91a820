//! The operations for devices other than the CPU, composed of candle's own differentiable primitives (never of its
//! fused ones, which cut the gradient). They run on the CPU too, where the tests hold them against the kernels.
//!
//! Norms, exponentials and losses are computed in f32, whatever the type of the numbers.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage as _;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, D, DType, Device, Layout, MetalStorage, Result, Shape,
    Storage, Tensor,
};

use super::{Dropout, Frozen, Heads, Rotation, Targets};

/// An operation whose result is known already and whose gradients are functions of the result's.
struct Given<F> {
    name: &'static str,
    result: Tensor,
    backward: F,
}

impl<F> Given<F> {
    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, self.result.shape().clone())),
            _ => candle_core::bail!("{}: the result is on another device", self.name),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, self.result.shape().clone())),
            _ => candle_core::bail!("{}: the result is on another device", self.name),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        match &*storage {
            Storage::Metal(storage) => Ok((storage.try_clone(layout)?, self.result.shape().clone())),
            _ => candle_core::bail!("{}: the result is on another device", self.name),
        }
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> CustomOp1 for Given<F> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        (self.backward)(grad).map(Some)
    }
}

impl<F: Fn(&Tensor) -> Result<[Tensor; 2]>> CustomOp2 for Given<F> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [first, second] = (self.backward)(grad)?;
        Ok((Some(first), Some(second)))
    }
}

/// [`super::rms_norm`].
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = wide(x)?;
    let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    wide.broadcast_mul(&scale)?
        .to_dtype(x.dtype())?
        .broadcast_mul(weight)
}

/// f32, or f64 where the numbers are f64 (in gradient checks).
fn wide(x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F64 {
        Ok(x.clone())
    } else {
        x.to_dtype(DType::F32)
    }
}

/// [`super::swiglu`].
pub(super) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

/// [`super::geglu`].
pub(super) fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    // Not candle's `gelu`, whose gradient has constants of six digits.
    let cubic = gate.sqr()?.affine(0.044_715, 1.0)?;
    let tanh = (gate * cubic)?
        .affine((2.0 / std::f64::consts::PI).sqrt(), 0.0)?
        .tanh()?;
    (gate * tanh.affine(0.5, 0.5)?)? * up
}

/// [`super::embedding`].
pub(super) fn embedding(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    table.index_select(&Tensor::new(ids, table.device())?, 0)
}

/// [`super::rope`].
pub(super) fn rope(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let d = rotation.head_dim();
    let [cos, sin] = rotation.on(x.device(), x.dtype())?;
    let x = x.reshape((rows, width / d, d))?;
    let (one, two) = (x.narrow(2, 0, d / 2)?, x.narrow(2, d / 2, d / 2)?);
    let first = (one.broadcast_mul(&cos)? - two.broadcast_mul(&sin)?)?;
    let second = (two.broadcast_mul(&cos)? + one.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 2)?.reshape((rows, width))
}

/// [`super::attention`]: the sequences are padded to the longest, for this operation only.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    starts: &[usize],
    key_starts: &[usize],
) -> Result<Tensor> {
    let device = q.device();
    let lengths = |starts: &[usize]| starts.windows(2).map(|w| w[1] - w[0]).collect::<Vec<_>>();
    let (queries, keys) = (lengths(starts), lengths(key_starts));
    let sequences = queries.len();
    let longest = |lengths: &[usize]| lengths.iter().copied().max().unwrap_or(0);
    let (nq, nk, d, group) = (
        longest(&queries),
        longest(&keys),
        heads.head_dim,
        heads.heads / heads.kv_heads,
    );
    // Rows beyond a sequence's end repeat its last one, so that nothing is ever undefined.
    let padded = |x: &Tensor, starts: &[usize], lengths: &[usize], longest: usize, heads: usize| {
        let rows: Vec<u32> = starts
            .iter()
            .zip(lengths)
            .flat_map(|(start, length)| (0..longest).map(move |i| (start + i.min(length - 1)) as u32))
            .collect();
        let rows = Tensor::from_vec(rows, sequences * longest, device)?;
        x.index_select(&rows, 0)?
            .reshape((sequences, longest, heads, d))?
            .transpose(1, 2)?
            .contiguous()
    };
    let q =
        padded(q, starts, &queries, nq, heads.heads)?.reshape((sequences * heads.kv_heads, group * nq, d))?;
    let k = padded(k, key_starts, &keys, nk, heads.kv_heads)?.reshape((sequences * heads.kv_heads, nk, d))?;
    let v = padded(v, key_starts, &keys, nk, heads.kv_heads)?.reshape((sequences * heads.kv_heads, nk, d))?;
    let scores = wide(&q.matmul(&k.t()?)?)?.affine(heads.scale, 0.0)?;
    let scores = scores.reshape((sequences, heads.heads, nq, nk))?;
    let positions: Vec<i64> = queries
        .iter()
        .zip(&keys)
        .flat_map(|(queries, keys)| (0..nq).map(move |i| (keys - queries + i.min(queries - 1)) as i64))
        .collect();
    let at_query = Tensor::from_vec(positions, (sequences, 1, nq, 1), device)?;
    let at_key = Tensor::arange(0, nk as i64, device)?.reshape((1, 1, 1, nk))?;
    let mut seen = at_query.broadcast_ge(&at_key)?;
    if let Some(window) = heads.window {
        let within = at_query.broadcast_sub(&at_key)?.lt(window as i64)?;
        seen = (seen * within)?;
    }
    let seen = seen.broadcast_as(scores.shape())?;
    let hidden = Tensor::new(f32::NEG_INFINITY, device)?
        .to_dtype(scores.dtype())?
        .broadcast_as(scores.shape())?;
    let scores = seen.where_cond(&scores, &hidden)?;
    let exp = scores
        .broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?
        .exp()?;
    let probabilities = exp
        .broadcast_div(&exp.sum_keepdim(D::Minus1)?)?
        .to_dtype(v.dtype())?;
    let out = probabilities
        .reshape((sequences * heads.kv_heads, group * nq, nk))?
        .matmul(&v)?;
    let out = out
        .reshape((sequences, heads.heads, nq, d))?
        .transpose(1, 2)?
        .reshape((sequences * nq, heads.q_width()))?;
    let real: Vec<u32> = queries
        .iter()
        .enumerate()
        .flat_map(|(s, length)| (0..*length).map(move |i| (s * nq + i) as u32))
        .collect();
    out.index_select(&Tensor::new(real, device)?, 0)
}

/// [`super::frozen_linear`]: candle's own product would compute and keep the gradient of the weight.
pub(super) fn frozen_linear(x: &Tensor, weight: &Frozen) -> Result<Tensor> {
    let result = x.detach().matmul(&weight.on(x.device(), x.dtype())?.t()?)?;
    let (weight, device, dtype) = (weight.clone(), x.device().clone(), x.dtype());
    let backward = move |dy: &Tensor| dy.matmul(&weight.on(&device, dtype)?);
    x.apply_op1(Given {
        name: "linear",
        result,
        backward,
    })
}

/// [`super::linear`].
pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

/// [`super::lora_linear`].
pub(super) fn lora_linear(
    x: &Tensor,
    weight: &Frozen,
    lora_a: &Tensor,
    lora_b: &Tensor,
    scale: f64,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let dropped = match dropout {
        Some(dropout) => {
            let factors: Vec<f64> = (0..x.elem_count()).map(|i| dropout.factor(i)).collect();
            // Converted before the move: not every device knows f64.
            let factors = Tensor::from_vec(factors, x.shape(), &Device::Cpu)?.to_dtype(x.dtype())?;
            x.mul(&factors.to_device(x.device())?)?
        }
        None => x.clone(),
    };
    let added = dropped
        .matmul(&lora_a.t()?)?
        .matmul(&lora_b.t()?)?
        .affine(scale, 0.0)?;
    frozen_linear(x, weight)? + added
}

/// The loss and its gradients by hidden and, where it is trained, by the weight, a chunk of rows at a time.
struct Sums {
    loss: Tensor,
    d_hidden: Tensor,
    d_weight: Option<Tensor>,
}

fn sums(hidden: &Tensor, weight: &Tensor, targets: &Targets, with_dw: bool) -> Result<Sums> {
    let device = hidden.device();
    let hidden = hidden.detach();
    let zero = Tensor::zeros((), wide(&hidden)?.dtype(), device)?;
    let mut sums = Sums {
        loss: zero,
        d_hidden: hidden.zeros_like()?,
        d_weight: with_dw.then(|| weight.zeros_like()).transpose()?,
    };
    for chunk in targets.rows.chunks(targets.chunk.max(1)) {
        let rows = Tensor::new(
            chunk.iter().map(|(row, _)| *row as u32).collect::<Vec<_>>(),
            device,
        )?;
        let tokens =
            Tensor::new(chunk.iter().map(|(_, token)| *token).collect::<Vec<_>>(), device)?.unsqueeze(1)?;
        let x = hidden.index_select(&rows, 0)?;
        let logits = wide(&x.matmul(&weight.t()?)?)?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
        let exp = shifted.exp()?;
        let sum = exp.sum_keepdim(1)?;
        let losses = (sum.log()? - shifted.gather(&tokens, 1)?)?;
        sums.loss = (&sums.loss + losses.sum_all()?)?;
        let minus_one = Tensor::full(-1f32, tokens.shape(), device)?.to_dtype(exp.dtype())?;
        let d_logits = exp
            .broadcast_div(&sum)?
            .scatter_add(&tokens, &minus_one, 1)?
            .to_dtype(x.dtype())?;
        sums.d_hidden = sums.d_hidden.index_add(&rows, &d_logits.matmul(weight)?, 0)?;
        if let Some(d_weight) = &mut sums.d_weight {
            *d_weight = (&*d_weight + d_logits.t()?.matmul(&x)?)?;
        }
    }
    Ok(sums)
}

/// [`super::frozen_cross_entropy`].
pub(super) fn frozen_cross_entropy(hidden: &Tensor, weight: &Frozen, targets: &Targets) -> Result<Tensor> {
    let sums = sums(
        hidden,
        &weight.on(hidden.device(), hidden.dtype())?,
        targets,
        false,
    )?;
    let kept = Mutex::new(Some(sums.d_hidden));
    let backward = move |grad: &Tensor| scaled(&take(&kept)?, grad);
    hidden.apply_op1(Given {
        name: "cross_entropy",
        result: sums.loss,
        backward,
    })
}

/// [`super::cross_entropy`].
pub(super) fn cross_entropy(hidden: &Tensor, weight: &Tensor, targets: &Targets) -> Result<Tensor> {
    let sums = sums(hidden, &weight.detach(), targets, true)?;
    let kept = Mutex::new(Some((sums.d_hidden, sums.d_weight)));
    let backward = move |grad: &Tensor| match take(&kept)? {
        (d_hidden, Some(d_weight)) => Ok([scaled(&d_hidden, grad)?, scaled(&d_weight, grad)?]),
        _ => candle_core::bail!("cross_entropy: no gradient of the weight"),
    };
    hidden.apply_op2(
        weight,
        Given {
            name: "cross_entropy",
            result: sums.loss,
            backward,
        },
    )
}

/// What was kept for the backward pass, which is given away so that it does not stay in memory.
fn take<T>(kept: &Mutex<Option<T>>) -> Result<T> {
    match kept.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(kept) => Ok(kept),
        None => candle_core::bail!("cross_entropy: backward twice"),
    }
}

fn scaled(gradient: &Tensor, grad: &Tensor) -> Result<Tensor> {
    gradient.broadcast_mul(&grad.to_dtype(gradient.dtype())?)
}

impl Frozen {
    /// The whole matrix on a device.
    pub(super) fn on(&self, device: &Device, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => tensor.detach().to_dtype(dtype),
            Self::Quantized(rows) => {
                let [out, input] = rows.dims();
                let mut numbers = vec![0.0; out * input];
                rows.dequantize(0..out, &mut numbers);
                Tensor::from_vec(numbers, (out, input), device)?.to_dtype(dtype)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::model::ops::gradcheck::random;
    use crate::model::ops::{self, RopeTable};

    /// Values and gradients of both, for a loss that weighs every element otherwise.
    fn same(vars: &[&Var], ours: impl Fn() -> Result<Tensor>, composed: impl Fn() -> Result<Tensor>) {
        let run = |y: Tensor| {
            let weights = Tensor::arange(0, y.elem_count() as u32, y.device()).unwrap();
            let weights = weights
                .to_dtype(y.dtype())
                .unwrap()
                .affine(0.37, 0.1)
                .unwrap()
                .sin()
                .unwrap();
            let loss = y.flatten_all().unwrap().mul(&weights).unwrap().sum_all().unwrap();
            let grads = loss.backward().unwrap();
            let mut all = vec![y.flatten_all().unwrap().to_vec1::<f64>().unwrap()];
            for var in vars {
                all.push(
                    grads
                        .get(var)
                        .unwrap()
                        .flatten_all()
                        .unwrap()
                        .to_vec1::<f64>()
                        .unwrap(),
                );
            }
            all
        };
        for (ours, composed) in run(ours().unwrap()).iter().zip(run(composed().unwrap())) {
            assert_eq!(ours.len(), composed.len());
            for (a, b) in ours.iter().zip(composed) {
                assert!((a - b).abs() < 1e-9, "{a} and {b}");
            }
        }
    }

    #[test]
    fn norm_product_embedding_and_rope_are_the_kernels() {
        let (x, w, up) = (random(&[5, 12], 1), random(&[12], 2), random(&[5, 12], 3));
        same(
            &[&x, &w],
            || ops::rms_norm(&x, &w, 1e-5),
            || rms_norm(&x, &w, 1e-5),
        );
        same(&[&x, &up], || ops::swiglu(&x, &up), || swiglu(&x, &up));
        same(&[&x, &up], || ops::geglu(&x, &up), || geglu(&x, &up));
        let ids = [4u32, 1, 4, 0].into();
        same(&[&x], || ops::embedding(&x, &ids), || embedding(&x, &ids));
        let rotation = Rotation::new(&RopeTable::new(vec![1.0, 0.3, 0.05]), &[0, 1, 2, 0, 7]);
        same(&[&x], || ops::rope(&x, &rotation), || rope(&x, &rotation));
    }

    #[test]
    fn attention_is_the_kernel() {
        let (q, k, v) = (random(&[8, 24], 6), random(&[8, 12], 7), random(&[8, 12], 8));
        let starts = [0, 3, 8];
        for window in [None, Some(2)] {
            let heads = Heads {
                heads: 4,
                kv_heads: 2,
                head_dim: 6,
                scale: 0.4,
                window,
            };
            same(
                &[&q, &k, &v],
                || ops::attention(&q, &k, &v, heads, starts.into(), starts.into()),
                || attention(&q, &k, &v, heads, &starts, &starts),
            );
        }
    }

    #[test]
    fn linear_layers_are_the_kernels() {
        let (x, w) = (random(&[5, 6], 11), random(&[7, 6], 12));
        let (a, b) = (random(&[2, 6], 13), random(&[7, 2], 14));
        let frozen = Frozen::Dense(w.as_detached_tensor());
        same(&[&x, &w], || ops::linear(&x, &w), || linear(&x, &w));
        same(
            &[&x],
            || ops::frozen_linear(&x, &frozen),
            || frozen_linear(&x, &frozen),
        );
        for dropout in [None, Some(Dropout { chance: 0.4, seed: 3 })] {
            same(
                &[&x, &a, &b],
                || ops::lora_linear(&x, &frozen, &a, &b, 1.7, dropout),
                || lora_linear(&x, &frozen, &a, &b, 1.7, dropout),
            );
        }
    }

    #[test]
    fn the_loss_is_the_kernel() {
        let (hidden, w) = (random(&[6, 4], 16), random(&[7, 4], 17));
        let targets = Targets {
            rows: vec![(0, 3), (2, 0), (3, 6), (5, 3)],
            chunk: 3,
        };
        let frozen = Frozen::Dense(w.as_detached_tensor());
        same(
            &[&hidden, &w],
            || ops::cross_entropy(&hidden, &w, targets.clone()),
            || cross_entropy(&hidden, &w, &targets),
        );
        same(
            &[&hidden],
            || ops::frozen_cross_entropy(&hidden, &frozen, targets.clone()),
            || frozen_cross_entropy(&hidden, &frozen, &targets),
        );
    }
}
