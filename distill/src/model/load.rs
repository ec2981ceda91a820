//! Tensors out of a checkpoint by their names, with their shapes checked and what was used counted.

use std::sync::Arc;

use candle_core::Tensor;

use super::quantized::{Nf4, Nf4OnDevice};
use super::source::Source;
use super::{Linear, ModelError, Parameter, Weight};
use crate::device::Place;

/// What becomes of a model's weights when they are loaded. The matrices of a GGUF file stay the file's own blocks,
/// frozen, whatever is asked for; on a GPU they are the numbers that the blocks stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// f32, trained.
    Trained,
    /// f32, frozen.
    Frozen,
    /// Matrices are read from the checkpoint's file in their own type when they are needed, and the memory that this takes
    /// is given back at once; norms and biases are f32. All are frozen.
    Mapped,
    /// The blocks' linear layers in NF4, which is QLoRA's base. Embedding and output layer are read from the
    /// checkpoint's file in their own type when they are needed (on a GPU they are in its memory); norms and biases are
    /// f32. All are frozen.
    Nf4 {
        /// Whether the scales are quantised too: bitsandbytes' `bnb_4bit_use_double_quant`.
        double_quant: bool,
    },
}

/// Takes tensors out of a checkpoint.
pub(crate) struct Loader<'a> {
    source: &'a Source,
    keep: Keep,
    place: &'a Place,
    used: Vec<String>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(source: &'a Source, keep: Keep, place: &'a Place) -> Self {
        Self {
            source,
            keep,
            place,
            used: Vec::new(),
        }
    }

    fn check_shape(&mut self, name: &str, shape: &[usize]) -> Result<(), ModelError> {
        let found = self.source.shape(name)?;
        if found != shape {
            return Err(ModelError::Shape {
                path: self.source.path().to_path_buf(),
                tensor: name.to_owned(),
                found,
                expected: shape.to_vec(),
            });
        }
        self.used.push(name.to_owned());
        Ok(())
    }

    fn numbers(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        self.check_shape(name, shape)?;
        let data = self.source.to_f32(name)?;
        if data.iter().any(|x| !x.is_finite()) {
            return Err(self.source.not_finite(name));
        }
        Ok(data)
    }

    /// A tensor: in f32 where it is trained, or a vector (a norm, a bias); else in the type that is computed in.
    pub(crate) fn parameter(&mut self, name: String, shape: &[usize]) -> Result<Parameter, ModelError> {
        let tensor = Tensor::from_vec(self.numbers(&name, shape)?, shape, &self.place.device)?;
        Ok(match self.keep {
            Keep::Trained => Parameter::trained(name, &tensor)?,
            Keep::Frozen | Keep::Mapped | Keep::Nf4 { .. } if shape.len() == 1 => {
                Parameter::frozen(name, &tensor)
            }
            Keep::Frozen | Keep::Mapped | Keep::Nf4 { .. } => {
                Parameter::frozen(name, &self.place.put(&tensor)?)
            }
        })
    }

    /// A matrix that stays as it is in the checkpoint, or becomes f32.
    pub(crate) fn weight(&mut self, name: String, shape: [usize; 2]) -> Result<Weight, ModelError> {
        match (self.source, self.keep) {
            (Source::File(_), _) | (_, Keep::Mapped | Keep::Nf4 { .. }) if self.place.device.is_cpu() => {
                self.check_shape(&name, &shape)?;
                Ok(Weight::Quantized(
                    self.source.rows(&name, self.keep == Keep::Mapped)?,
                ))
            }
            // A GPU does not read files: there they are numbers in its memory.
            _ => Ok(Weight::Dense(self.parameter(name, &shape)?)),
        }
    }

    /// A linear layer of a block, `[out, input]`.
    pub(crate) fn linear(
        &mut self,
        module: &str,
        out: usize,
        input: usize,
        with_bias: bool,
    ) -> Result<Linear, ModelError> {
        let (name, shape) = (format!("{module}.weight"), [out, input]);
        let weight = match (self.source, self.keep) {
            (Source::Folder(_), Keep::Nf4 { double_quant }) => {
                let numbers = self.numbers(&name, &shape)?;
                let blocks = Nf4::quantize(name, &numbers, shape, double_quant);
                Weight::Quantized(match self.place.device.is_cpu() {
                    true => Arc::new(blocks),
                    false => Arc::new(Nf4OnDevice::new(blocks, &self.place.device)?),
                })
            }
            _ => self.weight(name, shape)?,
        };
        let bias = match with_bias {
            true => Some(self.parameter(format!("{module}.bias"), &[out])?),
            false => None,
        };
        Ok(Linear {
            weight,
            bias,
            lora: None,
            watch: None,
        })
    }

    /// Fails when the checkpoint has tensors that were not taken, but for `harmless` ones: to train without them
    /// would be wrong.
    pub(crate) fn finish(self, model_type: &str, harmless: impl Fn(&str) -> bool) -> Result<(), ModelError> {
        let unused: Vec<String> = self
            .source
            .names()
            .into_iter()
            .filter(|name| !harmless(name) && !self.used.iter().any(|used| used == name))
            .map(str::to_owned)
            .collect();
        if unused.is_empty() {
            return Ok(());
        }
        Err(ModelError::UnusedTensors {
            path: self.source.path().to_path_buf(),
            model_type: model_type.to_owned(),
            tensors: unused,
        })
    }
}
