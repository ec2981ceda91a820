//! Tensors out of a checkpoint by their names, with their shapes checked and what was used counted.

use candle_core::{Device, Tensor};
use pipit_convert::checkpoint::Checkpoint;

use super::{Linear, ModelError, Parameter, Weight};

/// Takes tensors out of a checkpoint.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    train: bool,
    used: Vec<String>,
}

impl<'a> Loader<'a> {
    /// `train` makes every tensor a trained one.
    pub(crate) fn new(checkpoint: &'a Checkpoint, train: bool) -> Self {
        Self {
            checkpoint,
            train,
            used: Vec::new(),
        }
    }

    /// A tensor in f32.
    pub(crate) fn parameter(&mut self, name: String, shape: &[usize]) -> Result<Parameter, ModelError> {
        let path = || self.checkpoint.dir().to_path_buf();
        let view = self.checkpoint.tensor(&name)?;
        if view.shape != shape {
            return Err(ModelError::Shape {
                path: path(),
                tensor: name,
                found: view.shape.to_vec(),
                expected: shape.to_vec(),
            });
        }
        let data = view.to_f32()?;
        // The file's pages are not needed any more: without this a model would be in memory twice.
        self.checkpoint.release(&name);
        if data.iter().any(|x| !x.is_finite()) {
            return Err(ModelError::NotFinite {
                path: path(),
                tensor: name,
            });
        }
        let tensor = Tensor::from_vec(data, shape, &Device::Cpu)?;
        self.used.push(name.clone());
        Ok(if self.train {
            Parameter::trained(name, &tensor)?
        } else {
            Parameter::frozen(name, &tensor)
        })
    }

    /// The matrix of an embedding or an output layer.
    pub(crate) fn weight(&mut self, name: String, shape: [usize; 2]) -> Result<Weight, ModelError> {
        Ok(Weight::Dense(self.parameter(name, &shape)?))
    }

    /// A linear layer of a block, `[out, input]`.
    pub(crate) fn linear(
        &mut self,
        module: &str,
        out: usize,
        input: usize,
        with_bias: bool,
    ) -> Result<Linear, ModelError> {
        Ok(Linear {
            weight: self.weight(format!("{module}.weight"), [out, input])?,
            bias: match with_bias {
                true => Some(self.parameter(format!("{module}.bias"), &[out])?),
                false => None,
            },
            lora: None,
        })
    }

    /// Fails when the checkpoint has tensors that were not taken, but for `harmless` ones: to train without them
    /// would be wrong.
    pub(crate) fn finish(self, model_type: &str, harmless: impl Fn(&str) -> bool) -> Result<(), ModelError> {
        let unused: Vec<String> = self
            .checkpoint
            .names()
            .filter(|name| !harmless(name) && !self.used.iter().any(|used| used == name))
            .map(str::to_owned)
            .collect();
        if unused.is_empty() {
            return Ok(());
        }
        Err(ModelError::UnusedTensors {
            path: self.checkpoint.dir().to_path_buf(),
            model_type: model_type.to_owned(),
            tensors: unused,
        })
    }
}
