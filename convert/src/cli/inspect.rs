//! `pipit-convert inspect`

mod groups;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use pipit_convert::checksum::sha256;
use pipit_convert::gguf::{Array, Gguf, Value};
use serde_json::{Map, Value as Json, json};

use super::{Context, size};

/// Show what a GGUF file says of itself: provenance, keys and tensors
///
/// Models, adapters, importance matrices and vocabularies alike; of a file in parts, name any part. Of long arrays
/// and texts only the start is shown, also with --json (`elements` and `start`); what the file was made of is shown
/// whole.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pipit-convert inspect model.gguf
  pipit-convert inspect model.gguf --sha256
  pipit-convert inspect model.gguf --json | jq '.metadata[\"general.name\"]'")]
pub(super) struct Args {
    /// The GGUF file
    #[arg(value_name = "FILE.gguf")]
    file: PathBuf,
    /// Read the whole file and show its checksum
    #[arg(long)]
    sha256: bool,
}

/// So many elements of an array are shown.
const SHOWN: usize = 8;
/// So many characters of a text are shown where there is one line for it.
const SHOWN_TEXT: usize = 100;

/// One file on the disk.
struct OnDisk<'a> {
    path: &'a Path,
    bytes: u64,
    sha256: Option<String>,
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<()> {
    let gguf = Gguf::open(&args.file)?;
    let files = gguf
        .paths()
        .map(|path| on_disk(path, args.sha256))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut stdout = std::io::stdout().lock();
    if context.json {
        writeln!(stdout, "{}", report(&gguf, &files))?;
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
    for file in files
        .iter()
        .filter(|file| files.len() > 1 || file.sha256.is_some())
    {
        let sum = file.sha256.as_deref().unwrap_or_default();
        writeln!(stdout, "  {}  {}  {sum}", file.path.display(), size(file.bytes))?;
    }
    for (title, keys) in groups::of(gguf.metadata()) {
        writeln!(stdout, "\n{title}")?;
        let width = keys.iter().map(|(key, _)| shown_name(key).chars().count()).max();
        let width = width.unwrap_or(0);
        for (key, value) in keys {
            for line in lines(key, value) {
                writeln!(
                    stdout,
                    "  {:width$}  {:16} {line}",
                    shown_name(key),
                    value.type_name()
                )?;
            }
        }
    }
    print_tensors(&gguf, &mut stdout)?;
    Ok(())
}

fn on_disk(path: &Path, sum: bool) -> anyhow::Result<OnDisk<'_>> {
    let cannot = || format!("cannot read {}", path.display());
    Ok(OnDisk {
        path,
        bytes: path.metadata().with_context(cannot)?.len(),
        sha256: sum.then(|| sha256(path)).transpose().with_context(cannot)?,
    })
}

fn print_tensors(gguf: &Gguf, stdout: &mut dyn Write) -> std::io::Result<()> {
    if gguf.tensors().is_empty() {
        return writeln!(stdout, "\nno tensors");
    }
    writeln!(stdout, "\ntensors")?;
    let width = gguf
        .tensors()
        .iter()
        .map(|tensor| shown_name(&tensor.name).chars().count())
        .max()
        .unwrap_or(0);
    let mut by_type: BTreeMap<&str, (usize, u64, u64)> = BTreeMap::new();
    for tensor in gguf.tensors() {
        let dimensions: Vec<_> = tensor.dimensions.iter().map(u64::to_string).collect();
        writeln!(
            stdout,
            "  {:width$}  {:7} {:>14}  {:>10}",
            shown_name(&tensor.name),
            tensor.kind,
            dimensions.join("×"),
            size(tensor.size),
        )?;
        let sum = by_type.entry(tensor.kind.name()).or_default();
        *sum = (sum.0 + 1, sum.1 + tensor.elements(), sum.2 + tensor.size);
    }
    writeln!(stdout)?;
    let (mut elements, mut bytes) = (0, 0);
    for (kind, (n, own, size_of)) in by_type {
        let bits = bits(size_of, own);
        writeln!(stdout, "  {kind:7} {n:5} tensors  {:>10}  {bits}", size(size_of))?;
        elements += own;
        bytes += size_of;
    }
    let n = gguf.tensors().len();
    writeln!(
        stdout,
        "  {:7} {n:5} tensors  {:>10}  {}, {elements} parameters",
        "all",
        size(bytes),
        bits(bytes, elements)
    )
}

fn bits(bytes: u64, elements: u64) -> String {
    format!(
        "{:.2} bits per weight",
        bytes as f64 * 8.0 / elements.max(1) as f64
    )
}

/// A name without control characters: a file can hold anything.
fn shown_name(name: &str) -> String {
    name.escape_debug().to_string()
}

/// What is shown of a value: one line, or of what the file was made of one line for each element.
fn lines(key: &str, value: &Value) -> Vec<String> {
    match value {
        Value::Array(Array::String(texts)) if key.starts_with("pipit.") && !texts.is_empty() => {
            texts.iter().map(|text| format!("{text:?}")).collect()
        }
        value => vec![text(value)],
    }
}

/// One line, without control characters.
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

fn report(gguf: &Gguf, files: &[OnDisk<'_>]) -> Json {
    let metadata: Map<String, Json> = gguf
        .metadata()
        .iter()
        .map(|(key, value)| (key.clone(), json(value)))
        .collect();
    let provenance: Map<String, Json> = gguf
        .metadata()
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix("pipit.")?.to_owned(), whole(value))))
        .collect();
    let tensors: Vec<_> = gguf
        .tensors()
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.name, "type": tensor.kind.name(), "dimensions": tensor.dimensions,
                "offset": tensor.offset, "bytes": tensor.size, "file": tensor.file,
            })
        })
        .collect();
    let files: Vec<_> = files
        .iter()
        .map(|file| json!({"path": file.path, "bytes": file.bytes, "sha256": file.sha256}))
        .collect();
    json!({
        "version": gguf.version(), "alignment": gguf.alignment(), "bytes": gguf.file_size(), "files": files,
        "provenance": provenance, "metadata": metadata, "tensors": tensors,
    })
}

/// A value with all its elements.
fn whole(value: &Value) -> Json {
    match value {
        Value::Array(array) => start(array, array.len()),
        value => json(value),
    }
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
        Value::Array(array) => json!({"elements": array.len(), "start": start(array, SHOWN)}),
    }
}

fn start(array: &Array, most: usize) -> Json {
    let n = array.len().min(most);
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
