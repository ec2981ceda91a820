//! Operations whose result is computed by other operations, outside of candle's graph: the graph keeps their arguments
//! and a function that makes the gradients, and nothing that was computed on the way.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage as _;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape, Storage,
    Tensor, Var,
};

/// The gradients by the arguments, from the arguments and the gradient of the result. None where none is needed.
pub(super) type Gradients = Vec<Option<Tensor>>;

struct Given<F> {
    name: &'static str,
    /// Given away in the forward pass.
    result: Mutex<Option<Tensor>>,
    backward: F,
}

/// A result that is known already, as an operation on one to three arguments.
pub(super) fn given<F>(name: &'static str, args: &[&Tensor], result: Tensor, backward: F) -> Result<Tensor>
where
    F: Fn(&[&Tensor], &Tensor) -> Result<Gradients> + Send + Sync + 'static,
{
    if !args.iter().any(|arg| arg.track_op()) {
        return Ok(result);
    }
    let result = Mutex::new(Some(result.contiguous()?));
    let op = Given {
        name,
        result,
        backward,
    };
    match args {
        [a] => a.apply_op1(op),
        [a, b] => a.apply_op2(b, op),
        [a, b, c] => a.apply_op3(b, c, op),
        _ => candle_core::bail!("{name}: {} arguments", args.len()),
    }
}

/// `f` of one to three arguments, which is computed again in the backward pass: nothing but the arguments is kept. What
/// else `f` takes up gets no gradient.
pub(super) fn recomputed<const N: usize, F>(name: &'static str, args: [&Tensor; N], f: F) -> Result<Tensor>
where
    F: Fn(&[Tensor; N]) -> Result<Tensor> + Send + Sync + 'static,
{
    let result = f(&args.map(Tensor::detach))?;
    given(name, &args, result, move |args, grad| {
        let mut vars = Vec::with_capacity(N);
        for arg in args {
            vars.push(match arg.track_op() {
                true => Var::from_tensor(&arg.detach())?.into_inner(),
                false => (*arg).clone(),
            });
        }
        let Ok(vars) = <[Tensor; N]>::try_from(vars) else {
            candle_core::bail!("{name}: not {N} arguments")
        };
        // The gradient of f·grad, whose own is one everywhere, is what the graph would have handed on. It is not added up:
        // candle gives the sum of a tensor to one block of the GPU.
        let mut store = (f(&vars)? * grad)?.backward()?;
        Ok(vars.iter().map(|var| store.remove(var)).collect())
    })
}

impl<F: Fn(&[&Tensor], &Tensor) -> Result<Gradients>> Given<F> {
    /// The result with what `of` makes of its storage, which must be no part of a larger one.
    fn take<T>(&self, of: impl FnOnce(&Storage, &Layout) -> Result<Option<T>>) -> Result<(T, Shape)> {
        let Some(result) = self.result.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            candle_core::bail!("{}: forward twice", self.name)
        };
        let (storage, layout) = result.storage_and_layout();
        match layout.contiguous_offsets() {
            Some((0, _)) => {}
            _ => candle_core::bail!("{}: the result is a part of a tensor", self.name),
        }
        match of(&storage, layout)? {
            Some(storage) => Ok((storage, result.shape().clone())),
            None => candle_core::bail!("{}: the result is on another device", self.name),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        self.take(|storage, layout| match storage {
            Storage::Cpu(storage) => storage.try_clone(layout).map(Some),
            _ => Ok(None),
        })
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        self.take(|storage, layout| match storage {
            Storage::Cuda(storage) => storage.try_clone(layout).map(Some),
            _ => Ok(None),
        })
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        self.take(|storage, layout| match storage {
            Storage::Metal(storage) => storage.try_clone(layout).map(Some),
            _ => Ok(None),
        })
    }

    fn gradients<const N: usize>(&self, args: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        match <[Option<Tensor>; N]>::try_from((self.backward)(&args, grad)?) {
            Ok(gradients) => Ok(gradients),
            Err(other) => candle_core::bail!("{}: {} gradients of {N}", self.name, other.len()),
        }
    }
}

impl<F: Fn(&[&Tensor], &Tensor) -> Result<Gradients>> CustomOp1 for Given<F> {
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
    fn bwd(&self, a: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [a] = self.gradients([a], grad)?;
        Ok(a)
    }
}

impl<F: Fn(&[&Tensor], &Tensor) -> Result<Gradients>> CustomOp2 for Given<F> {
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
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.gradients([a, b], grad)?;
        Ok((a, b))
    }
}

impl<F: Fn(&[&Tensor], &Tensor) -> Result<Gradients>> CustomOp3 for Given<F> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
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
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.gradients([a, b, c], grad)?;
        Ok((a, b, c))
    }
}
