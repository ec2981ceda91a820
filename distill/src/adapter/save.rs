//! The two files of an adapter, with PEFT's names. Source: peft/utils/save_and_load.py, `get_peft_model_state_dict`.

use std::path::Path;

use candle_core::Tensor;
use pipit_convert::adapter::{AdapterConfig, PeftAdapter, TargetModules};
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;

use super::virtual_tokens::TENSOR;
use super::{Adapter, AdapterError};
use crate::model::{Mode, Model};

/// A tensor with the name that it gets in the file.
type Named = (String, Tensor);

impl Adapter {
    /// Writes `adapter_config.json` and `adapter_model.safetensors` into a folder.
    pub fn save(&self, model: &Model, dir: &Path) -> Result<(), AdapterError> {
        match self {
            Self::Lora(config) => {
                write_config(config, dir)?;
                write_tensors(&lora_tensors(model, config)?, dir)
            }
            Self::VirtualTokens(config) => {
                write_config(config, dir)?;
                let Some(tokens) = model.virtual_tokens() else {
                    return Err(AdapterError::Conflict {
                        why: "the model has no virtual tokens to save".into(),
                    });
                };
                write_tensors(&[(TENSOR.to_owned(), tokens.prompt_embeddings()?)], dir)
            }
        }
    }
}

/// The tensors of a LoRA adapter: what is trained, and the matrix under an adapted embedding or output layer where
/// `target_modules` names it, which PEFT stores too.
fn lora_tensors(model: &Model, config: &AdapterConfig) -> Result<Vec<Named>, AdapterError> {
    let mut tensors: Vec<Named> = Vec::new();
    let mut put = |name: &str, tensor: Tensor| tensors.push((format!("base_model.model.{name}"), tensor));
    for parameter in model.adapter_parameters() {
        let tensor = parameter.get(Mode::INFERENCE);
        // PEFT has a token's numbers in a column.
        match parameter.name.ends_with(".lora_embedding_A") {
            true => put(&parameter.name, tensor.t()?.contiguous()?),
            false => put(&parameter.name, tensor.clone()),
        }
    }
    for weight in model.weights().filter(|weight| weight.var().is_some()) {
        let tensor = weight.get(Mode::INFERENCE).clone();
        match weight.name.rsplit_once('.') {
            Some((module, parameter)) if model.adapted().any(|adapted| adapted == module) => {
                put(&format!("{module}.base_layer.{parameter}"), tensor);
            }
            _ => put(&weight.name, tensor),
        }
    }
    if names_an_embedding(model, config) {
        for module in model
            .adapted()
            .filter(|module| model.is_embedding(module) || model.is_head(module))
        {
            if let Some(weight) = model.matrix(module).and_then(|weight| weight.dense()) {
                put(
                    &format!("{module}.base_layer.weight"),
                    weight.get(Mode::INFERENCE).clone(),
                );
            }
        }
    }
    Ok(tensors)
}

/// Whether `target_modules` names the embedding or the output layer.
fn names_an_embedding(model: &Model, config: &AdapterConfig) -> bool {
    match &config.target_modules {
        Some(TargetModules::Names(names)) => names
            .iter()
            .any(|name| matches!(name.as_str(), "embed_tokens" | "lm_head")),
        Some(TargetModules::Pattern(_)) => model
            .adapted()
            .any(|module| model.is_embedding(module) || model.is_head(module)),
        None => false,
    }
}

fn write_config(config: &impl Serialize, dir: &Path) -> Result<(), AdapterError> {
    let path = dir.join("adapter_config.json");
    let json = serde_json::to_string_pretty(config).map_err(std::io::Error::other);
    let written = json.and_then(|json| std::fs::write(&path, json + "\n"));
    written.map_err(|source| AdapterError::Write { path, source })
}

fn write_tensors(tensors: &[Named], dir: &Path) -> Result<(), AdapterError> {
    let path = PeftAdapter::weights_path(dir);
    let mut bytes = Vec::new();
    for (_, tensor) in tensors {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        bytes.push(values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
    }
    let write = |source| AdapterError::Write {
        path: path.clone(),
        source,
    };
    let mut views = Vec::new();
    for ((name, tensor), bytes) in tensors.iter().zip(&bytes) {
        let view = TensorView::new(Dtype::F32, tensor.dims().to_vec(), bytes);
        views.push((name, view.map_err(|e| write(std::io::Error::other(e)))?));
    }
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let file = safetensors::serialize(views, Some(metadata));
    let file = file.map_err(|e| write(std::io::Error::other(e)))?;
    std::fs::write(&path, file).map_err(write)
}
