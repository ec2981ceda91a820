//! Names and keys of a file in parts, as llama.cpp has them: its loader finds the parts by their names.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use super::{ALIGNMENT, GgufError, Header, Value};

/// The key with the number of a part, from 0 (u16).
pub const NO: &str = "split.no";
/// The key with the number of parts (u16).
pub const COUNT: &str = "split.count";
/// The key with the number of tensors of all parts together (i32).
pub const TENSORS: &str = "split.tensors.count";
/// The names have room for five digits, the keys for sixteen bits.
pub(super) const MAX_PARTS: u64 = u16::MAX as u64;

/// The path of part `no`, from 0: `STEM-00001-of-00003.gguf` (`llama_split_path`).
pub fn path(stem: &Path, no: u64, count: u64) -> PathBuf {
    let mut path = stem.as_os_str().to_owned();
    path.push(format!("-{:05}-of-{count:05}.gguf", no + 1));
    path.into()
}

/// What the path of a part says: its stem, its number from 0, and the number of parts.
pub fn parse(path: &Path) -> Option<(PathBuf, u64, u64)> {
    let number = |text: &str| -> Option<u64> {
        let digits = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok())?
    };
    let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (rest, count) = name.rsplit_once("-of-")?;
    let (stem, no) = rest.rsplit_once('-')?;
    let (no, count) = (number(no)?.checked_sub(1)?, number(count)?);
    Some((path.with_file_name(stem), no, count))
}

/// The paths of the files of a result named `path`, in so many parts. `a.gguf` in two parts is
/// `a-00001-of-00002.gguf` and `a-00002-of-00002.gguf`.
pub fn paths(path: &Path, count: usize) -> Vec<PathBuf> {
    if count == 1 {
        return vec![path.to_path_buf()];
    }
    let stem = match path.extension() {
        Some(extension) if extension == "gguf" => path.with_extension(""),
        _ => path.to_path_buf(),
    };
    (0..count as u64)
        .map(|no| self::path(&stem, no, count as u64))
        .collect()
}

/// Cuts a planned file into parts whose tensors take at most `max_bytes` each, in their order. A tensor that is
/// larger has a part of its own. One part comes back unchanged.
///
/// As in llama-gguf-split, the keys are not counted, and all of them stand in the first part.
pub fn cut(header: &Header, max_bytes: u64) -> Result<Vec<Cow<'_, Header>>, GgufError> {
    let starts = starts(header, max_bytes);
    let count = starts.len();
    if count == 1 {
        return Ok(vec![Cow::Borrowed(header)]);
    }
    let total = header.tensors.len();
    if count as u64 > MAX_PARTS || i32::try_from(total).is_err() {
        return Err(GgufError::Unwritable(format!(
            "{count} parts of {max_bytes} bytes are too many"
        )));
    }
    let ends = starts.iter().skip(1).chain([&total]);
    let parts = starts.iter().zip(ends).enumerate().map(|(no, (start, end))| {
        let mut metadata = match no {
            0 => header.metadata.clone(),
            _ => Vec::new(),
        };
        metadata.push((NO.into(), Value::U16(no as u16)));
        metadata.push((COUNT.into(), Value::U16(count as u16)));
        metadata.push((TENSORS.into(), Value::I32(total as i32)));
        Cow::Owned(Header {
            metadata,
            tensors: header.tensors[*start..*end].to_vec(),
        })
    });
    Ok(parts.collect())
}

/// The tensors that parts start with.
fn starts(header: &Header, max_bytes: u64) -> Vec<usize> {
    let mut starts = vec![0];
    let mut size = 0u64;
    for (at, tensor) in header.tensors.iter().enumerate() {
        let bytes = tensor.size().unwrap_or(u64::MAX / 2).next_multiple_of(ALIGNMENT);
        size = size.saturating_add(bytes);
        if size > max_bytes && starts.last() != Some(&at) {
            size = bytes;
            starts.push(at);
        }
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::super::{TensorPlan, TensorType};
    use super::*;

    #[test]
    fn names_of_parts_are_llama_cpps() {
        let third = path(Path::new("a/b.Q4_K_M"), 2, 12);
        assert_eq!(third, Path::new("a/b.Q4_K_M-00003-of-00012.gguf"));
        assert_eq!(parse(&third), Some((PathBuf::from("a/b.Q4_K_M"), 2, 12)));
        for name in [
            "b.gguf",
            "b-1-of-2.gguf",
            "b-00000-of-00002.gguf",
            "b-00001-of-00002.bin",
            "b-+0001-of-00002.gguf",
        ] {
            assert_eq!(parse(Path::new(name)), None, "{name}");
        }
    }

    #[test]
    fn a_file_is_cut_between_tensors() {
        let tensor = |name: &str, n| TensorPlan {
            name: name.into(),
            dimensions: vec![n],
            kind: TensorType::F32,
        };
        let header = Header {
            metadata: vec![("a".into(), Value::U32(1))],
            tensors: vec![
                tensor("big", 100),
                tensor("x", 8),
                tensor("y", 1),
                tensor("z", 8),
                tensor("last", 9),
            ],
        };
        // 400 -> 416, 32, 4 -> 32, 32, 36 -> 64 bytes.
        let parts = cut(&header, 64).unwrap();
        let names: Vec<Vec<_>> = parts
            .iter()
            .map(|part| part.tensors.iter().map(|t| t.name.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["big"], vec!["x", "y"], vec!["z"], vec!["last"]]);
        let keys: Vec<_> = parts.iter().map(|part| part.metadata.len()).collect();
        assert_eq!(keys, [4, 3, 3, 3]);
        assert_eq!(parts[2].metadata[0], (NO.into(), Value::U16(2)));
        assert_eq!(parts[3].metadata[2], (TENSORS.into(), Value::I32(5)));
        assert_eq!(cut(&header, 1 << 20).unwrap(), [Cow::Borrowed(&header)]);
    }
}
