//! The GGUF reader and writer: what is written is read back, and no bytes make the reader panic.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::path::Path;

use pipit_convert::gguf::{Array, Gguf, GgufError, Header, TensorPlan, TensorType, Value, Writer};
use proptest::prelude::*;

fn value() -> impl Strategy<Value = Value> {
    let array = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..9).prop_map(Array::U8),
        prop::collection::vec(any::<i16>(), 0..9).prop_map(Array::I16),
        prop::collection::vec(any::<i32>(), 0..9).prop_map(Array::I32),
        prop::collection::vec(-1e9f32..1e9, 0..9).prop_map(Array::F32),
        prop::collection::vec(any::<bool>(), 0..9).prop_map(Array::Bool),
        prop::collection::vec(".{0,9}", 0..9).prop_map(Array::String),
        prop::collection::vec(any::<u64>(), 0..9).prop_map(Array::U64),
        prop::collection::vec(-1e9f64..1e9, 0..9).prop_map(Array::F64),
    ];
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<u32>().prop_map(Value::U32),
        any::<i64>().prop_map(Value::I64),
        (-1e9f32..1e9).prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        ".{0,30}".prop_map(Value::String),
        array.prop_map(Value::Array),
    ]
}

fn header() -> impl Strategy<Value = Header> {
    let metadata = prop::collection::btree_map("[a-z.]{1,20}", value(), 0..6);
    let kind = prop::sample::select(vec![
        TensorType::F32,
        TensorType::F16,
        TensorType::Q8_0,
        TensorType::Q4_K,
    ]);
    let tensor = (kind, 0u64..3, prop::collection::vec(0u64..4, 0..3)).prop_map(|(kind, blocks, rest)| {
        let mut dimensions = vec![blocks * kind.block_elements()];
        dimensions.extend(rest);
        (kind, dimensions)
    });
    let tensors = prop::collection::btree_map("[a-z.0-9]{1,20}", tensor, 0..5);
    (metadata, tensors).prop_map(|(metadata, tensors)| Header {
        metadata: metadata.into_iter().collect(),
        tensors: tensors
            .into_iter()
            .map(|(name, (kind, dimensions))| TensorPlan {
                name,
                dimensions,
                kind,
            })
            .collect(),
    })
}

/// The bytes of tensor `at`: anything that tells tensors apart.
fn content(at: usize, tensor: &TensorPlan) -> Vec<u8> {
    (0..tensor.size().unwrap())
        .map(|i| (i as usize * 7 + at * 31) as u8)
        .collect()
}

fn write(header: &Header) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), header).unwrap();
    for (at, tensor) in header.tensors.iter().enumerate() {
        for piece in content(at, tensor).chunks(50) {
            writer.append(&tensor.name, piece).unwrap();
        }
    }
    writer.finish().unwrap()
}

fn open(bytes: &[u8]) -> Result<Gguf, GgufError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    Gguf::open(file.path())
}

