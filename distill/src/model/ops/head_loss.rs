//! Output layer and a loss over its logits in one operation, a chunk of rows at a time: the logits of all rows never
//! exist together, nor do their gradients. Only rows with a label are computed.
//!
//! The gradients are computed in the forward pass, while a chunk's logits are at hand (as in Liger Kernel,
//! <https://arxiv.org/abs/2410.10989>), and scaled in the backward pass.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Device, Layout, Result, Shape, Tensor};

use super::composed;
use super::frozen::Frozen;
use super::gemm::{Mat, Threads, gemm};
use super::real::{Real, dtype, elements, for_real, tensor};

/// The rows that are predicted from, with what should follow each.
#[derive(Debug, Clone)]
pub struct Targets {
    /// (row of the hidden states, the token that follows it), by row.
    pub rows: Vec<(usize, u32)>,
    /// How many rows are computed at a time, at least 1.
    pub chunk: usize,
}

/// A loss over the logits of chosen rows.
pub(crate) trait Criterion: Send + Sync + 'static {
    /// The operation's name.
    const NAME: &'static str;

    /// The rows.
    fn targets(&self) -> &Targets;

    /// The loss of some rows, a sum, and in place of their logits, `[rows, vocabulary]`, its gradient. `first` is the
    /// place of the first of them among the targets.
    fn compute<T: Real>(&self, first: usize, logits: &mut [T], vocabulary: usize) -> Result<f64>;

    /// The same of logits in f32 on a device, `[rows, vocabulary]`: the loss, a scalar there, and its gradient, which may
    /// be left out where none is needed.
    fn compute_there(
        &self,
        first: usize,
        logits: &Tensor,
        with_gradient: bool,
    ) -> Result<(Tensor, Option<Tensor>)>;
}

/// A loss that is not known on devices: the logits come to the CPU, and their gradient goes back.
pub(super) fn compute_here<C: Criterion>(
    criterion: &C,
    first: usize,
    logits: &Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
    let (_, vocabulary) = logits.dims2()?;
    for_real!(logits.dtype(), C::NAME, T => {
        let mut numbers = logits.flatten_all()?.to_vec1::<T>()?;
        let loss = criterion.compute(first, &mut numbers, vocabulary)?;
        let gradient = Tensor::from_vec(numbers, logits.dims(), logits.device())?;
        Ok((Tensor::new(T::of(loss), logits.device())?, Some(gradient)))
    })
}

impl Targets {
    /// The chunks, each with the place of its first target.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (usize, &[(usize, u32)])> {
        let chunk = self.chunk.max(1);
        let chunks = self.rows.chunks(chunk).enumerate();
        chunks.map(move |(i, rows)| (i * chunk, rows))
    }

    /// The tokens of some targets, `[count, 1]` on a device.
    pub(super) fn labels(&self, first: usize, count: usize, device: &Device) -> Result<Tensor> {
        let tokens = self.rows[first..first + count].iter().map(|(_, token)| *token);
        Tensor::from_iter(tokens, device)?.unsqueeze(1)
    }

    /// Refuses targets that leave the hidden states or the vocabulary.
    pub(super) fn check(&self, name: &str, rows: usize, vocabulary: usize) -> Result<()> {
        for (row, token) in &self.rows {
            if *row >= rows || *token as usize >= vocabulary {
                candle_core::bail!("{name}: row {row} of {rows}, token {token} of {vocabulary}");
            }
        }
        Ok(())
    }
}

struct Kept {
    d_hidden: Tensor,
    d_weight: Option<Tensor>,
}

struct HeadLoss<C> {
    criterion: C,
    /// The output layer's weight.
    weight: Frozen,
    /// Whether it is trained.
    with_dw: bool,
    with_gradient: bool,
    kept: Mutex<Option<Kept>>,
}

/// The loss of hidden·Wᵀ, a scalar. hidden `[rows, d]`, weight `[vocabulary, d]`, which gets a gradient too.
pub(super) fn head_loss<C: Criterion>(hidden: &Tensor, weight: &Tensor, criterion: C) -> Result<Tensor> {
    if composed::is_for(hidden) {
        return composed::head_loss(hidden, weight, &criterion);
    }
    let op = HeadLoss {
        criterion,
        weight: Frozen::Dense(weight.detach()),
        with_dw: true,
        with_gradient: true,
        kept: Mutex::new(None),
    };
    hidden.apply_op2(weight, op)
}

