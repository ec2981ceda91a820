//! A fully trained model as a checkpoint folder.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::model::ops::with_elements;
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

    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0usize;
    for weight in model.weights() {
        let tensor = weight.get(Mode::INFERENCE);
        let start = end;
        end += tensor.elem_count() * 4;
        header.insert(
            weight.name.clone(),
            json!({"dtype": "F32", "shape": tensor.dims(), "data_offsets": [start, end]}),
        );
    }
    let mut text = Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut file = BufWriter::new(File::create(dir.join("model.safetensors"))?);
    file.write_all(&(text.len() as u64).to_le_bytes())?;
    file.write_all(text.as_bytes())?;
    for weight in model.weights() {
        let written = with_elements::<f32, _>(weight.get(Mode::INFERENCE), "save", |values| {
            Ok(values
                .iter()
                .try_for_each(|value| file.write_all(&value.to_le_bytes())))
        });
        written.map_err(io::Error::other)??;
    }
    file.flush()
}
