//! `pipit-convert inspect`

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use pipit_convert::gguf::{Array, Gguf, Value};
use serde_json::{Map, Value as Json, json};

use super::{Context, size};

/// Show the keys and tensors of a GGUF file
///
/// Of long arrays and texts only the start is shown, also with --json (`elements` and `start`).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pipit-convert inspect model.gguf
  pipit-convert inspect model.gguf --json | jq '.metadata[\"general.name\"]'")]
pub(super) struct Args {
    /// The GGUF file
    #[arg(value_name = "FILE.gguf")]
    file: PathBuf,
}

/// So many elements of an array are shown.
const SHOWN: usize = 8;
/// So many characters of a text are shown where there is one line for it.
const SHOWN_TEXT: usize = 100;

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let gguf = Gguf::open(&args.file)?;
    let mut stdout = std::io::stdout().lock();
    if context.json {
        writeln!(stdout, "{}", report(&gguf))?;
        return Ok(());
    }
    writeln!(
        stdout,
        "{}: GGUF version {}, {} keys, {} tensors, {}",
        args.file.display(),
        gguf.version(),
        gguf.metadata().len(),
        gguf.tensors().len(),
        size(gguf.file_size()),
    )?;
    let width = gguf
        .metadata()
        .iter()
        .map(|(key, _)| key.chars().count())
        .max()
        .unwrap_or(0);
    for (key, value) in gguf.metadata() {
        writeln!(stdout, "{key:width$}  {:16} {}", value.type_name(), text(value))?;
    }
    writeln!(stdout)?;
    let width = gguf
        .tensors()
        .iter()
        .map(|tensor| tensor.name.chars().count())
        .max()
        .unwrap_or(0);
    let mut by_type: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for tensor in gguf.tensors() {
        let dimensions: Vec<_> = tensor.dimensions.iter().map(u64::to_string).collect();
        let (name, bytes) = (tensor.name.escape_debug().to_string(), size(tensor.size));
        writeln!(
            stdout,
            "{name:width$}  {:7} {:>14}  {bytes:>10}",
            tensor.kind,
            dimensions.join("×")
        )?;
        let sum = by_type.entry(tensor.kind.name()).or_default();
        *sum = (sum.0 + 1, sum.1 + tensor.size);
    }
    writeln!(stdout)?;
    for (kind, (n, bytes)) in by_type {
        writeln!(stdout, "{kind:7} {n:5} tensors  {:>10}", size(bytes))?;
    }
    Ok(())
}

/// One line, without control characters: a file can hold anything.
fn text(value: &Value) -> String {
    let text = match json(value) {
        Json::String(text) => format!("{text:?}"),
        Json::Object(array) => {
            let more = if array["elements"].as_u64() > Some(SHOWN as u64) {
                ", …"
            } else {
                ""
            };
            let start = array["start"].to_string();
            format!(
                "{}{more}] ({} elements)",
                start.trim_end_matches(']'),
                array["elements"]
            )
        }
        other => other.to_string(),
    };
    if text.chars().count() <= SHOWN_TEXT {
        return text;
    }
    text.chars().take(SHOWN_TEXT).chain(['…']).collect()
}

fn report(gguf: &Gguf) -> Json {
    let metadata: Map<String, Json> = gguf
        .metadata()
        .iter()
        .map(|(key, value)| (key.clone(), json(value)))
        .collect();
    let tensors: Vec<_> = gguf
        .tensors()
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.name, "type": tensor.kind.name(), "dimensions": tensor.dimensions,
                "offset": tensor.offset, "bytes": tensor.size,
            })
        })
        .collect();
    json!({
        "version": gguf.version(), "alignment": gguf.alignment(), "bytes": gguf.file_size(),
        "metadata": metadata, "tensors": tensors,
    })
}

fn json(value: &Value) -> Json {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::F32(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        Value::F64(v) => json!(v),
        Value::Array(array) => json!({"elements": array.len(), "start": start(array)}),
    }
}

fn start(array: &Array) -> Json {
    let n = array.len().min(SHOWN);
    match array {
        Array::U8(v) => json!(v[..n]),
        Array::I8(v) => json!(v[..n]),
        Array::U16(v) => json!(v[..n]),
        Array::I16(v) => json!(v[..n]),
        Array::U32(v) => json!(v[..n]),
        Array::I32(v) => json!(v[..n]),
        Array::F32(v) => json!(v[..n]),
        Array::Bool(v) => json!(v[..n]),
        Array::String(v) => json!(v[..n]),
        Array::U64(v) => json!(v[..n]),
        Array::I64(v) => json!(v[..n]),
        Array::F64(v) => json!(v[..n]),
    }
}
