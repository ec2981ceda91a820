//! Tensors out of a checkpoint by their names, with their shapes checked and what was used counted.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::quantized::Nf4;
use super::source::Source;
use super::{Linear, ModelError, Parameter, Weight};

/// What becomes of a model's weights when they are loaded. The matrices of a GGUF file stay the file's own blocks,
/// frozen, whatever is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// f32, trained.
    Trained,
    /// f32, frozen.
    Frozen,
    /// The blocks' linear layers in NF4, which is QLoRA's base. Embedding and output layer are read from the
    /// checkpoint's file in their own type when they are needed; norms and biases are f32. All are frozen.
    Nf4 {
        /// Whether the scales are quantised too: bitsandbytes' `bnb_4bit_use_double_quant`.
        double_quant: bool,
    },
}

/// Takes tensors out of a checkpoint.
pub(crate) struct Loader<'a> {
    source: &'a Source,
    keep: Keep,
    used: Vec<String>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(source: &'a Source, keep: Keep) -> Self {
        Self {
            source,
            keep,
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

    /// A tensor in f32.
    pub(crate) fn parameter(&mut self, name: String, shape: &[usize]) -> Result<Parameter, ModelError> {
        let tensor = Tensor::from_vec(self.numbers(&name, shape)?, shape, &Device::Cpu)?;
        Ok(match self.keep {
            Keep::Trained => Parameter::trained(name, &tensor)?,
            Keep::Frozen | Keep::Nf4 { .. } => Parameter::frozen(name, &tensor),
        })
    }

    /// The matrix of an embedding or an output layer.
    pub(crate) fn weight(&mut self, name: String, shape: [usize; 2]) -> Result<Weight, ModelError> {
        match (self.source, self.keep) {
            (Source::Folder(_), Keep::Trained | Keep::Frozen) => {
                Ok(Weight::Dense(self.parameter(name, &shape)?))
            }
            (Source::File(_), _) | (_, Keep::Nf4 { .. }) => {
                self.check_shape(&name, &shape)?;
                Ok(Weight::Quantized(self.source.rows(&name)?))
            }
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
                Weight::Quantized(Arc::new(Nf4::quantize(name, &numbers, shape, double_quant)))
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
