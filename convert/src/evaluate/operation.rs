//! What an observer sees of an operation in llama.cpp's graph.

use std::borrow::Cow;
use std::marker::PhantomData;

use llama_cpp_sys_2 as sys;

/// An operation that is about to be computed, or has been.
#[derive(Debug, Clone, Copy)]
pub struct Operation<'a> {
    tensor: &'a sys::ggml_tensor,
}

/// What kind of operation it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A matrix product.
    Product,
    /// A matrix product in which each token chooses its matrices.
    ExpertProduct,
    /// Anything else.
    Other,
}

impl<'a> Operation<'a> {
    pub(super) fn new(tensor: &'a sys::ggml_tensor) -> Self {
        Self { tensor }
    }

    /// What it does.
    pub fn kind(&self) -> Kind {
        match self.tensor.op {
            sys::GGML_OP_MUL_MAT => Kind::Product,
            sys::GGML_OP_MUL_MAT_ID => Kind::ExpertProduct,
            _ => Kind::Other,
        }
    }

    /// The matrix and what it is multiplied with, of a product.
    pub fn operands(&self) -> Option<(Operand<'a>, Operand<'a>)> {
        if self.kind() == Kind::Other {
            return None;
        }
        #[expect(unsafe_code, reason = "ggml is C")]
        // SAFETY: the operands of an operation live as long as the graph that it belongs to; null gives None.
        let (matrix, input) = unsafe { (self.tensor.src[0].as_ref()?, self.tensor.src[1].as_ref()?) };
        Some((Operand::new(matrix), Operand::new(input)))
    }
}

/// A tensor that an operation reads.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    tensor: *const sys::ggml_tensor,
    ne: [i64; 4],
    nb: [usize; 4],
    phantom: PhantomData<&'a sys::ggml_tensor>,
}

impl<'a> Operand<'a> {
    fn new(tensor: &'a sys::ggml_tensor) -> Self {
        Self {
            tensor,
            ne: tensor.ne,
            nb: tensor.nb,
            phantom: PhantomData,
        }
    }

    fn tensor(&self) -> &'a sys::ggml_tensor {
        #[expect(unsafe_code, reason = "ggml is C")]
        // SAFETY: made of a reference that lives as long as 'a.
        unsafe {
            &*self.tensor
        }
    }

    /// Its name, without the device and the number that a scheduler puts around it (`CPU#NAME#0`).
    pub fn name(&self) -> Cow<'a, str> {
        let name = &self.tensor().name;
        let bytes: Vec<u8> = name
            .iter()
            .take_while(|byte| **byte != 0)
            .map(|byte| byte.cast_unsigned())
            .collect();
        let whole = String::from_utf8_lossy(&bytes).into_owned();
        let mut parts = whole.split('#');
        let first = parts.next().unwrap_or_default();
        Cow::Owned(parts.next().unwrap_or(first).to_owned())
    }

    /// The dimensions in ggml's order: the first one is the length of a row.
    pub fn dimensions(&self) -> [usize; 4] {
        self.ne.map(|n| usize::try_from(n).unwrap_or(0))
    }

    /// Whether the elements are f32, and those of a row lie side by side.
    pub fn is_f32(&self) -> bool {
        self.tensor().type_ == sys::GGML_TYPE_F32 && self.nb[0] == 4 && self.nb.iter().all(|n| n % 4 == 0)
    }

    /// Copies the values as they lie in memory, which [`Operand::row`] finds its way in. Nothing but f32 is copied.
    pub fn read(&self, values: &mut Vec<f32>) {
        values.clear();
        if !self.is_f32() {
            return;
        }
        #[expect(unsafe_code, reason = "ggml is C")]
        // SAFETY: the tensor is alive and computed, and exactly the bytes that it spans are copied.
        unsafe {
            let bytes = sys::ggml_nbytes(self.tensor);
            values.resize(bytes / 4, 0.0);
            sys::ggml_backend_tensor_get(self.tensor, values.as_mut_ptr().cast(), 0, values.len() * 4);
        }
    }

    /// One row of what [`Operand::read`] copied.
    pub fn row<'v>(&self, values: &'v [f32], row: usize, matrix: usize, batch: usize) -> &'v [f32] {
        let start = (row * self.nb[1] + matrix * self.nb[2] + batch * self.nb[3]) / 4;
        values
            .get(start..start + self.dimensions()[0])
            .unwrap_or_default()
    }
}
