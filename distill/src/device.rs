//! Where a model is trained: the CPU, or a GPU of a build that knows it; and the type that it computes in.

use candle_core::{DType, Device, Result, Tensor};

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No such name.
    #[error("device {0:?} is not known\nhint: cpu, cuda, cuda:1 or metal")]
    Unknown(String),
    /// This program was built without it.
    #[error(
        "device {name}: this pipit-distill was built without it\nhint: cargo build --release -p pipit-distill --features {feature}"
    )]
    NotBuilt {
        /// What was asked for.
        name: String,
        /// The cargo feature.
        feature: &'static str,
    },
    /// The device is not there, or does not start.
    #[error("device {name} cannot be used: {source}")]
    Unusable {
        /// What was asked for.
        name: String,
        /// What candle said.
        source: candle_core::Error,
    },
    /// The CPU computes in f32 only.
    #[error("--{0} needs a GPU: on the CPU training is in f32\nhint: --device cuda or --device metal")]
    Precision(Precision),
    /// Two types at once.
    #[error("--bf16 and --fp16 do not go together\nhint: bf16, where the GPU has it")]
    TwoPrecisions,
}

/// The type that hidden states and frozen matrices have. What is trained, norms and biases are f32 whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// 32 bits.
    #[default]
    Fp32,
    /// 16 bits with the range of f32.
    Bf16,
    /// 16 bits with a short range: the loss is scaled, so that small gradients are not lost.
    Fp16,
}

impl Precision {
    /// From transformers' two flags.
    pub fn of(bf16: bool, fp16: bool) -> std::result::Result<Self, DeviceError> {
        match (bf16, fp16) {
            (true, true) => Err(DeviceError::TwoPrecisions),
            (true, false) => Ok(Self::Bf16),
            (false, true) => Ok(Self::Fp16),
            (false, false) => Ok(Self::Fp32),
        }
    }

    /// candle's name.
    pub fn dtype(self) -> DType {
        match self {
            Self::Fp32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::Fp16 => DType::F16,
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
            Self::Fp16 => "fp16",
        })
    }
}

/// Where a model's numbers are, and the type that it computes in. By default the CPU, in f32.
#[derive(Debug, Clone)]
pub struct Place {
    /// Where.
    pub device: Device,
    /// In what.
    pub precision: Precision,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            precision: Precision::Fp32,
        }
    }
}

impl Place {
    /// Opens `cpu`, `cuda`, `cuda:N`, `metal` or `metal:N`, and refuses a precision that it does not compute in.
    pub fn open(name: &str, precision: Precision) -> std::result::Result<Self, DeviceError> {
        let unknown = || DeviceError::Unknown(name.to_owned());
        let not_built = |feature| DeviceError::NotBuilt {
            name: name.to_owned(),
            feature,
        };
        let unusable = |source| DeviceError::Unusable {
            name: name.to_owned(),
            source,
        };
        let (kind, number) = name.split_once(':').unwrap_or((name, "0"));
        let ordinal: usize = number.parse().map_err(|_| unknown())?;
        let device = match kind {
            "cpu" if name == "cpu" => match precision {
                Precision::Fp32 => Ok(Device::Cpu),
                Precision::Bf16 | Precision::Fp16 => return Err(DeviceError::Precision(precision)),
            },
            "cuda" if cfg!(feature = "cuda") => Device::new_cuda(ordinal),
            "cuda" => return Err(not_built("cuda")),
            "metal" if cfg!(feature = "metal") => Device::new_metal(ordinal),
            "metal" => return Err(not_built("metal")),
            _ => return Err(unknown()),
        };
        let device = device.map_err(unusable)?;
        Ok(Self { device, precision })
    }

    /// A tensor here, in the type that is computed in. What is here already in this type is not copied.
    pub(crate) fn put(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.to_device(&self.device)?.to_dtype(self.precision.dtype())
    }

    /// The memory that programs may still take here, in bytes; none where nobody says.
    pub fn available(&self) -> Option<u64> {
        match self.device {
            Device::Cpu => crate::memory::available(),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                use candle_core::cuda_backend::cudarc::driver::result::mem_get_info;
                let (free, _) = mem_get_info().ok()?;
                Some(free as u64)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_named() {
        assert!(Place::open("cpu", Precision::Fp32).unwrap().device.is_cpu());
        let said = |name: &str, precision| Place::open(name, precision).unwrap_err().to_string();
        for unknown in ["gpu", "cuda:x", "cpu:0", "cuda:", ""] {
            assert!(said(unknown, Precision::Fp32).contains(&format!("{unknown:?}")));
        }
        assert!(said("cpu", Precision::Bf16).contains("--bf16 needs a GPU"));
        assert!(Precision::of(true, true).is_err());
        if !cfg!(feature = "cuda") {
            assert!(said("cuda:1", Precision::Bf16).contains("--features cuda"));
        }
        if !cfg!(feature = "metal") {
            assert!(said("metal", Precision::Fp32).contains("--features metal"));
        }
    }
}
