//! The operations for devices other than the CPU and for numbers of 16 bits, composed of candle's own differentiable
//! primitives (never of its fused ones, which cut the gradient). They run on the CPU too, where the tests hold them
//! against the kernels.
//!
//! The numbers have the type of the hidden states; what is trained is f32 and is brought to that type where it is used,
//! so that its gradient is f32 again. Norms, rotations, exponentials and losses are computed in f32 all the same.

mod attention;
mod given;
mod loss;

pub(super) use attention::attention;
use candle_core::{D, DType, Device, Result, Tensor};
use given::{given, recomputed};
pub(super) use loss::{frozen_head_loss, head_loss, lora_head_loss};

use super::{Dropout, Frozen, Rotation};

#[cfg(test)]
thread_local! {
    static FORCED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Whether operations on x are these, and not the CPU's kernels.
pub(crate) fn is_for(x: &Tensor) -> bool {
    #[cfg(test)]
    if FORCED.get() {
        return true;
    }
    !x.device().is_cpu() || matches!(x.dtype(), DType::BF16 | DType::F16)
}

/// Sends the CPU through these operations too, while `work` runs on this thread.
#[cfg(test)]
pub(crate) fn forced<T>(work: impl FnOnce() -> T) -> T {
    FORCED.set(true);
    let done = work();
    FORCED.set(false);
    done
}

/// The sum of all elements, row by row: candle gives a sum of a whole tensor to one block of a GPU.
pub(crate) fn sum_of_rows(x: &Tensor) -> Result<Tensor> {
    match x.rank() {
        0 | 1 => x.sum_all(),
        _ => x.sum(D::Minus1)?.sum_all(),
    }
}

/// f32, or f64 where the numbers are f64 (in gradient checks).
fn wide(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F64 => Ok(x.clone()),
        _ => x.to_dtype(DType::F32),
    }
}

/// Rows of x in another order, some of them several times; none is zeros. `[rows, width]` → `[there.len(), width]`.
fn rows_at(x: &Tensor, there: &[Option<usize>]) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let index = there.iter().map(|row| row.unwrap_or(rows) as u32);
    let index = Tensor::from_iter(index, x.device())?;
    if there.iter().all(Option::is_some) {
        return x.index_select(&index, 0);
    }
    let zeros = Tensor::zeros((1, width), x.dtype(), x.device())?;
    Tensor::cat(&[x, &zeros], 0)?.index_select(&index, 0)
}

/// [`rows_at`] with a gradient, whose rows come from those of the result that `back` says: candle's own adds up row by row,
/// which GPUs are slow at. Other rows of the result must get no gradient.
fn moved(name: &'static str, x: &Tensor, there: &[Option<usize>], back: &[Option<usize>]) -> Result<Tensor> {
    let back = back.to_vec();
    given(name, &[x], rows_at(&x.detach(), there)?, move |_, grad| {
        Ok(vec![Some(rows_at(&grad.contiguous()?, &back)?)])
    })
}

/// [`super::rms_norm`], with the factor `offset` + weight.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, offset: f64) -> Result<Tensor> {
    recomputed("rms_norm", [x, weight], move |[x, weight]| {
        let wide_x = wide(x)?;
        let scale = (wide_x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
        let factor = (wide(weight)? + offset)?;
        wide_x
            .broadcast_mul(&scale)?
            .broadcast_mul(&factor)?
            .to_dtype(x.dtype())
    })
}

/// [`super::swiglu`].
pub(super) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    recomputed("swiglu", [gate, up], |[gate, up]| {
        (wide(gate)?.silu()? * wide(up)?)?.to_dtype(gate.dtype())
    })
}

/// [`super::geglu`].
pub(super) fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    recomputed("geglu", [gate, up], |[gate, up]| {
        let wide_gate = wide(gate)?;
        // Not candle's `gelu`, whose gradient has constants of six digits.
        let cubic = wide_gate.sqr()?.affine(0.044_715, 1.0)?;
        let tanh = (&wide_gate * cubic)?
            .affine((2.0 / std::f64::consts::PI).sqrt(), 0.0)?
            .tanh()?;
        let gelu = (wide_gate * tanh.affine(0.5, 0.5)?)?;
        (gelu * wide(up)?)?.to_dtype(gate.dtype())
    })
}

/// [`super::embedding`].
pub(super) fn embedding(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    table.index_select(&Tensor::new(ids, table.device())?, 0)
}

/// [`super::rope`].
pub(super) fn rope(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    let rotation = rotation.clone();
    recomputed("rope", [x], move |[x]| {
        let (rows, width) = x.dims2()?;
        let d = rotation.head_dim();
        let heads = wide(x)?.reshape((rows, width / d, d))?;
        let [cos, sin] = rotation.on(x.device(), heads.dtype())?;
        let (one, two) = (heads.narrow(2, 0, d / 2)?, heads.narrow(2, d / 2, d / 2)?);
        let first = (one.broadcast_mul(&cos)? - two.broadcast_mul(&sin)?)?;
        let second = (two.broadcast_mul(&cos)? + one.broadcast_mul(&sin)?)?;
        Tensor::cat(&[first, second], 2)?
            .reshape((rows, width))?
            .to_dtype(x.dtype())
    })
}

