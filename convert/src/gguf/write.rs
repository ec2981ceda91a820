//! Writes a GGUF file in two passes: first the plan (every offset is known before a byte of a tensor is), then
//! the tensors, one after the other, in pieces of any size.

use std::collections::HashSet;
use std::io::{self, Write};

use super::{
    ALIGNMENT, Array, GgufError, MAGIC, MAX_DIMENSION, MAX_DIMENSIONS, MAX_TENSOR_NAME, TensorType, VERSION,
    Value,
};

/// What will stand in a file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Header {
    /// The keys with their values, in the order in which they are written.
    pub metadata: Vec<(String, Value)>,
    /// The tensors, in the order in which they are written.
    pub tensors: Vec<TensorPlan>,
}

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlan {
    /// The name.
    pub name: String,
    /// The dimensions in ggml's order: the first one is the length of a row.
    pub dimensions: Vec<u64>,
    /// The element type.
    pub kind: TensorType,
}

impl TensorPlan {
    /// The number of bytes; nothing when a row is no whole number of blocks, or the size overflows.
    pub fn size(&self) -> Option<u64> {
        let row = self
            .kind
            .row_bytes(self.dimensions.first().copied().unwrap_or(1))?;
        self.dimensions
            .iter()
            .skip(1)
            .try_fold(row, |bytes, &n| bytes.checked_mul(n))
    }
}

impl Header {
    /// The size in bytes that the file will have.
    pub fn file_size(&self) -> Result<u64, GgufError> {
        let (header, sizes) = self.encode()?;
        Ok(header.len() as u64
            + sizes
                .iter()
                .map(|size| size.next_multiple_of(ALIGNMENT))
                .sum::<u64>())
    }

    /// The bytes before the data section, and the size of each tensor.
    fn encode(&self) -> Result<(Vec<u8>, Vec<u64>), GgufError> {
        let bad = |why: String| Err(GgufError::Unwritable(why));
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        let mut keys = HashSet::new();
        for (key, value) in &self.metadata {
            if key == "general.alignment" {
                return bad("general.alignment is always the default".into());
            }
            if !keys.insert(key) {
                return bad(format!("the key {key} is given twice"));
            }
            put_string(&mut out, key);
            out.extend(value.type_id().to_le_bytes());
            put_value(&mut out, value);
        }
        let mut names = HashSet::new();
        let mut sizes = Vec::with_capacity(self.tensors.len());
        let mut offset = 0u64;
        for tensor in &self.tensors {
            let TensorPlan {
                name,
                dimensions,
                kind,
            } = tensor;
            if !names.insert(name) {
                return bad(format!("the tensor {name} is given twice"));
            }
            if dimensions.iter().any(|n| *n > MAX_DIMENSION) {
                return bad(format!("tensor {name} has the shape {dimensions:?}"));
            }
            if name.len() > MAX_TENSOR_NAME || dimensions.is_empty() || dimensions.len() > MAX_DIMENSIONS {
                return bad(format!(
                    "tensor {name} has {} dimensions and {} bytes of name",
                    dimensions.len(),
                    name.len()
                ));
            }
            let size = tensor.size().filter(|size| *size <= i64::MAX as u64 / 2);
            let Some(size) = size else {
                return bad(format!(
                    "tensor {name} of shape {dimensions:?} is no whole number of {kind} blocks"
                ));
            };
            put_string(&mut out, name);
            out.extend((dimensions.len() as u32).to_le_bytes());
            for n in dimensions {
                out.extend(n.to_le_bytes());
            }
            out.extend(kind.id().to_le_bytes());
            out.extend(offset.to_le_bytes());
            sizes.push(size);
            offset = match offset.checked_add(size.next_multiple_of(ALIGNMENT)) {
                Some(offset) => offset,
                None => return bad("the file is too long".into()),
            };
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
        Ok((out, sizes))
    }
}

/// Writes the tensors of a planned file.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    names: Vec<String>,
    sizes: Vec<u64>,
    at: usize,
    written: u64,
}

impl<W: Write> Writer<W> {
    /// Plans the file and writes its header.
    pub fn new(mut out: W, header: &Header) -> Result<Self, GgufError> {
        let (bytes, sizes) = header.encode()?;
        out.write_all(&bytes)?;
        let names = header.tensors.iter().map(|tensor| tensor.name.clone()).collect();
        let mut writer = Self {
            out,
            names,
            sizes,
            at: 0,
            written: 0,
        };
        writer.skip_complete()?;
        Ok(writer)
    }

    /// Appends bytes to the tensor whose turn it is; `name` must be its name.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), GgufError> {
        if bytes.is_empty() {
            return Ok(());
        }
        if self.names.get(self.at).map(String::as_str) != Some(name) {
            return Err(GgufError::Unwritable(format!(
                "it is not the turn of tensor {name}"
            )));
        }
        self.written += bytes.len() as u64;
        if self.written > self.sizes[self.at] {
            let size = self.sizes[self.at];
            return Err(GgufError::Unwritable(format!(
                "tensor {name} has more than its {size} bytes"
            )));
        }
        self.out.write_all(bytes)?;
        Ok(self.skip_complete()?)
    }

    /// Whether every tensor has all its bytes.
    pub fn is_complete(&self) -> bool {
        self.at == self.names.len()
    }

    /// Ends the file and gives the place it was written to back. Every tensor must be complete.
    pub fn finish(mut self) -> Result<W, GgufError> {
        if let Some(name) = self.names.get(self.at) {
            let (written, size) = (self.written, self.sizes[self.at]);
            return Err(GgufError::Unwritable(format!(
                "tensor {name} has {written} of its {size} bytes"
            )));
        }
        self.out.flush()?;
        Ok(self.out)
    }

    fn skip_complete(&mut self) -> io::Result<()> {
        while self.sizes.get(self.at) == Some(&self.written) {
            let padding = self.written.next_multiple_of(ALIGNMENT) - self.written;
            self.out.write_all(&[0; ALIGNMENT as usize][..padding as usize])?;
            self.at += 1;
            self.written = 0;
        }
        Ok(())
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push((*v).into()),
        Value::String(v) => put_string(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Array(array) => {
            out.extend(array.type_id().to_le_bytes());
            out.extend((array.len() as u64).to_le_bytes());
            match array {
                Array::U8(v) => out.extend(v),
                Array::I8(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::U16(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::I16(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::U32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::I32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::F32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::Bool(v) => out.extend(v.iter().map(|v| u8::from(*v))),
                Array::String(v) => v.iter().for_each(|v| put_string(out, v)),
                Array::U64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::I64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
                Array::F64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
            }
        }
    }
}
