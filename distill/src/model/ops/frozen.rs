//! A matrix that gets no gradient: numbers in memory, or quantised rows that become numbers tile by tile.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::gemm::{Mat, Threads, gemm};
use super::real::{Real, with_elements};
use crate::model::QuantizedRows;

/// So many elements of a quantised matrix are numbers at one time: 2 MiB, which stay in the cache between being
/// dequantised and being multiplied.
const TILE: usize = 1 << 19;
/// A thread dequantises so many elements at a time.
const PART: usize = 1 << 13;

/// A frozen matrix `[out, in]`.
#[derive(Debug, Clone)]
pub enum Frozen {
    /// Numbers in memory.
    Dense(Tensor),
    /// Rows that become numbers when they are needed.
    Quantized(Arc<dyn QuantizedRows>),
}

impl Frozen {
    /// Rows and columns.
    pub fn dims(&self) -> Result<[usize; 2]> {
        match self {
            Self::Dense(tensor) => Ok(tensor.dims2()?.into()),
            Self::Quantized(rows) => Ok(rows.dims()),
        }
    }

    /// Calls `f` with every tile: its first row, and its elements.
    pub(crate) fn tiles<T: Real>(&self, op: &str, mut f: impl FnMut(usize, &[T])) -> Result<()> {
        match self {
            Self::Dense(tensor) => with_elements(&tensor.detach(), op, |w| {
                f(0, w);
                Ok(())
            }),
            Self::Quantized(matrix) => {
                let [rows, columns] = matrix.dims();
                // Of about equal height: a product with the few rows of a rest takes another way through the kernels, and
                // gives other bits than those rows have in a product with the whole matrix.
                let most = (TILE / columns.max(1)).max(1);
                let height = rows.div_ceil(rows.div_ceil(most).max(1)).max(1);
                let part = (PART / columns.max(1)).max(1);
                let mut buffer = vec![0.0; height * columns];
                for first in (0..rows).step_by(height) {
                    let tile = &mut buffer[..height.min(rows - first) * columns];
                    tile.par_chunks_mut((part * columns).max(1))
                        .enumerate()
                        .for_each(|(i, out)| {
                            let start = first + i * part;
                            matrix.dequantize(start..start + out.len() / columns, out);
                        });
                    matrix.used();
                    f(first, &T::from_f32(tile));
                }
                Ok(())
            }
        }
    }

    /// (rows of x, in, out), or an error when the shapes do not fit.
    pub(crate) fn sizes(&self, x: &[usize]) -> Result<(usize, usize, usize)> {
        super::linear::sizes(x, &self.dims()?)
    }

    /// x·Wᵀ, `[rows, out]`.
    pub(crate) fn forward<T: Real>(
        &self,
        op: &str,
        x: &[T],
        (rows, input, out): (usize, usize, usize),
    ) -> Result<Vec<T>> {
        let mut y = vec![T::zero(); rows * out];
        self.forward_into(op, x, (rows, input, out), &mut y)?;
        Ok(y)
    }

    /// The same for tokens that are drawn: the few rows of a matrix in memory go the way of [`few_rows`].
    ///
    /// [`few_rows`]: super::few_rows
    pub(crate) fn forward_drawn<T: Real>(
        &self,
        op: &str,
        x: &[T],
        sizes: (usize, usize, usize),
    ) -> Result<Vec<T>> {
        if let Self::Dense(weight) = self {
            let y = with_elements(&weight.detach(), op, |weight| Ok(T::few_rows(x, weight, sizes)))?;
            if let Some(y) = y {
                return Ok(y);
            }
        }
        self.forward(op, x, sizes)
    }

    /// The same as [`forward`](Self::forward) into `y`, `[rows, out]`, whose old content is not read.
    pub(crate) fn forward_into<T: Real>(
        &self,
        op: &str,
        x: &[T],
        (rows, input, out): (usize, usize, usize),
        y: &mut [T],
    ) -> Result<()> {
        self.tiles(op, |first, tile: &[T]| {
            let tile = Mat::new(tile, tile.len() / input, input);
            gemm(
                &mut y[first..],
                out,
                0.0,
                1.0,
                Mat::new(x, rows, input),
                tile.t(),
                Threads::All,
            );
        })
    }

