//! The numbers that a new adapter starts from.

use candle_core::{Device, Result, Tensor};

use crate::model::Parameter;
use crate::random::Random;

/// How the elements of a tensor are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Start {
    /// All zero.
    Zero,
    /// From N(0, σ²), by its σ.
    Normal(f64),
    /// From U(±1/√n), by its n: torch's start of a linear layer with n inputs, kaiming_uniform(a = √5) and its bias.
    Linear(usize),
}

impl Start {
    /// A trained tensor that starts so.
    pub(super) fn parameter(self, name: String, shape: &[usize], random: &mut Random) -> Result<Parameter> {
        let count = shape.iter().product();
        let numbers: Vec<f32> = match self {
            Self::Zero => vec![0.0; count],
            Self::Normal(sigma) => (0..count).map(|_| (random.normal() * sigma) as f32).collect(),
            Self::Linear(inputs) => {
                let bound = 1.0 / (inputs as f64).sqrt();
                let number = |_| ((random.uniform() * 2.0 - 1.0) * bound) as f32;
                (0..count).map(number).collect()
            }
        };
        Parameter::trained(name, &Tensor::from_vec(numbers, shape, &Device::Cpu)?)
    }
}
