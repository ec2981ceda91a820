//! Walks through the bytes of one GGUF file: its keys, and where its tensors lie.
//!
//! Nothing in a file is believed: every length is checked against what is left of the file before anything is
//! allocated for it, so that a hostile file costs at most a few times its own size, and never a panic.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::TensorInfo;
use crate::gguf::value::TYPE_NAMES;
use crate::gguf::{
    ALIGNMENT, Array, GgufError, MAGIC, MAX_DIMENSION, MAX_DIMENSIONS, MAX_TENSOR_NAME, TensorType, VERSION,
    Value,
};

/// The longest key in bytes, as the specification has it.
const MAX_KEY: u64 = 65535;

/// The header of one file.
pub(super) struct Parsed {
    pub(super) version: u32,
    pub(super) alignment: u64,
    /// Where the first tensor starts, in bytes from the start of the file.
    pub(super) data_start: usize,
    pub(super) metadata: Vec<(String, Value)>,
    pub(super) by_key: BTreeMap<String, usize>,
    pub(super) tensors: Vec<TensorInfo>,
}

/// Reads the header, and checks that every tensor lies within the file and over no other.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Parsed, GgufError> {
    let mut cursor = Cursor { path, bytes, at: 0 };
    if !bytes.starts_with(&MAGIC) {
        let start = bytes[..bytes.len().min(4)].to_vec();
        return Err(GgufError::NotGguf {
            path: path.to_path_buf(),
            start,
        });
    }
    cursor.at = MAGIC.len();
    let version = cursor.u32("the version")?;
    if version != 2 && version != VERSION {
        return Err(GgufError::Version {
            path: path.to_path_buf(),
            version,
        });
    }
    let n_tensors = cursor.u64("the number of tensors")?;
    let n_keys = cursor.u64("the number of keys")?;
    // A key takes at least 13 bytes, a tensor at least 32 bytes of the file.
    let n_keys = cursor.count(n_keys, 13, "keys")?;
    let n_tensors = cursor.count(n_tensors, 32, "tensors")?;

    let mut metadata: Vec<(String, Value)> = Vec::new();
    let mut by_key = BTreeMap::new();
    for _ in 0..n_keys {
        let key = cursor.string("a key", MAX_KEY)?;
        let value = cursor.value(&key)?;
        if by_key.insert(key.clone(), metadata.len()).is_some() {
            return Err(cursor.broken(format!("the key {key} stands in it twice")));
        }
        metadata.push((key, value));
    }
    let alignment = match by_key.get("general.alignment").map(|&at| &metadata[at].1) {
        None => ALIGNMENT,
        Some(Value::U32(alignment)) if alignment.is_power_of_two() && *alignment >= 8 => (*alignment).into(),
        Some(other) => return Err(cursor.broken(format!("general.alignment is {other:?}"))),
    };
    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..n_tensors {
        let tensor = cursor.tensor_info(alignment)?;
        if !names.insert(tensor.name.clone()) {
            return Err(cursor.broken(format!("the tensor {} stands in it twice", tensor.name)));
        }
        tensors.push(tensor);
    }
    let header_end = cursor.at as u64;
    let data_start = header_end
        .checked_next_multiple_of(alignment)
        .ok_or_else(|| cursor.broken("the header is too long".into()))?;
    check_ranges(&cursor, &tensors, data_start)?;
    Ok(Parsed {
        version,
        alignment,
        // With tensors, this is inside the file (check_ranges); without, it is never used to index.
        data_start: data_start as usize,
        metadata,
        by_key,
        tensors,
    })
}

fn check_ranges(cursor: &Cursor<'_>, tensors: &[TensorInfo], data_start: u64) -> Result<(), GgufError> {
    let mut ranges = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let end = tensor
            .offset
            .checked_add(tensor.size)
            .and_then(|end| end.checked_add(data_start));
        let end = end.ok_or_else(|| cursor.broken(format!("tensor {} lies beyond any file", tensor.name)))?;
        if end > cursor.bytes.len() as u64 {
            return Err(GgufError::Truncated {
                path: cursor.path.to_path_buf(),
                what: format!(
                    "tensor {} ends at byte {end}, the file has {}",
                    tensor.name,
                    cursor.bytes.len()
                ),
            });
        }
        ranges.push((tensor.offset, tensor.offset + tensor.size, &tensor.name));
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if pair[1].0 < pair[0].1 {
            return Err(cursor.broken(format!("tensors {} and {} overlap", pair[0].2, pair[1].2)));
        }
    }
    Ok(())
}

