//! Checkpoints whose weights are quantised already: how `quantization_config` says it, what is read, and the name
//! of what is not.
//!
//! Read exactly, as convert_hf_to_gguf.py reads them (conversion/base.py, `dequant_model`): weights of eight bits
//! times a scale per tensor, per row or per block, in f32. Everything else is refused by its name; without a
//! configuration, the names of the tensors give it away.

use safetensors::Dtype;
use serde_json::{Map, Value};

use super::CheckpointError;
use super::tensors::{TensorFiles, TensorView};

/// The scales of one matrix: element `[row, column]` is multiplied by `values[row / rows, column / columns]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scale {
    values: Vec<f32>,
    /// The rows and the columns of a block.
    rows: usize,
    columns: usize,
    /// The number of blocks beside each other.
    across: usize,
}

impl Scale {
    /// Multiplies a part of a matrix with rows of `width` elements, from element `start` on.
    pub(super) fn apply(&self, width: usize, start: usize, values: &mut [f32]) {
        for (at, value) in (start..).zip(values) {
            let (row, column) = (at / width.max(1), at % width.max(1));
            *value *= self.values[row / self.rows * self.across + column / self.columns];
        }
    }
}

/// How the weights of a checkpoint are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scheme {
    /// What comes after the name of a weight in the name of its scales.
    suffix: &'static str,
    /// The rows and columns of a block; without it, a scale is for a row or for the whole tensor.
    block: Option<[usize; 2]>,
    /// The type of the quantised weights.
    integers: bool,
}

/// Scales of activations and of the cache: the runtime that a GGUF is for has neither.
const UNUSED: &[&str] = &[
    ".activation_scale",
    "_activation_scale",
    ".input_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
];

impl Scheme {
    /// What `config.json` says: nothing, a scheme that is read, or the reason why it is not. `from` names it.
    pub(super) fn of(config: &Map<String, Value>) -> Result<Option<Self>, String> {
        let said = ["quantization_config", "compression_config"]
            .iter()
            .filter_map(|key| config.get(*key))
            .find(|value| !value.is_null());
        let Some(said) = said else {
            return Ok(None);
        };
        let text = |key: &str| said.get(key).and_then(Value::as_str);
        let method = text("quant_method").ok_or("quantised by a method that is not named")?;
        match method {
            "fp8" => Ok(Some(Self {
                suffix: "_scale_inv",
                block: block(said.get("weight_block_size"))?,
                integers: false,
            })),
            "compressed-tensors" => Self::of_compressed(said).map(Some),
            "modelopt" if text("quant_algo").is_some_and(|algo| algo.eq_ignore_ascii_case("fp8")) => {
                Ok(Some(Self {
                    suffix: "_scale",
                    block: None,
                    integers: false,
                }))
            }
            "modelopt" => Err(format!(
                "quantised by modelopt to {}",
                text("quant_algo").unwrap_or("a type that is not named")
            )),
            method => Err(format!("quantised by {method}")),
        }
    }

    fn of_compressed(said: &Value) -> Result<Self, String> {
        let format = said.get("format").and_then(Value::as_str).unwrap_or("unknown");
        let refused = |why: &str| Err(format!("quantised by compressed-tensors, format {format}{why}"));
        let groups = said.get("config_groups").and_then(Value::as_object);
        let Some((1, Some(weights))) = groups.map(|groups| {
            (
                groups.len(),
                groups.values().next().and_then(|group| group.get("weights")),
            )
        }) else {
            return refused(", with several groups");
        };
        let field = |key: &str| weights.get(key).filter(|value| !value.is_null());
        let kind = field("type").and_then(Value::as_str).unwrap_or("int");
        let integers = match (format, kind) {
            ("float-quantized" | "naive-quantized", "float") => false,
            ("int-quantized" | "naive-quantized", "int") => true,
            _ => return refused(""),
        };
        if field("num_bits").and_then(Value::as_u64) != Some(8) {
            return refused(", not of 8 bits");
        }
        if field("symmetric").and_then(Value::as_bool) == Some(false) {
            return refused(", with zero points");
        }
        if field("group_size").is_some_and(|size| size.as_i64() != Some(-1)) {
            return refused(", in groups");
        }
        let block = match field("strategy").and_then(Value::as_str) {
            Some("tensor" | "channel") => None,
            Some("block") => block(field("block_structure"))?,
            _ => return refused(" of an unknown strategy"),
        };
        Ok(Self {
            suffix: "_scale",
            block,
            integers,
        })
    }

