//! A safetensors file whose tensors are streamed after its header.
//!
//! Source: <https://github.com/huggingface/safetensors#format>: eight bytes with the length of the header,
//! JSON padded with spaces, then the tensors without gaps in the order of their offsets.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::{Map, json};

use crate::gguf::TensorType;

/// Starts the file: writes the header for `tensors` (name and shape), all of type `kind`. What is written next
/// must be their elements, in this order.
pub(super) fn create<'a>(
    path: &Path,
    kind: TensorType,
    tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
) -> io::Result<BufWriter<File>> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for (name, shape) in tensors {
        let end = offset + shape.iter().product::<usize>() as u64 * kind.block_bytes();
        let entry = json!({"dtype": kind.name(), "shape": shape, "data_offsets": [offset, end]});
        header.insert(name.to_owned(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    Ok(file)
}