/// Walks through the header.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn broken(&self, why: String) -> GgufError {
        GgufError::Broken {
            path: self.path.to_path_buf(),
            why,
        }
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, n: u64, what: &str) -> Result<&[u8], GgufError> {
        if n > self.left() {
            return Err(GgufError::Truncated {
                path: self.path.to_path_buf(),
                what: format!(
                    "{what} at byte {} needs {n} bytes, {} are left",
                    self.at,
                    self.left()
                ),
            });
        }
        let start = self.at;
        self.at += n as usize;
        Ok(&self.bytes[start..self.at])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A number of things that take at least `least` bytes each.
    fn count(&self, n: u64, least: u64, what: &str) -> Result<usize, GgufError> {
        if n.checked_mul(least).is_none_or(|bytes| bytes > self.left()) {
            return Err(GgufError::Truncated {
                path: self.path.to_path_buf(),
                what: format!("it promises {n} {what}, and {} bytes are left", self.left()),
            });
        }
        Ok(n as usize)
    }

    fn string(&mut self, what: &str, longest: u64) -> Result<String, GgufError> {
        let length = self.u64(what)?;
        if length > longest {
            return Err(self.broken(format!("{what} has {length} bytes")));
        }
        let bytes = self.take(length, what)?.to_vec();
        String::from_utf8(bytes).map_err(|_| self.broken(format!("{what} is not UTF-8")))
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let kind = self.u32(key)?;
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(key)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(key)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(key)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(key)?)),
            4 => Value::U32(self.u32(key)?),
            5 => Value::I32(i32::from_le_bytes(self.array(key)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::String(self.string(key, u64::MAX)?),
            9 => {
                let kind = self.u32(key)?;
                let n = self.u64(key)?;
                Value::Array(self.elements(key, kind, n)?)
            }
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(self.broken(format!("the key {key} has the unknown type {kind}"))),
        })
    }

    fn bool(&mut self, key: &str) -> Result<bool, GgufError> {
        match self.array(key)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.broken(format!("the key {key} has {other} where 0 or 1 should stand"))),
        }
    }

    fn elements(&mut self, key: &str, kind: u32, n: u64) -> Result<Array, GgufError> {
        Ok(match kind {
            0 => Array::U8(self.numbers(key, n, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(key, n, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(key, n, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(key, n, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(key, n, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(key, n, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(key, n, f32::from_le_bytes)?),
            7 => {
                let n = self.count(n, 1, key)?;
                Array::Bool((0..n).map(|_| self.bool(key)).collect::<Result<_, _>>()?)
            }
            8 => {
                let n = self.count(n, 8, key)?;
                Array::String(
                    (0..n)
                        .map(|_| self.string(key, u64::MAX))
                        .collect::<Result<_, _>>()?,
                )
            }
            10 => Array::U64(self.numbers(key, n, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(key, n, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(key, n, f64::from_le_bytes)?),
            _ => {
                let name = TYPE_NAMES.get(kind as usize).unwrap_or(&"unknown type");
                return Err(self.broken(format!("the key {key} is an array of {name} ({kind})")));
            }
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        key: &str,
        n: u64,
        from: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        let n = self.count(n, N as u64, key)?;
        let bytes = self.take((n * N) as u64, key)?;
        let (chunks, _) = bytes.as_chunks::<N>();
        Ok(chunks.iter().map(|chunk| from(*chunk)).collect())
    }

    fn tensor_info(&mut self, alignment: u64) -> Result<TensorInfo, GgufError> {
        let name = self.string("the name of a tensor", MAX_TENSOR_NAME as u64)?;
        let n = self.u32(&name)? as usize;
        if n > MAX_DIMENSIONS {
            return Err(self.broken(format!("tensor {name} has {n} dimensions")));
        }
        let dimensions = (0..n).map(|_| self.u64(&name)).collect::<Result<Vec<_>, _>>()?;
        if dimensions.iter().any(|n| *n > MAX_DIMENSION) {
            return Err(self.broken(format!("tensor {name} has the shape {dimensions:?}")));
        }
        let id = self.u32(&name)?;
        let kind = TensorType::from_id(id)
            .ok_or_else(|| self.broken(format!("tensor {name} has the unknown type {id}")))?;
        let offset = self.u64(&name)?;
        if offset % alignment != 0 {
            return Err(self.broken(format!(
                "tensor {name} starts at {offset}, no multiple of {alignment}"
            )));
        }
        let rows = dimensions
            .iter()
            .skip(1)
            .try_fold(1u64, |rows, &n| rows.checked_mul(n));
        let row = dimensions.first().copied().unwrap_or(1);
        let size = kind
            .row_bytes(row)
            .zip(rows)
            .filter(|(_, rows)| row.checked_mul(*rows).is_some_and(|n| n <= i64::MAX as u64))
            .and_then(|(row, rows)| row.checked_mul(rows))
            .ok_or_else(|| {
                self.broken(format!(
                    "tensor {name} of type {kind} has the shape {dimensions:?}"
                ))
            })?;
        Ok(TensorInfo {
            name,
            dimensions,
            kind,
            offset,
            size,
            file: 0,
        })
    }
}
