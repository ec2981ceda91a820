//! A stored LoRA adapter put on a model, whoever wrote it. What cannot be trained here is refused by name.

use candle_core::{Device, Tensor};
use pipit_convert::adapter::{AdapterError as FolderError, LoraModule, PeftAdapter};

use super::{AdapterError, Bias, kept};
use crate::model::{EmbeddingLora, Lora, Magnitude, Model, Parameter};

/// Puts the adapter on the model; it can be trained further.
pub(super) fn apply(model: &mut Model, adapter: &PeftAdapter) -> Result<(), AdapterError> {
    if let Some(module) = adapter.tokens().keys().next() {
        return Err(FolderError::Unsupported {
            path: adapter.dir().join("adapter_config.json"),
            key: "trainable_token_indices".into(),
            value: format!("of {module}"),
        }
        .into());
    }
    for (name, stored) in adapter.modules() {
        if !model.modules().iter().any(|module| module.name == name) {
            return Err(other_base(adapter, name, "the model has no such layer".into()));
        }
        let (found, expected) = ([stored.n_out, stored.n_in], model.dims(name));
        if found != expected {
            return Err(other_base(
                adapter,
                name,
                format!("is {expected:?} here, {found:?} in the adapter"),
            ));
        }
        if model.is_embedding(name) != stored.embedding {
            return Err(other_base(
                adapter,
                name,
                "is an embedding in only one of them".into(),
            ));
        }
        if model.is_embedding(name) {
            model.set_embedding_lora(embedding(name, stored)?);
        } else {
            let lora = linear(name, stored, adapter.config().lora_dropout)?;
            if model.is_head(name) && lora.magnitude.is_some() && lora.dropout > 0.0 {
                return Err(AdapterError::Conflict {
                    why: "use_dora with lora_dropout is not supported on the output layer".into(),
                });
            }
            model.set_lora(name, lora);
        }
    }
    whole_tensors(model, adapter)
}

fn other_base(adapter: &PeftAdapter, module: &str, why: String) -> AdapterError {
    AdapterError::OtherBase {
        path: adapter.dir().to_path_buf(),
        module: module.to_owned(),
        why,
        base: adapter.config().base_model_name_or_path.clone(),
    }
}

/// The tensors that the adapter brings whole: `modules_to_save` and biases, which are trained, and the matrix under
/// an adapted embedding, which PEFT stores with it and which is not.
fn whole_tensors(model: &mut Model, adapter: &PeftAdapter) -> Result<(), AdapterError> {
    let config = adapter.config();
    let bias = match config.bias.as_str() {
        "all" => Bias::All,
        "lora_only" => Bias::LoraOnly,
        _ => Bias::None,
    };
    kept::train(model, bias, config.modules_to_save.as_deref().unwrap_or_default())?;
    for (name, view) in adapter.replaced() {
        let values = view.to_f32().map_err(FolderError::from)?;
        if !values.iter().all(|value| value.is_finite()) {
            return Err(other_base(adapter, name, "it holds NaN or infinity".into()));
        }
        let tensor = Tensor::from_vec(values, view.shape, &Device::Cpu)?;
        match model.replace(name, &tensor)? {
            Ok(()) => {}
            Err(None) => return Err(other_base(adapter, name, "the model has no such tensor".into())),
            Err(Some(expected)) => {
                let why = format!("is {expected:?} here, {:?} in the adapter", view.shape);
                return Err(other_base(adapter, name, why));
            }
        }
    }
    Ok(())
}

fn parameter(name: String, values: &[f32], shape: &[usize]) -> candle_core::Result<Parameter> {
    Parameter::trained(name, &Tensor::from_vec(values.to_vec(), shape, &Device::Cpu)?)
}

fn magnitude(module: &str, stored: &LoraModule) -> candle_core::Result<Option<Magnitude>> {
    let make = |values: &Vec<f32>| {
        let parameter = parameter(format!("{module}.lora_magnitude_vector"), values, &[values.len()])?;
        Ok(Magnitude::new(parameter))
    };
    stored.magnitude.as_ref().map(make).transpose()
}

fn linear(module: &str, stored: &LoraModule, dropout: f64) -> candle_core::Result<Lora> {
    let bias = |values: &Vec<f32>| parameter(format!("{module}.lora_B.bias"), values, &[values.len()]);
    Ok(Lora {
        a: parameter(
            format!("{module}.lora_A.weight"),
            &stored.lora_a,
            &[stored.rank, stored.n_in],
        )?,
        b: parameter(
            format!("{module}.lora_B.weight"),
            &stored.lora_b,
            &[stored.n_out, stored.rank],
        )?,
        bias: stored.bias.as_ref().map(bias).transpose()?,
        magnitude: magnitude(module, stored)?,
        scale: f64::from(stored.scale),
        dropout,
    })
}

/// The reader has an embedding's pair as that of a linear layer: its `lora_b` is `lora_embedding_A`, a row a token,
/// and its `lora_a` is `lora_embedding_B` the other way round.
fn embedding(module: &str, stored: &LoraModule) -> candle_core::Result<EmbeddingLora> {
    let b = Tensor::from_slice(&stored.lora_a, (stored.rank, stored.n_in), &Device::Cpu)?;
    Ok(EmbeddingLora {
        a: parameter(
            format!("{module}.lora_embedding_A"),
            &stored.lora_b,
            &[stored.n_out, stored.rank],
        )?,
        b: Parameter::trained(format!("{module}.lora_embedding_B"), &b.t()?.contiguous()?)?,
        magnitude: magnitude(module, stored)?,
        scale: f64::from(stored.scale),
    })
}
