//! NF4 in the memory of a GPU: codes and scales as they are, which become numbers there.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::nf4::{BLOCK, Nf4, PAIRS};
use super::scales::{NESTED_BLOCK, Scales, dynamic_map};
use crate::model::QuantizedRows;

/// A matrix in NF4 on a device, and in the computer's memory too, for what the device does not do.
#[derive(Debug)]
pub struct Nf4OnDevice {
    blocks: Nf4,
    /// None where the last block is a short one.
    sent: Option<Sent>,
}

#[derive(Debug)]
struct Sent {
    /// Two codes a byte.
    packed: Tensor,
    /// The two values of every byte, `[256, 2]`.
    pairs: Tensor,
    scales: SentScales,
}

#[derive(Debug)]
enum SentScales {
    /// `[blocks, 1]`.
    Plain(Tensor),
    Double {
        /// A byte a block, and as many more as fill the last nested block.
        codes: Tensor,
        /// The values of the codes, `[256]`.
        map: Tensor,
        /// `[nested blocks, 1]`.
        nested: Tensor,
        offset: f64,
        blocks: usize,
    },
}

impl Nf4OnDevice {
    /// Sends a matrix there.
    pub fn new(blocks: Nf4, device: &Device) -> Result<Self> {
        let [out, input] = blocks.dims();
        let whole = (out * input).is_multiple_of(BLOCK);
        let sent = whole.then(|| Sent::new(&blocks, device)).transpose()?;
        Ok(Self { blocks, sent })
    }
}

impl Sent {
    fn new(blocks: &Nf4, device: &Device) -> Result<Self> {
        let packed = blocks.packed();
        Ok(Self {
            packed: Tensor::from_slice(packed, packed.len(), device)?,
            pairs: Tensor::from_slice(PAIRS.as_flattened(), (PAIRS.len(), 2), device)?,
            scales: SentScales::new(blocks.scales(), device)?,
        })
    }

    /// All numbers in their order, `[blocks, 64]`, in f32.
    fn numbers(&self) -> Result<Tensor> {
        let values = at(&self.pairs, &self.packed)?;
        values.reshape(((), BLOCK))?.broadcast_mul(&self.scales.get()?)
    }
}

/// The rows of a table at these bytes. Candle takes the largest number of an index's type for no index, and 255 is one.
fn at(table: &Tensor, bytes: &Tensor) -> Result<Tensor> {
    table.index_select(&bytes.to_dtype(DType::U32)?, 0)
}

impl SentScales {
    fn new(scales: &Scales, device: &Device) -> Result<Self> {
        Ok(match scales {
            Scales::Plain(absmax) => Self::Plain(Tensor::from_slice(absmax, (absmax.len(), 1), device)?),
            Scales::Double {
                codes,
                nested,
                offset,
            } => {
                let blocks = codes.len();
                let mut codes = codes.clone();
                codes.resize(nested.len() * NESTED_BLOCK, 0);
                let length = codes.len();
                Self::Double {
                    codes: Tensor::from_vec(codes, length, device)?,
                    map: Tensor::from_slice(dynamic_map(), dynamic_map().len(), device)?,
                    nested: Tensor::from_slice(nested, (nested.len(), 1), device)?,
                    offset: f64::from(*offset),
                    blocks,
                }
            }
        })
    }

    /// The scale of every block, `[blocks, 1]`.
    fn get(&self) -> Result<Tensor> {
        match self {
            Self::Plain(absmax) => Ok(absmax.clone()),
            Self::Double {
                codes,
                map,
                nested,
                offset,
                blocks,
            } => {
                let values = at(map, codes)?.reshape(((), NESTED_BLOCK))?;
                let scales = (values.broadcast_mul(nested)? + *offset)?;
                scales.flatten_all()?.narrow(0, 0, *blocks)?.unsqueeze(1)
            }
        }
    }
}

impl QuantizedRows for Nf4OnDevice {
    fn name(&self) -> &str {
        self.blocks.name()
    }

    fn dims(&self) -> [usize; 2] {
        self.blocks.dims()
    }

    fn dequantize(&self, rows: Range<usize>, out: &mut [f32]) {
        self.blocks.dequantize(rows, out);
    }

    fn bytes(&self) -> usize {
        self.blocks.bytes()
    }

    fn on(&self, device: &Device, dtype: DType) -> Result<Tensor> {
        match &self.sent {
            Some(sent) if sent.packed.device().same_device(device) => {
                let [out, input] = self.dims();
                sent.numbers()?.reshape((out, input))?.to_dtype(dtype)
            }
            _ => self.blocks.on(device, dtype),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_bit_for_bit_those_of_the_blocks() {
        // Whole blocks, more than one nested block and less; a short last block; rows that begin inside a block.
        for dims in [[9, 64], [300, 64], [2, 32], [11, 50], [32, 50]] {
            let values: Vec<f32> = (0..dims[0] * dims[1])
                .map(|i| (i as f32 * 0.37).sin() / (1 + i / 64) as f32)
                .collect();
            for double_quant in [false, true] {
                let blocks = Nf4::quantize("w".into(), &values, dims, double_quant);
                let mut expected = vec![f32::NAN; values.len()];
                blocks.dequantize(0..dims[0], &mut expected);
                let sent = Nf4OnDevice::new(blocks, &Device::Cpu).unwrap();
                assert_eq!(sent.sent.is_some(), (dims[0] * dims[1]).is_multiple_of(64));
                let ours = sent.on(&Device::Cpu, DType::F32).unwrap();
                assert_eq!(ours.dims(), dims);
                assert_eq!(
                    ours.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                    expected,
                    "{dims:?}"
                );
            }
        }
    }
}
