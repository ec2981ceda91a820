//! Reads what llama-imatrix writes.

use std::collections::BTreeMap;
use std::path::Path;

use super::{CHUNK_COUNT, CHUNK_SIZE, COUNTS, DATASETS, Entry, Imatrix, ImatrixError, SUMS};
use crate::gguf::{Gguf, MAGIC, TensorInfo, TensorType};

pub(super) fn open(path: &Path) -> Result<Imatrix, ImatrixError> {
    let bytes = std::fs::read(path).map_err(|source| ImatrixError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    let broken = |why: String| ImatrixError::Broken {
        path: path.to_path_buf(),
        why,
    };
    let imatrix = if bytes.starts_with(&MAGIC) {
        drop(bytes);
        gguf(&Gguf::open(path)?)?
    } else {
        legacy(&bytes).map_err(broken)?
    };
    if imatrix.entries.is_empty() {
        return Err(broken("it names no tensor".into()));
    }
    for (name, entry) in &imatrix.entries {
        // A mean square is a number, and not below zero: the kernels divide by sums of them.
        if entry.sums.iter().any(|sum| !sum.is_finite() || *sum < 0.0) {
            return Err(broken(format!("{name} has a sum of squares that is none")));
        }
    }
    Ok(imatrix)
}

fn gguf(file: &Gguf) -> Result<Imatrix, ImatrixError> {
    let broken = |why: String| ImatrixError::Broken {
        path: file.path().to_path_buf(),
        why,
    };
    let small = |key: &str| -> Result<u32, ImatrixError> {
        u32::try_from(file.unsigned(key)?).map_err(|_| broken(format!("{key} is too large")))
    };
    let mut halves: BTreeMap<&str, (Option<&TensorInfo>, Option<&TensorInfo>)> = BTreeMap::new();
    for tensor in file.tensors() {
        if tensor.kind != TensorType::F32 {
            return Err(broken(format!(
                "{} is {}, where F32 is wanted",
                tensor.name, tensor.kind
            )));
        }
        if let Some(name) = tensor.name.strip_suffix(SUMS) {
            halves.entry(name).or_default().0 = Some(tensor);
        } else if let Some(name) = tensor.name.strip_suffix(COUNTS) {
            halves.entry(name).or_default().1 = Some(tensor);
        } else {
            return Err(broken(format!("it holds a tensor {}", tensor.name)));
        }
    }
    let floats = |tensor: &TensorInfo| -> Vec<f32> {
        let bytes = file.data(tensor).as_chunks::<4>().0.iter();
        bytes.map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    let mut entries = BTreeMap::new();
    for (name, halves) in halves {
        let (Some(sums), Some(counts)) = halves else {
            return Err(broken(format!(
                "{name} has sums without counts, or counts without sums"
            )));
        };
        let (sums, counts) = (floats(sums), floats(counts));
        if counts.is_empty() || !sums.len().is_multiple_of(counts.len()) {
            let why = format!("{name} has {} sums and {} counts", sums.len(), counts.len());
            return Err(broken(why));
        }
        if counts.iter().any(|count| !(0.0..=1e15).contains(count)) {
            return Err(broken(format!("{name} has a count that is none")));
        }
        let counts = counts.iter().map(|count| count.round() as i64).collect();
        entries.insert(name.to_owned(), Entry { sums, counts });
    }
    Ok(Imatrix {
        entries,
        datasets: file.strings(DATASETS)?.to_vec(),
        chunks: small(CHUNK_COUNT)?,
        chunk_size: small(CHUNK_SIZE)?,
    })
}

/// The older format: the sums are multiplied by chunks and divided by tokens already.
fn legacy(bytes: &[u8]) -> Result<Imatrix, String> {
    let mut cursor = Cursor { bytes };
    let mut imatrix = Imatrix::default();
    let entries = cursor.int()?;
    if entries < 1 {
        return Err("it begins neither as a GGUF file nor as the older format".into());
    }
    for _ in 0..entries {
        let name = cursor.text()?;
        let count = i64::from(cursor.int()?);
        let values = usize::try_from(cursor.int()?).map_err(|_| "a length below zero".to_owned())?;
        let values = cursor.take(values.saturating_mul(4))?.as_chunks::<4>().0.iter();
        let sums: Vec<f32> = values.map(|bytes| f32::from_le_bytes(*bytes)).collect();
        if sums.is_empty() || count < 0 {
            return Err(format!("{name} has {} values of {count} chunks", sums.len()));
        }
        // llama-quantize takes the values as they are where nothing was counted.
        let counts = vec![count.max(1)];
        if imatrix
            .entries
            .insert(name.clone(), Entry { sums, counts })
            .is_some()
        {
            return Err(format!("{name} stands in it twice"));
        }
    }
    // What follows came later, and may be missing.
    if !cursor.bytes.is_empty() {
        imatrix.chunks = cursor.int()?.max(0).cast_unsigned();
        if !cursor.bytes.is_empty() {
            imatrix.datasets.push(cursor.text()?);
            imatrix.datasets.retain(|name| !name.is_empty());
        }
    }
    Ok(imatrix)
}

struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.bytes.split_at_checked(n).ok_or("it is cut short")?;
        self.bytes = rest;
        Ok(taken)
    }

    fn int(&mut self) -> Result<i32, String> {
        let bytes = self.take(4)?;
        bytes
            .try_into()
            .map(i32::from_le_bytes)
            .map_err(|_| "it is cut short".to_owned())
    }

    fn text(&mut self) -> Result<String, String> {
        let length =
            usize::try_from(self.int()?).map_err(|_| "a name with a length below zero".to_owned())?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }
}
