//! The smaller checkpoint: tensors with some of their rows or columns, in their own type, and a `config.json` to match.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use pipit_convert::checkpoint::{Checkpoint, CheckpointError, Dtype, TensorView};
use pipit_convert::output::write_file;
use safetensors::tensor::View;
use serde_json::{Map, Value, json};

use super::{KeptBlock, ShrinkError};
use crate::export::BESIDE;
use crate::model::{Config, ModelError};

/// Writes the checkpoint of the kept blocks into a folder: one file of weights, and what belongs beside it.
pub fn write(checkpoint: &Checkpoint, kept: &[KeptBlock], dir: &Path) -> Result<(), ShrinkError> {
    let config = Config::read(checkpoint)?;
    let places: HashMap<usize, usize> = kept
        .iter()
        .enumerate()
        .map(|(at, block)| (block.layer, at))
        .collect();
    let mut tensors = Vec::new();
    for name in checkpoint.names() {
        let view = checkpoint.tensor(name)?;
        match of_block(name) {
            None => tensors.push((name.to_owned(), Part::whole(view)?)),
            Some((layer, module)) => {
                let Some(at) = places.get(&layer) else { continue };
                let part = Part::of(checkpoint, view, module, &config, &kept[*at])?;
                tensors.push((format!("{PREFIX}{at}.{module}"), part));
            }
        }
    }
    let failed = |name: &str, source| ShrinkError::Write {
        path: dir.join(name),
        source,
    };
    let widened = tensors.iter().any(|(_, part)| part.widened.is_some());
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    const WEIGHTS: &str = "model.safetensors";
    safetensors::serialize_to_file(tensors, Some(format), &dir.join(WEIGHTS))
        .map_err(|e| failed(WEIGHTS, std::io::Error::other(e)))?;
    for name in BESIDE
        .into_iter()
        .filter(|name| checkpoint.dir().join(name).is_file())
    {
        std::fs::copy(checkpoint.dir().join(name), dir.join(name)).map_err(|e| failed(name, e))?;
    }
    let mut json = smaller(checkpoint.config(), &config, kept);
    if widened {
        for key in ["dtype", "torch_dtype"] {
            json.entry(key).and_modify(|dtype| *dtype = json!("float32"));
        }
    }
    const CONFIG: &str = "config.json";
    write_file(
        &dir.join(CONFIG),
        format!("{:#}\n", Value::Object(json)).as_bytes(),
    )
    .map_err(|e| failed(CONFIG, e))
}

const PREFIX: &str = "model.layers.";

/// The block that a tensor belongs to, and its name in it.
fn of_block(name: &str) -> Option<(usize, &str)> {
    let (layer, module) = name.strip_prefix(PREFIX)?.split_once('.')?;
    Some((layer.parse().ok()?, module))
}

/// `config.json` with the sizes of what is kept.
fn smaller(json: &Map<String, Value>, config: &Config, kept: &[KeptBlock]) -> Map<String, Value> {
    let mut json = json.clone();
    let Some(first) = kept.first() else { return json };
    let windows: Vec<_> = kept.iter().map(|block| config.windows[block.layer]).collect();
    json.insert("num_hidden_layers".into(), json!(kept.len()));
    json.insert("num_attention_heads".into(), json!(first.heads.len()));
    json.insert("num_key_value_heads".into(), json!(first.kv_heads.len()));
    json.insert("intermediate_size".into(), json!(first.channels.len()));
    if json.contains_key("head_dim") || first.heads.len() != config.num_attention_heads {
        // Without it a reader divides hidden_size by the heads.
        json.insert("head_dim".into(), json!(config.head_dim));
    }
    // Which blocks see a window no longer follows from their number.
    if json.contains_key("layer_types") || config.windows.iter().any(Option::is_some) {
        let kind = |window: &Option<usize>| match window {
            Some(_) => "sliding_attention",
            None => "full_attention",
        };
        json.insert("layer_types".into(), windows.iter().map(kind).collect());
    }
    if let Some(value) = json.get_mut("max_window_layers") {
        *value = json!(windows.iter().take_while(|window| window.is_none()).count());
    }
    json
}

/// A tensor, or some rows or columns of it.
struct Part<'a> {
    view: TensorView<'a>,
    /// Its numbers in f32, for types that cannot be cut as they are: scales belong to blocks of them.
    widened: Option<Vec<f32>>,
    shape: Vec<usize>,
    cut: Option<Slices>,
}

/// Which slices of a tensor stay.
struct Slices {
    axis: usize,
    /// A slice is so many rows or columns.
    width: usize,
    kept: Vec<usize>,
}

impl<'a> Part<'a> {
    fn whole(view: TensorView<'a>) -> Result<Self, CheckpointError> {
        let widened = match view.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => None,
            _ => Some(view.to_f32()?),
        };
        Ok(Self {
            shape: view.shape.to_vec(),
            view,
            widened,
            cut: None,
        })
    }

    /// What stays of a block's tensor.
    fn of(
        checkpoint: &Checkpoint,
        view: TensorView<'a>,
        module: &str,
        config: &Config,
        block: &KeptBlock,
    ) -> Result<Self, ShrinkError> {
        let mut part = Self::whole(view)?;
        let (module, _) = module.rsplit_once('.').unwrap_or((module, ""));
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (axis, width, kept, all) = match module {
            "self_attn.q_proj" => (0, config.head_dim, &block.heads, heads),
            "self_attn.k_proj" | "self_attn.v_proj" => (0, config.head_dim, &block.kv_heads, kv_heads),
            "self_attn.o_proj" => (1, config.head_dim, &block.heads, heads),
            "mlp.gate_proj" | "mlp.up_proj" => (0, 1, &block.channels, config.intermediate_size),
            "mlp.down_proj" => (1, 1, &block.channels, config.intermediate_size),
            _ => return Ok(part),
        };
        if part.shape.get(axis) != Some(&(all * width)) {
            let mut expected = part.shape.clone();
            expected.resize(axis + 1, 0);
            expected[axis] = all * width;
            return Err(ShrinkError::Model(ModelError::Shape {
                path: checkpoint.dir().to_path_buf(),
                tensor: view.name.to_owned(),
                found: part.shape,
                expected,
            }));
        }
        if kept.len() < all {
            part.shape[axis] = kept.len() * width;
            part.cut = Some(Slices {
                axis,
                width,
                kept: kept.clone(),
            });
        }
        Ok(part)
    }

    fn element(&self) -> usize {
        match self.view.dtype {
            Dtype::F16 | Dtype::BF16 => 2,
            _ => 4,
        }
    }
}

impl View for Part<'_> {
    fn dtype(&self) -> Dtype {
        match self.widened {
            Some(_) => Dtype::F32,
            None => self.view.dtype,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes: Cow<'_, [u8]> = match &self.widened {
            Some(numbers) => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            None => self.view.bytes.into(),
        };
        let Some(cut) = &self.cut else { return bytes };
        // The tensor as [outer, slices, slice], where a slice is what stays or goes as one.
        let inner: usize = self.view.shape[cut.axis + 1..].iter().product();
        let slice = cut.width * inner * self.element();
        let outer = self.view.shape[cut.axis] * inner * self.element();
        let mut out = Vec::with_capacity(self.data_len());
        for part in bytes.chunks_exact(outer) {
            for kept in &cut.kept {
                out.extend_from_slice(&part[kept * slice..][..slice]);
            }
        }
        out.into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.element()
    }
}
