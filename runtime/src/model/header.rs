//! The header of a GGUF file: its keys and the list of its tensors.
//!
//! In: a [`Reader`] behind the version. Out: a [`Header`] and the least size that the file must have.

use std::collections::BTreeMap;
use std::io::BufRead;

use super::ggml::{GgmlType, file_type};
use super::layers::Layers;
use super::reader::{Damage, Reader, Value};

/// Caps on a header: real ones have some dozens of keys and some thousands of tensors.
const MOST_KEYS: u64 = 1 << 20;
const MOST_TENSORS: u64 = 1 << 16;
/// llama.cpp refuses names of 64 bytes and more.
const MOST_NAME: usize = 64;

/// What a header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// `general.name`
    pub name: Option<String>,
    /// `general.architecture`
    pub architecture: String,
    /// From `general.file_type`, spelled as llama.cpp spells it.
    pub quantisation: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Files that the model is in: `split.count`.
    pub parts: u64,
    /// Every tensor of this file.
    pub tensors: Vec<Tensor>,
    /// Context that the model was trained for: `context_length`; 0 when it is not said.
    pub context_trained: u64,
    /// `embedding_length`
    pub embedding: u64,
    /// Tokens of the vocabulary.
    pub vocabulary: u64,
    /// Merges of the tokenizer.
    pub merges: u64,
    /// What the layers remember.
    pub layers: Layers,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub kind: GgmlType,
    /// Elements of a row, rows, and so on; missing ones are 1.
    pub shape: [u64; 4],
    /// Bytes of its data.
    pub bytes: u64,
}

impl Tensor {
    /// Dimensions, without those of one element at the end.
    pub fn dimensions(&self) -> usize {
        self.shape
            .iter()
            .rposition(|&length| length != 1)
            .map_or(1, |last| last + 1)
    }
}

/// The keys of the model's architecture, without its name in front.
#[derive(Debug, Default)]
pub(super) struct Keys(BTreeMap<String, Value>);

impl Keys {
    /// A number; of a list its first.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        self.at(key, 0)
    }

    /// A number that may be another for every layer.
    pub(super) fn at(&self, key: &str, layer: u64) -> Option<u64> {
        match self.0.get(key)? {
            Value::Number(number) => Some(*number),
            Value::Numbers(numbers) => numbers.get(usize::try_from(layer).ok()?).copied(),
            _ => None,
        }
    }

    pub(super) fn is_list(&self, key: &str) -> bool {
        matches!(self.0.get(key), Some(Value::Numbers(_)))
    }
}

/// What is read of an architecture's keys; all others are skipped.
const WANTED: [&str; 24] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.key_length_mla",
    "attention.key_length_swa",
    "attention.recurrent_layers",
    "attention.shared_kv_layers",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "attention.value_length_swa",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "full_attention_interval",
    "nextn_predict_layers",
    "shortconv.l_cache",
    "ssm.conv_kernel",
    "ssm.group_count",
    "ssm.inner_size",
    "ssm.state_size",
    "token_shift_count",
    "vocab_size",
];

fn wanted(key: &str) -> bool {
    key.starts_with("general.")
        || matches!(
            key,
            "split.count" | "tokenizer.ggml.tokens" | "tokenizer.ggml.merges"
        )
        || key
            .split_once('.')
            .is_some_and(|(_, rest)| rest == "wkv.head_size" || WANTED.contains(&rest))
}

/// Everything after the version; returns the header and the least size of the file.
pub(super) fn read<R: BufRead>(reader: &mut Reader<R>) -> Result<(Header, u64), Damage> {
    let (tensors, keys) = (reader.u64()?, reader.u64()?);
    if tensors > MOST_TENSORS || keys > MOST_KEYS {
        return Err(Damage::What(format!("{tensors} tensors and {keys} keys")));
    }
    let mut values = BTreeMap::new();
    for _ in 0..keys {
        let key = reader.string()?;
        let kind = reader.u32()?;
        if let Some(value) = reader.value(kind, wanted(&key))? {
            values.insert(key, value);
        }
    }
    let alignment = match values.get("general.alignment") {
        None => 32,
        Some(Value::Number(number)) if number.is_power_of_two() => *number,
        Some(other) => return Err(Damage::What(format!("an alignment of {other:?}"))),
    };
    let mut header = facts(values);
    let mut most = 0_u64;
    for _ in 0..tensors {
        let (tensor, offset) = tensor(reader)?;
        let end = offset.checked_add(tensor.bytes).ok_or(Damage::End)?;
        most = most.max(end);
        header.tensors.push(tensor);
    }
    if header.vocabulary == 0
        && let Some(embeddings) = header
            .tensors
            .iter()
            .find(|tensor| tensor.name == "token_embd.weight")
    {
        header.vocabulary = embeddings.shape[1];
    }
    let needs = match tensors {
        0 => reader.at,
        _ => reader
            .at
            .checked_next_multiple_of(alignment)
            .and_then(|data| data.checked_add(most))
            .ok_or(Damage::End)?,
    };
    Ok((header, needs))
}

fn facts(mut values: BTreeMap<String, Value>) -> Header {
    let text = |value: Option<Value>| match value {
        Some(Value::Text(text)) => Some(text),
        _ => None,
    };
    let architecture = text(values.remove("general.architecture")).unwrap_or_default();
    let count = |key: &str| match values.get(key) {
        Some(Value::Number(number) | Value::Count(number)) => *number,
        Some(Value::Numbers(numbers)) => numbers.len() as u64,
        _ => 0,
    };
    let quantisation = match values.get("general.file_type") {
        Some(Value::Number(number)) => file_type(*number),
        _ => "unknown".to_owned(),
    };
    let (tokens, merges) = (count("tokenizer.ggml.tokens"), count("tokenizer.ggml.merges"));
    let parts = count("split.count").max(1);
    let name = text(values.remove("general.name"));
    let prefix = format!("{architecture}.");
    let keys = Keys(
        values
            .into_iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?.to_owned(), value)))
            .collect(),
    );
    Header {
        name,
        quantisation,
        parts,
        context_trained: keys.number("context_length").unwrap_or(0),
        embedding: keys.number("embedding_length").unwrap_or(0),
        vocabulary: if tokens > 0 {
            tokens
        } else {
            keys.number("vocab_size").unwrap_or(0)
        },
        merges,
        layers: Layers::of(&architecture, &keys),
        architecture,
        ..Header::default()
    }
}

/// A tensor and the offset of its data.
fn tensor<R: BufRead>(reader: &mut Reader<R>) -> Result<(Tensor, u64), Damage> {
    let name = reader.string()?;
    if name.len() >= MOST_NAME {
        return Err(Damage::What(format!("a tensor's name of {} bytes", name.len())));
    }
    let dimensions = reader.u32()? as usize;
    let mut shape = [1_u64; 4];
    let Some(lengths) = shape.get_mut(..dimensions) else {
        return Err(Damage::What(format!("tensor {name}: {dimensions} dimensions")));
    };
    let mut elements = 1_u64;
    for length in lengths {
        *length = reader.u64()?;
        elements = elements
            .checked_mul(*length)
            .ok_or_else(|| Damage::What(format!("tensor {name}: its shape overflows")))?;
    }
    let kind = GgmlType(reader.u32()?);
    let (block, block_bytes) = kind.block();
    let bytes = (elements / block).checked_mul(block_bytes).ok_or(Damage::End)?;
    let offset = reader.u64()?;
    Ok((
        Tensor {
            name,
            kind,
            shape,
            bytes,
        },
        offset,
    ))
}
