//! Whether a configuration means the model of the keys that it was read from.
//!
//! A key that the architecture's file does not read could be one that changes what the model computes. So the
//! configuration is turned into keys again, and those are compared with the file's.

use serde_json::{Map, Value as Json};

use super::{ArchError, Architecture};
use crate::gguf::{Array, Gguf, Value};

/// Parts of the names of keys that change what llama.cpp computes. Other keys that are not known are for people.
const MATTERS: &[&str] = &[
    "expert",
    "rope.",
    "scale",
    "softcap",
    "sliding_window",
    "attention.",
    "_length",
];

/// Refuses a file whose keys say something that `config`, read from it, does not.
pub(super) fn check(arch: &Architecture, gguf: &Gguf, config: &Map<String, Json>) -> Result<(), ArchError> {
    let again = (arch.metadata)(config)?;
    let own = format!("{}.", arch.name);
    for (key, value) in gguf.metadata() {
        let Some(name) = key.strip_prefix(&own) else {
            continue;
        };
        match again.iter().find(|(other, _)| other == key) {
            Some((_, other)) if same(value, other) => {}
            Some((_, other)) => {
                return Err(gguf
                    .key_error(
                        key,
                        &format!("is {value:?}, where the rest of the file means {other:?}"),
                    )
                    .into());
            }
            None if changes_nothing(arch.name, name, value) => {}
            None if MATTERS.iter().any(|part| name.contains(part)) => {
                return Err(gguf
                    .key_error(
                        key,
                        "is not known in this architecture, and may change what the model computes",
                    )
                    .into());
            }
            None => tracing::warn!(
                "{}: the key {key} is not known and is left out",
                gguf.path().display()
            ),
        }
    }
    Ok(())
}

/// Whether llama.cpp computes the same with the key as without it.
fn changes_nothing(arch: &str, name: &str, value: &Value) -> bool {
    match (name, value) {
        // Read by every architecture's file, though not all of them write it.
        ("attention.key_length" | "attention.value_length" | "rope.dimension_count" | "vocab_size", _) => {
            true
        }
        ("attention.causal", value) => *value == Value::Bool(true),
        // Granite's switch of the rotation; nothing elsewhere.
        ("rope.scaling.finetuned", value) => arch != "granite" || *value == Value::Bool(true),
        ("rope.scaling.type", value) => value.as_str() == Some("none"),
        (name, Value::F32(factor)) => *factor == 0.0 || (*factor == 1.0 && name.contains("scal")),
        (_, value) => *value == Value::Bool(false) || value.as_u64() == Some(0),
    }
}

/// Whether two values mean the same, whatever their integers are stored as.
fn same(a: &Value, b: &Value) -> bool {
    if a == b {
        return true;
    }
    match (a, b.as_u64()) {
        (Value::Array(Array::I32(all)), Some(n)) => all.iter().all(|one| u64::try_from(*one) == Ok(n)),
        (Value::Array(Array::U32(all)), Some(n)) => all.iter().all(|one| u64::from(*one) == n),
        (a, Some(n)) => a.as_u64() == Some(n),
        _ => false,
    }
}