    /// The name of the scales of a weight.
    pub(super) fn scale_name(self, weight: &str) -> String {
        format!("{weight}{}", self.suffix)
    }

    /// Whether the tensor is a part of how others are stored, and none of the model's own.
    pub(super) fn hides(self, name: &str, has: impl Fn(&str) -> bool) -> bool {
        name.strip_suffix(self.suffix)
            .is_some_and(|weight| weight.ends_with(".weight") && has(weight))
            || UNUSED.iter().any(|ending| name.ends_with(ending))
    }

    /// Whether a tensor of this type has scales.
    pub(super) fn scales(self, dtype: Dtype) -> bool {
        match self.integers {
            true => dtype == Dtype::I8,
            false => matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2),
        }
    }

    /// Reads the scales of a matrix of this shape.
    pub(super) fn scale(self, scales: &TensorView<'_>, shape: &[usize]) -> Result<Scale, CheckpointError> {
        let bad = |why: String| CheckpointError::Scale {
            tensor: scales.name.to_owned(),
            why,
        };
        let &[rows, columns] = shape else {
            return Err(bad(format!(
                "it belongs to a tensor of shape {shape:?}, no matrix"
            )));
        };
        let values = scales.to_f32()?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(bad(format!("element {at} is {}", values[at])));
        }
        let (height, width, wanted) = match (self.block, scales.shape) {
            (Some([height, width]), _) => {
                let wanted = vec![rows.div_ceil(height), columns.div_ceil(width)];
                (height, width, wanted)
            }
            (None, [] | [1] | [1, 1]) => (rows.max(1), columns.max(1), scales.shape.to_vec()),
            (None, [_]) => (1, columns.max(1), vec![rows]),
            (None, _) => (1, columns.max(1), vec![rows, 1]),
        };
        if scales.shape != wanted {
            return Err(bad(format!(
                "its shape is {:?}, where a weight of shape {shape:?} needs {wanted:?}",
                scales.shape
            )));
        }
        Ok(Scale {
            values,
            rows: height,
            columns: width,
            across: columns.div_ceil(width),
        })
    }
}

fn block(size: Option<&Value>) -> Result<Option<[usize; 2]>, String> {
    let Some(size) = size.filter(|size| !size.is_null()) else {
        return Ok(None);
    };
    let sizes: Vec<_> = size.as_array().into_iter().flatten().map(Value::as_u64).collect();
    match sizes[..] {
        [Some(rows @ 1..=65536), Some(columns @ 1..=65536)] => Ok(Some([rows as usize, columns as usize])),
        _ => Err(format!("quantised in blocks of {size}, which is no size")),
    }
}

/// The name of a quantisation that no `quantization_config` mentions, from the tensors that it leaves behind.
pub(super) fn given_away(files: &TensorFiles) -> Option<(&'static str, &str)> {
    const SIGNS: &[(&str, &str)] = &[
        (".qweight", "GPTQ or AWQ"),
        (".qzeros", "GPTQ or AWQ"),
        (".SCB", "bitsandbytes, LLM.int8"),
        (".absmax", "bitsandbytes, 4 bits"),
        (".weight_packed", "compressed-tensors"),
        ("_blocks", "MXFP4"),
        (".qscale_weight", "Mistral's FP8"),
        (".weight_scale_inv", "FP8 in blocks"),
        (".weight_scale", "FP8 or integers with scales"),
    ];
    SIGNS.iter().find_map(|(ending, method)| {
        let gives_away = |name: &&str| {
            name.ends_with(ending) || (*ending == ".absmax" && name.contains(".quant_state.bitsandbytes"))
        };
        Some((*method, files.names().find(gives_away)?))
    })
}
