//! Importance matrices, as the kernels want them: one weight for each column of a tensor.

use std::collections::BTreeMap;

use super::QuantizeError;
use crate::gguf::Value;

/// The weights of the columns of many tensors, and where they come from.
///
/// They are the mean squares of what each column is multiplied with: the kernels then round the columns that matter
/// more finely, at the price of the others.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Importance {
    /// By the tensor's name in the GGUF file, one weight for each column.
    pub weights: BTreeMap<String, Vec<f32>>,
    /// The file that they come from, as the user named it.
    pub file: String,
    /// The texts that they were measured on.
    pub datasets: Vec<String>,
    /// The number of chunks of text.
    pub chunks: u32,
}

/// The longest text that `llama-quantize` puts into a key (`llama_model_kv_override::val_str`).
const LONGEST_TEXT: usize = 127;

impl Importance {
    /// Keeps the tensors whose name contains one of `parts` (`--include-weights`).
    pub fn include(&mut self, parts: &[String]) {
        self.weights
            .retain(|name, _| parts.iter().any(|part| name.contains(part)));
    }

    /// Leaves the tensors out whose name contains one of `parts` (`--exclude-weights`).
    pub fn exclude(&mut self, parts: &[String]) {
        self.weights
            .retain(|name, _| !parts.iter().any(|part| name.contains(part)));
    }

    /// The weights for a tensor with rows of `columns` elements. Nothing where there are none: the kernel then goes
    /// by magnitude. A wrong length is an error, except for embeddings, whose rows are looked up rather than
    /// multiplied (llama-quant.cpp ignores it there too).
    pub fn of(&self, tensor: &str, columns: usize) -> Result<Option<&[f32]>, QuantizeError> {
        let Some(weights) = self.weights.get(tensor) else {
            return Ok(None);
        };
        if weights.len() == columns {
            return Ok(Some(weights));
        }
        if matches!(tensor, "token_embd.weight" | "per_layer_token_embd.weight") {
            return Ok(None);
        }
        Err(QuantizeError::Importance {
            why: format!("has {} columns, the tensor {columns}", weights.len()),
        })
    }

    /// `quantize.imatrix.*`, as `llama-quantize` writes them, but for the paths: a folder says more of its owner's
    /// machine than of the model.
    pub fn to_metadata(&self) -> Vec<(String, Value)> {
        let name = |path: &str| Value::from(cut(path.rsplit('/').next().unwrap_or(path)));
        let mut keys = vec![("quantize.imatrix.file".to_owned(), name(&self.file))];
        // llama-quantize names the first one only.
        if let Some(dataset) = self.datasets.first() {
            keys.push(("quantize.imatrix.dataset".into(), name(dataset)));
        }
        let entries = self.weights.len() as u32;
        keys.push(("quantize.imatrix.entries_count".into(), entries.into()));
        if self.chunks > 0 {
            keys.push(("quantize.imatrix.chunks_count".into(), self.chunks.into()));
        }
        keys
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(LONGEST_TEXT)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Importance {
        let weights = [
            "blk.0.attn_q.weight",
            "blk.0.ffn_down.weight",
            "token_embd.weight",
        ];
        Importance {
            weights: weights.map(|name| (name.to_owned(), vec![1.0; 4])).into(),
            file: "ä".repeat(100),
            datasets: vec!["wiki.txt".into(), "more.txt".into()],
            chunks: 7,
        }
    }

    #[test]
    fn a_wrong_length_is_an_error_except_for_embeddings() {
        let some = some();
        assert!(some.of("blk.0.attn_q.weight", 4).unwrap().is_some());
        assert_eq!(some.of("blk.0.attn_k.weight", 4), Ok(None));
        assert!(some.of("blk.0.attn_q.weight", 5).is_err());
        assert_eq!(some.of("token_embd.weight", 5), Ok(None));
    }

    #[test]
    fn parts_of_names_include_and_exclude() {
        let (mut with, mut without) = (some(), some());
        with.include(&["attn_q".into(), "embd".into()]);
        without.exclude(&["attn_q".into(), "embd".into()]);
        assert_eq!(with.weights.len(), 2);
        assert_eq!(
            without.weights.keys().collect::<Vec<_>>(),
            ["blk.0.ffn_down.weight"]
        );
    }

    #[test]
    fn the_keys_are_llama_quantizes() {
        let keys = some().to_metadata();
        // A text is cut where a character ends.
        assert_eq!(
            keys[0],
            ("quantize.imatrix.file".into(), "ä".repeat(63).as_str().into())
        );
        assert_eq!(keys[1], ("quantize.imatrix.dataset".into(), "wiki.txt".into()));
        assert_eq!(keys[2], ("quantize.imatrix.entries_count".into(), Value::U32(3)));
        assert_eq!(keys[3], ("quantize.imatrix.chunks_count".into(), Value::U32(7)));
    }
}
