//! A fully trained model as a checkpoint folder.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use crate::model::{Mode, Model};

/// What belongs to a checkpoint beside its weights.
const BESIDE: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// Writes `model.safetensors` (f32) into a folder, and copies what belongs beside it from the base.
/// Tensors are written one after another: no second copy of the model is held.
pub fn save_checkpoint(model: &Model, base: &Path, dir: &Path) -> io::Result<()> {
    for name in BESIDE {
        if base.join(name).is_file() {
            std::fs::copy(base.join(name), dir.join(name))?;
        }
    }
    // The configuration's dtype is the weights' now.
    let path = dir.join("config.json");
    let mut config: Map<String, Value> = serde_json::from_slice(&std::fs::read(&path)?)?;
    for key in ["dtype", "torch_dtype"] {
        if let Some(dtype) = config.get_mut(key) {
            *dtype = json!("float32");
        }
    }
    std::fs::write(&path, format!("{:#}\n", Value::Object(config)))?;

    let weights: Vec<&Tensor> = model
        .weights()
        .map(|weight| weight.get(Mode::INFERENCE))
        .collect();
    let names: Vec<_> = model
        .weights()
        .zip(&weights)
        .map(|(weight, tensor)| (weight.name.clone(), tensor.dims().to_vec()))
        .collect();
    write_tensors(&dir.join("model.safetensors"), &names, |i| {
        weights[i].flatten_all()?.to_dtype(DType::F32)?.to_vec1()
    })
}

/// Writes a safetensors file of f32 tensors, given as (name, shape). `values` is asked for tensor i when its turn comes:
/// no second copy of all of them is held.
pub(crate) fn write_tensors(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    mut values: impl FnMut(usize) -> candle_core::Result<Vec<f32>>,
) -> io::Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0usize;
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * 4;
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}),
        );
    }
    let mut text = Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&(text.len() as u64).to_le_bytes())?;
    file.write_all(text.as_bytes())?;
    for i in 0..tensors.len() {
        for value in values(i).map_err(io::Error::other)? {
            file.write_all(&value.to_le_bytes())?;
        }
    }
    file.flush()
}