/// [`super::frozen_linear`]: candle's own product would compute and keep the gradient of the weight.
pub(super) fn frozen_linear(x: &Tensor, weight: &Frozen) -> Result<Tensor> {
    let result = x.detach().matmul(&weight.on(x.device(), x.dtype())?.t()?)?;
    let weight = weight.clone();
    given("linear", &[x], result, move |args, dy| {
        let weight = weight.on(args[0].device(), args[0].dtype())?;
        Ok(vec![Some(dy.matmul(&weight)?)])
    })
}

/// [`super::linear`].
pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.to_dtype(x.dtype())?.t()?)
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
    // Candle's graph would keep the parts of the sum too.
    let adapter = move |x: &Tensor, a: &Tensor, b: &Tensor| -> Result<Adapter> {
        let mask = dropout.map(|dropout| dropout.mask(x)).transpose()?;
        let (a, b) = (a.detach().to_dtype(x.dtype())?, b.detach().to_dtype(x.dtype())?);
        let dropped = mask
            .as_ref()
            .map_or_else(|| Ok(x.detach()), |mask| x.detach() * mask)?;
        let down = dropped.matmul(&a.t()?)?;
        Ok(Adapter {
            mask,
            dropped,
            a,
            b,
            down,
        })
    };
    let Adapter { down, b, .. } = adapter(x, lora_a, lora_b)?;
    let base = x.detach().matmul(&weight.on(x.device(), x.dtype())?.t()?)?;
    let result = (base + down.matmul(&b.t()?)?.affine(scale, 0.0)?)?;
    let weight = weight.clone();
    given("lora_linear", &[x, lora_a, lora_b], result, move |args, dy| {
        let [x, lora_a, lora_b] = args else {
            candle_core::bail!("lora_linear: {} arguments", args.len())
        };
        let Adapter {
            mask,
            dropped,
            a,
            b,
            down,
        } = adapter(x, lora_a, lora_b)?;
        let d_down = dy.matmul(&b)?.affine(scale, 0.0)?;
        let da = d_down.t()?.matmul(&dropped)?.to_dtype(lora_a.dtype())?;
        let db = dy
            .t()?
            .matmul(&down)?
            .affine(scale, 0.0)?
            .to_dtype(lora_b.dtype())?;
        if !x.track_op() {
            return Ok(vec![None, Some(da), Some(db)]);
        }
        let through = d_down.matmul(&a)?;
        let through = mask.map_or_else(|| Ok(through.clone()), |mask| &through * mask)?;
        let dx = (dy.matmul(&weight.on(x.device(), x.dtype())?)? + through)?;
        Ok(vec![Some(dx), Some(da), Some(db)])
    })
}

/// What a low-rank adapter computes on the way, without a graph.
struct Adapter {
    /// The dropout's factors.
    mask: Option<Tensor>,
    /// Its input, `[rows, in]`.
    dropped: Tensor,
    /// In the type of the input.
    a: Tensor,
    b: Tensor,
    /// `[rows, r]`.
    down: Tensor,
}

impl Frozen {
    /// The whole matrix on a device, in a type. What is there already in this type is not copied.
    pub(super) fn on(&self, device: &Device, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => tensor.detach().to_dtype(dtype),
            Self::Quantized(rows) => rows.on(device, dtype),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::model::ops::gradcheck::random;
    use crate::model::ops::{self, Heads, RopeTable, Targets};

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
            || rms_norm(&x, &w, 1e-5, 0.0),
        );
        same(
            &[&x, &w],
            || ops::rms_norm_plus_one(&x, &w, 1e-5),
            || rms_norm(&x, &w, 1e-5, 1.0),
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
        for dropout in [None, Some(Dropout { chance: 0.5, seed: 3 })] {
            same(
                &[&x, &a, &b],
                || ops::lora_linear(&x, &frozen, &a, &b, 1.7, dropout),
                || lora_linear(&x, &frozen, &a, &b, 1.7, dropout),
            );
        }
    }

    fn targets(chunk: usize) -> Targets {
        Targets {
            rows: vec![(0, 3), (2, 0), (3, 6), (5, 3)],
            chunk,
        }
    }

    #[test]
    fn the_loss_is_the_kernel() {
        let (hidden, w) = (random(&[6, 4], 16), random(&[7, 4], 17));
        let frozen = Frozen::Dense(w.as_detached_tensor());
        same(
            &[&hidden, &w],
            || ops::cross_entropy(&hidden, &w, targets(3)),
            || head_loss(&hidden, &w, &targets(3)),
        );
        same(
            &[&hidden],
            || ops::frozen_cross_entropy(&hidden, &frozen, targets(3)),
            || frozen_head_loss(&hidden, &frozen, &targets(3)),
        );
    }

    #[test]
    fn the_loss_under_an_adapter_is_the_kernel() {
        let (hidden, w) = (random(&[6, 4], 60), random(&[7, 4], 61));
        let (down, b, factors) = (random(&[6, 2], 62), random(&[7, 2], 63), random(&[7], 64));
        let frozen = Frozen::Dense(w.as_detached_tensor());
        for chunk in [1, 3, 8] {
            for factors in [None, Some(&factors)] {
                let vars: Vec<&Var> = [&hidden, &down, &b].into_iter().chain(factors).collect();
                let adapter = ops::HeadAdapter {
                    down: &down,
                    b: &b,
                    factors: factors.map(Var::as_tensor),
                };
                same(
                    &vars,
                    || ops::lora_cross_entropy(&hidden, &frozen, adapter, targets(chunk)),
                    || lora_head_loss(&hidden, &frozen, adapter, &targets(chunk)),
                );
            }
        }
    }
}