    /// dx = dy·W, `[rows, in]`.
    pub(crate) fn backward_x<T: Real>(
        &self,
        op: &str,
        dy: &[T],
        (rows, input, out): (usize, usize, usize),
    ) -> Result<Vec<T>> {
        let mut dx = vec![T::zero(); rows * input];
        self.tiles(op, |first, tile: &[T]| {
            let count = tile.len() / input;
            let dy = Mat::strided(&dy[first..], rows, count, out);
            let keep = if first == 0 { 0.0 } else { 1.0 };
            gemm(
                &mut dx,
                input,
                keep,
                1.0,
                dy,
                Mat::new(tile, count, input),
                Threads::All,
            );
        })?;
        Ok(dx)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use candle_core::Device;
    use pipit_convert::gguf::TensorType;
    use pipit_convert::quantize;

    use super::*;
    use crate::model::ops::gradcheck::{check, random};
    use crate::model::ops::{Targets, frozen_cross_entropy, frozen_embedding, frozen_linear, lora_linear};
    use crate::model::quantized::Nf4;

    /// Blocks as a GGUF file has them.
    #[derive(Debug)]
    struct Blocks {
        kind: TensorType,
        data: Vec<u8>,
        dims: [usize; 2],
    }

    impl QuantizedRows for Blocks {
        fn name(&self) -> &str {
            self.kind.name()
        }
        fn dims(&self) -> [usize; 2] {
            self.dims
        }
        fn dequantize(&self, rows: Range<usize>, out: &mut [f32]) {
            let row = self.data.len() / self.dims[0];
            let data = &self.data[rows.start * row..rows.end * row];
            quantize::dequantize(self.kind, data, self.dims[1], out).unwrap();
        }
        fn bytes(&self) -> usize {
            self.data.len()
        }
    }

    fn numbers(dims: [usize; 2]) -> Vec<f32> {
        let values = random(&dims, 21).flatten_all().unwrap().to_vec1::<f64>().unwrap();
        values.into_iter().map(|x| x as f32).collect()
    }

    /// The same matrix in every kind of block, with the numbers that it stands for.
    fn matrices(dims: [usize; 2]) -> Vec<(Frozen, Tensor)> {
        use TensorType as T;
        let kinds = [
            T::Q4_0,
            T::Q4_1,
            T::Q5_0,
            T::Q5_1,
            T::Q8_0,
            T::IQ4_NL,
            T::IQ4_XS,
            T::Q2_K,
            T::Q3_K,
            T::Q4_K,
            T::Q5_K,
            T::Q6_K,
            T::IQ3_S,
            T::TQ2_0,
            T::MXFP4,
            T::F16,
            T::BF16,
            T::F32,
        ];
        let mut all: Vec<Arc<dyn QuantizedRows>> = vec![
            Arc::new(Nf4::quantize("nf4".into(), &numbers(dims), dims, false)),
            Arc::new(Nf4::quantize("nf4".into(), &numbers(dims), dims, true)),
        ];
        for kind in kinds {
            let mut data = Vec::new();
            quantize::quantize(kind, &numbers(dims), dims[1], None, &mut data).unwrap();
            all.push(Arc::new(Blocks { kind, data, dims }));
        }
        all.into_iter().map(pair).collect()
    }

    /// A quantised matrix, and the numbers that it stands for.
    fn pair(rows: Arc<dyn QuantizedRows>) -> (Frozen, Tensor) {
        let dims = rows.dims();
        let mut numbers = vec![f32::NAN; dims[0] * dims[1]];
        rows.dequantize(0..dims[0], &mut numbers);
        let numbers: Vec<f64> = numbers.into_iter().map(f64::from).collect();
        let dense = Tensor::from_vec(numbers, dims.as_slice(), &Device::Cpu).unwrap();
        (Frozen::Quantized(rows), dense)
    }

    fn assert_same(ours: &Tensor, dense: &Tensor, name: &Frozen) {
        let largest = (ours - dense)
            .unwrap()
            .abs()
            .unwrap()
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap();
        let largest: f64 = largest.to_scalar().unwrap();
        assert!(largest < 1e-9, "{name:?}: off by {largest}");
    }

    #[test]
    fn every_kind_of_block_computes_with_the_numbers_that_it_stands_for() {
        let (x, a, b) = (random(&[3, 256], 1), random(&[2, 256], 2), random(&[5, 2], 3));
        for (blocks, dense) in matrices([5, 256]) {
            let numbers = Frozen::Dense(dense);
            let same = |f: &dyn Fn(&Frozen) -> Result<Tensor>| {
                assert_same(&f(&blocks).unwrap(), &f(&numbers).unwrap(), &blocks);
                // dx is the gradient of a sum whose terms weigh the same.
                let dx = |w| {
                    f(w).unwrap()
                        .sum_all()
                        .unwrap()
                        .backward()
                        .unwrap()
                        .get(&x)
                        .unwrap()
                        .clone()
                };
                assert_same(&dx(&blocks), &dx(&numbers), &blocks);
            };
            same(&|w| frozen_linear(&x, w));
            same(&|w| lora_linear(&x, w, &a, &b, 1.7, None));
            let targets = Targets {
                rows: vec![(0, 3), (2, 0)],
                chunk: 1,
            };
            same(&|w| frozen_cross_entropy(&x, w, targets.clone()));
            let ids = [4u32, 1, 4].into();
            let embedded = frozen_embedding(&blocks, &ids)
                .unwrap()
                .to_dtype(candle_core::DType::F64)
                .unwrap();
            assert_same(&embedded, &frozen_embedding(&numbers, &ids).unwrap(), &blocks);
        }
    }

    #[test]
    fn gradients_through_blocks_are_the_differences() {
        let (x, a, b) = (random(&[2, 256], 1), random(&[2, 256], 2), random(&[3, 2], 3));
        let kinds = ["nf4", "Q4_K", "Q6_K"];
        for (blocks, _) in matrices([3, 256]) {
            if !matches!(&blocks, Frozen::Quantized(rows) if kinds.contains(&rows.name())) {
                continue;
            }
            check(&[&x], |args| frozen_linear(&args[0], &blocks));
            check(&[&x, &a, &b], |args| {
                lora_linear(&args[0], &blocks, &args[1], &args[2], 0.7, None)
            });
        }
    }

    #[test]
    fn several_tiles_are_one_matrix() {
        // Three tiles, the last one short, with rows that begin inside a block of NF4.
        let dims = [2 * TILE / 100 + 17, 100];
        let (blocks, dense) = pair(Arc::new(Nf4::quantize("nf4".into(), &numbers(dims), dims, true)));
        let x = random(&[2, 100], 5);
        let numbers = Frozen::Dense(dense);
        let y = |w: &Frozen| frozen_linear(&x, w).unwrap();
        assert_same(&y(&blocks), &y(&numbers), &blocks);
        let dx = |w: &Frozen| {
            y(w).sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .backward()
                .unwrap()
                .get(&x)
                .unwrap()
                .clone()
        };
        let (ours, theirs) = (dx(&blocks), dx(&numbers));
        // Sums over thousands of rows, in another order.
        assert_same(&(ours * 1e-5).unwrap(), &(theirs * 1e-5).unwrap(), &blocks);
    }

    /// A teacher whose matrices are read from a file must agree with a student whose are in memory, to the bit.
    #[test]
    fn tiles_of_f32_give_the_bits_of_the_whole_matrix() {
        for dims in [
            [2 * TILE / 128 + 17, 128],
            [2 * TILE / 576 + 5, 576],
            [1500, 1536],
        ] {
            let values = numbers(dims);
            let data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let kind = TensorType::F32;
            let tiles = Frozen::Quantized(Arc::new(Blocks { kind, data, dims }));
            let whole = Frozen::Dense(Tensor::from_vec(values, dims.as_slice(), &Device::Cpu).unwrap());
            for rows in [1, 2, 3, 7, 64] {
                let x = Tensor::from_vec(numbers([rows, dims[1]]), (rows, dims[1]), &Device::Cpu).unwrap();
                let bits = |weight: &Frozen| -> Vec<u32> {
                    let y = frozen_linear(&x, weight).unwrap().flatten_all().unwrap();
                    y.to_vec1::<f32>()
                        .unwrap()
                        .into_iter()
                        .map(f32::to_bits)
                        .collect()
                };
                assert!(bits(&tiles) == bits(&whole), "{rows} rows, {dims:?}");
            }
        }
    }
}