/// Reads everything there is to read.
fn touch(gguf: &Gguf) -> usize {
    gguf.tensors()
        .iter()
        .map(|tensor| gguf.data(tensor).len() + tensor.elements() as usize)
        .sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_is_written_is_read_back(header in header()) {
        let bytes = write(&header);
        prop_assert_eq!(bytes.len() as u64, header.file_size().unwrap());
        let gguf = open(&bytes).unwrap();
        prop_assert_eq!(gguf.version(), 3);
        prop_assert_eq!(gguf.metadata(), &header.metadata[..]);
        prop_assert_eq!(gguf.tensors().len(), header.tensors.len());
        for (at, (found, plan)) in gguf.tensors().iter().zip(&header.tensors).enumerate() {
            prop_assert_eq!((&found.name, &found.dimensions, found.kind), (&plan.name, &plan.dimensions, plan.kind));
            prop_assert_eq!(gguf.data(found), &content(at, plan)[..]);
            prop_assert_eq!(found.offset % 32, 0);
        }
    }

    #[test]
    fn damaged_bytes_are_an_error_or_a_file_never_a_panic(
        header in header(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = write(&header);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(gguf) = open(&bytes) {
            touch(&gguf);
        }
    }

    #[test]
    fn a_file_cut_short_is_never_read_as_whole(header in header(), at in any::<prop::sample::Index>()) {
        let bytes = write(&header);
        let cut = at.index(bytes.len());
        // The padding after the last tensor carries nothing.
        let padding = header.tensors.last().map_or(32, |t| t.size().unwrap().next_multiple_of(32) - t.size().unwrap());
        match open(&bytes[..cut]) {
            Ok(gguf) => {
                prop_assert!((bytes.len() - cut) as u64 <= padding.max(32));
                touch(&gguf);
            }
            Err(error) => prop_assert!(
                matches!(error, GgufError::Truncated { .. } | GgufError::NotGguf { .. }), "{}", error
            ),
        }
    }
}

#[test]
fn huge_promises_cost_nothing() {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    for promise in [u64::MAX, 1 << 60, 1 << 40] {
        bytes.truncate(8);
        bytes.extend(promise.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        assert!(matches!(open(&bytes), Err(GgufError::Truncated { .. })));
        bytes.truncate(8);
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(promise.to_le_bytes());
        assert!(matches!(open(&bytes), Err(GgufError::Truncated { .. })));
        // One key that is an array of so many strings.
        bytes.truncate(8);
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.push(b'k');
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(8u32.to_le_bytes());
        bytes.extend(promise.to_le_bytes());
        assert!(matches!(open(&bytes), Err(GgufError::Truncated { .. })));
    }
}

#[test]
fn what_is_no_gguf_is_named() {
    assert!(matches!(open(b""), Err(GgufError::NotGguf { .. })));
    assert!(matches!(open(b"<!DOCTYPE html>"), Err(GgufError::NotGguf { .. })));
    assert!(matches!(
        open(b"GGUF\0\0\0\x03"),
        Err(GgufError::Version {
            version: 0x0300_0000,
            ..
        })
    ));
    assert!(matches!(
        Gguf::open(Path::new("/nowhere")),
        Err(GgufError::Read { .. })
    ));
    assert!(matches!(Gguf::open(Path::new("/")), Err(GgufError::Read { .. })));
}

#[test]
fn what_breaks_the_format_is_not_written() {
    let tensor = |name: &str, dimensions: &[u64], kind| TensorPlan {
        name: name.into(),
        dimensions: dimensions.into(),
        kind,
    };
    let refused = |tensors: Vec<TensorPlan>| {
        matches!(
            Writer::new(
                Vec::new(),
                &Header {
                    metadata: Vec::new(),
                    tensors
                }
            ),
            Err(GgufError::Unwritable(_))
        )
    };
    assert!(refused(vec![tensor("a", &[33], TensorType::Q8_0)]));
    assert!(refused(vec![tensor("a", &[u64::MAX, 3], TensorType::F32)]));
    assert!(refused(vec![tensor("a", &[1, 1, 1, 1, 1], TensorType::F32)]));
    assert!(refused(vec![tensor(&"a".repeat(64), &[1], TensorType::F32)]));
    assert!(refused(vec![
        tensor("a", &[1], TensorType::F32),
        tensor("a", &[1], TensorType::F32)
    ]));
    let header = Header {
        metadata: Vec::new(),
        tensors: vec![tensor("a", &[2], TensorType::F32)],
    };
    let mut writer = Writer::new(Vec::new(), &header).unwrap();
    assert!(writer.append("b", &[0; 8]).is_err());
    writer.append("a", &[0; 4]).unwrap();
    assert!(writer.finish().is_err());
}

/// A file with one key for each pair and these tensors: name, dimensions, offset. All are F32.
fn raw(keys: &[&str], tensors: &[(&str, &[u64], u64)], data: usize) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    for key in keys {
        bytes.extend((key.len() as u64).to_le_bytes());
        bytes.extend(key.as_bytes());
        bytes.extend(4u32.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
    }
    for (name, dimensions, offset) in tensors {
        bytes.extend((name.len() as u64).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.extend((dimensions.len() as u32).to_le_bytes());
        dimensions.iter().for_each(|n| bytes.extend(n.to_le_bytes()));
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

#[test]
fn what_a_header_may_not_promise_is_named() {
    let says = |bytes: Vec<u8>, part: &str| {
        let error = open(&bytes).unwrap_err().to_string();
        assert!(error.contains(part), "{part:?} is not in {error}");
    };
    let long = "n".repeat(64);
    open(&raw(&["k"], &[("a", &[8], 0), ("b", &[8], 32)], 64)).unwrap();
    open(&raw(&[], &[(&long[..63], &[1, 1, 1, 8], 0)], 32)).unwrap();
    says(raw(&["k", "k"], &[], 0), "the key k stands in it twice");
    says(
        raw(&[], &[("a", &[8], 0), ("a", &[8], 32)], 64),
        "the tensor a stands in it twice",
    );
    says(
        raw(&[], &[("a", &[9], 0), ("b", &[8], 32)], 64),
        "tensors a and b overlap",
    );
    says(raw(&[], &[("a", &[8], 64)], 64), "tensor a ends at byte");
    says(
        raw(&[], &[("a", &[8], u64::MAX - 31)], 64),
        "tensor a lies beyond any file",
    );
    says(raw(&[], &[("a", &[8], 16)], 64), "no multiple of 32");
    says(raw(&[], &[("a", &[1, 1, 1, 1, 8], 0)], 32), "has 5 dimensions");
    says(
        raw(&[], &[(&long, &[8], 0)], 32),
        "the name of a tensor has 64 bytes",
    );
    says(
        raw(&[], &[("a", &[1 << 31], 0)], 64),
        "tensor a has the shape [2147483648]",
    );
    says(
        raw(&[], &[("a", &[0x7fff_ffff, 0x7fff_ffff, 0x7fff_ffff], 0)], 64),
        "tensor a of type F32 has the shape",
    );
    says(
        raw(&[], &[("a", &[0, 0x7fff_ffff, 0x7fff_ffff, 0x7fff_ffff], 0)], 64),
        "tensor a of type F32 has the shape",
    );
}
