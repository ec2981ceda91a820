//! Files of the fixtures with some bytes changed: an error or a result, never a panic. convert/fuzz looks deeper.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::path::Path;

use pipit_convert::adapter::PeftAdapter;
use pipit_convert::checkpoint::Checkpoint;
use pipit_convert::vocab::Vocab;
use pipit_convert::{arch, json};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Map, Value};
use support::fixture;

/// One change of a file.
#[derive(Debug, Clone)]
enum Change {
    /// Another byte.
    Set(Index, u8),
    /// A part is not there.
    Remove(Index, usize),
    /// A part is there twice.
    Repeat(Index, usize),
    /// A number of JSON becomes another one.
    Number(Index, i64),
}

fn change() -> impl Strategy<Value = Change> {
    let number = prop::sample::select(vec![-1, 0, 1, 2, 7, 1 << 31, i64::MAX]);
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        (any::<Index>(), 1usize..40).prop_map(|(at, n)| Change::Remove(at, n)),
        (any::<Index>(), 1usize..40).prop_map(|(at, n)| Change::Repeat(at, n)),
        (any::<Index>(), number).prop_map(|(at, n)| Change::Number(at, n)),
    ]
}

/// Applies the changes to the first `within` bytes.
fn damage(bytes: &mut Vec<u8>, within: usize, changes: &[Change]) {
    for change in changes {
        let within = within.min(bytes.len());
        if within == 0 {
            return;
        }
        match change {
            Change::Set(at, byte) => bytes[at.index(within)] = *byte,
            Change::Remove(at, n) => {
                let at = at.index(within);
                let end = (at + n).min(bytes.len());
                bytes.drain(at..end);
            }
            Change::Repeat(at, n) => {
                let at = at.index(within);
                let part = bytes[at..(at + n).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
            Change::Number(at, number) => {
                let digit = |byte: &u8| byte.is_ascii_digit();
                let starts: Vec<_> = (1..within)
                    .filter(|i| digit(&bytes[*i]) && !digit(&bytes[i - 1]))
                    .collect();
                if starts.is_empty() {
                    continue;
                }
                let start = starts[at.index(starts.len())];
                let end = (start..bytes.len())
                    .find(|i| !digit(&bytes[*i]))
                    .unwrap_or(bytes.len());
                bytes.splice(start..end, number.to_string().into_bytes());
            }
        }
    }
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec(change(), 1..4)
}

/// A folder with these files of a fixture, of which `damaged` is changed.
fn folder(from: &Path, damaged: &str, within: usize, changes: &[Change]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        if entry.file_type().unwrap().is_file() && name != "expected.json" && name != "merged.safetensors" {
            let mut bytes = std::fs::read(entry.path()).unwrap();
            if name == damaged {
                damage(&mut bytes, within, changes);
            }
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
    }
    dir
}

fn read_all(checkpoint: &Checkpoint) {
    for name in checkpoint.names() {
        if let Ok(tensor) = checkpoint.tensor(name) {
            let _ = tensor.to_f32();
        }
    }
}

/// What follows from a configuration. Models of absurd depth are valid promises that no shard keeps.
fn rules(config: &Map<String, Value>) {
    let layers = config.get("num_hidden_layers").and_then(Value::as_u64);
    let Ok(arch) = arch::of_config(config) else {
        return;
    };
    if layers.unwrap_or(0) < 1000 {
        let _ = (arch.tensors)(config);
    }
    let _ = (arch.extra_tensors)(config);
    let _ = (arch.metadata)(config);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_damaged_header_of_a_shard(changes in changes(), quantized in any::<bool>()) {
        let from = fixture(if quantized { "quantized/fp8-block" } else { "tied" });
        // The header takes some two thousand bytes.
        let dir = folder(&from, "model.safetensors", 2500, &changes);
        if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
            read_all(&checkpoint);
        }
    }

    #[test]
    fn a_damaged_configuration(changes in changes(), which in any::<Index>()) {
        let mut folders = vec![fixture("tied"), fixture("untied"), fixture("quantized/fp8-block"), fixture("quantized/int8")];
        let all = std::fs::read_dir(fixture("architectures")).unwrap();
        folders.extend(all.map(|entry| entry.unwrap().path()).filter(|path| path.join("config.json").is_file()));
        folders.sort();
        let from = &folders[which.index(folders.len())];
        let mut bytes = std::fs::read(from.join("config.json")).unwrap();
        let all = bytes.len();
        damage(&mut bytes, all, &changes);
        if let Ok(config) = json::from_slice::<Map<String, Value>>(&bytes) {
            rules(&config);
        }
        let dir = folder(from, "config.json", usize::MAX, &changes);
        if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
            read_all(&checkpoint);
        }
    }

    #[test]
    fn a_damaged_adapter(changes in changes(), weights in any::<bool>()) {
        let (file, within) = match weights {
            true => ("adapter_model.safetensors", 1000),
            false => ("adapter_config.json", usize::MAX),
        };
        for name in ["plain", "rslora"] {
            let dir = folder(&fixture("adapters").join(name), file, within, &changes);
            let _ = PeftAdapter::open(dir.path());
        }
    }

    #[test]
    fn a_damaged_tokenizer(changes in changes(), which in 0usize..2) {
        let file = ["tokenizer.json", "tokenizer_config.json"][which];
        let dir = folder(&fixture("tied"), file, usize::MAX, &changes);
        let config: Map<String, Value> = json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
        let _ = Vocab::from_folder(dir.path(), &config);
    }
}