/// The same with a weight that gets no gradient.
pub(super) fn frozen_head_loss<C: Criterion>(
    hidden: &Tensor,
    weight: &Frozen,
    criterion: C,
) -> Result<Tensor> {
    if composed::is_for(hidden) {
        return composed::frozen_head_loss(hidden, weight, &criterion);
    }
    let op = HeadLoss {
        criterion,
        weight: weight.clone(),
        with_dw: false,
        with_gradient: hidden.track_op(),
        kept: Mutex::new(None),
    };
    hidden.apply_op1(op)
}

struct Sums<T> {
    loss: f64,
    d_hidden: Option<Vec<T>>,
    d_weight: Option<Vec<T>>,
}

impl<C: Criterion> HeadLoss<C> {
    /// The loss, and the gradients by hidden and, where it is trained, by the weight.
    fn compute<T: Real>(
        &self,
        hidden: &[T],
        (rows, d, vocabulary): (usize, usize, usize),
    ) -> Result<Sums<T>> {
        let mut sums = Sums {
            loss: 0.0,
            d_hidden: self.with_gradient.then(|| vec![T::zero(); rows * d]),
            d_weight: self.with_dw.then(|| vec![T::zero(); vocabulary * d]),
        };
        for (first, chunk) in self.criterion.targets().chunks() {
            let sizes = (chunk.len(), d, vocabulary);
            let mut x = Vec::with_capacity(chunk.len() * d);
            for (row, _) in chunk {
                x.extend_from_slice(&hidden[row * d..][..d]);
            }
            let mut logits = self.weight.forward(C::NAME, &x, sizes)?;
            sums.loss += self.criterion.compute(first, &mut logits, vocabulary)?;
            if let Some(d_hidden) = &mut sums.d_hidden {
                let dx = self.weight.backward_x(C::NAME, &logits, sizes)?;
                for ((row, _), dx) in chunk.iter().zip(dx.chunks_exact(d)) {
                    d_hidden[row * d..][..d].copy_from_slice(dx);
                }
            }
            if let Some(d_weight) = &mut sums.d_weight {
                let d_logits = Mat::new(&logits, chunk.len(), vocabulary);
                gemm(
                    d_weight,
                    d,
                    1.0,
                    1.0,
                    d_logits.t(),
                    Mat::new(&x, chunk.len(), d),
                    Threads::All,
                );
            }
        }
        Ok(sums)
    }

    fn run<T: Real>(&self, hidden: &[T], hidden_dims: &[usize]) -> Result<(CpuStorage, Shape)> {
        let sizes = self.weight.sizes(hidden_dims)?;
        self.criterion.targets().check(C::NAME, sizes.0, sizes.2)?;
        let sums = self.compute(hidden, sizes)?;
        if let Some(d_hidden) = sums.d_hidden {
            let kept = Kept {
                d_hidden: tensor(d_hidden, hidden_dims)?,
                d_weight: sums
                    .d_weight
                    .map(|dw| tensor(dw, &[sizes.2, sizes.1]))
                    .transpose()?,
            };
            *self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(kept);
        }
        Ok((T::to_cpu_storage_owned(vec![T::of(sums.loss)]), Shape::from(())))
    }

    fn scaled(&self, grad: &Tensor) -> Result<Kept> {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .take();
        let Some(kept) = kept else {
            candle_core::bail!("{}: backward twice, or before forward", C::NAME)
        };
        let grad = grad.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?;
        let scale = |t: Tensor| if grad == 1.0 { Ok(t) } else { t.affine(grad, 0.0) };
        Ok(Kept {
            d_hidden: scale(kept.d_hidden)?,
            d_weight: kept.d_weight.map(scale).transpose()?,
        })
    }
}

impl<C: Criterion> CustomOp1 for HeadLoss<C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        for_real!(dtype(hidden), C::NAME, T => self.run::<T>(elements(hidden, layout, C::NAME)?, layout.dims()))
    }

    fn bwd(&self, _hidden: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.scaled(grad)?.d_hidden))
    }
}

impl<C: Criterion> CustomOp2 for HeadLoss<C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        layout: &Layout,
        _weight: &CpuStorage,
        _weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        for_real!(dtype(hidden), C::NAME, T => self.run::<T>(elements(hidden, layout, C::NAME)?, layout.dims()))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        _weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let kept = self.scaled(grad)?;
        Ok((hidden.track_op().then_some(kept.d_hidden), kept.d_weight))
    }
}
