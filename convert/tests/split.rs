//! Files in parts: written as llama.cpp loads them, read from any part, and refused when parts do not belong together.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::path::{Path, PathBuf};

use llama_cpp_2::model::params::LlamaModelParams;
use pipit_convert::gguf::{Gguf, Value};
use serde_json::Value as Json;
use support::{fixture, names, pipit_convert, stderr};

/// Runs the program, which must succeed, and gives its report.
fn run(args: &[&str]) -> Json {
    let output = pipit_convert(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Runs the program, which must fail and say all of `parts`.
fn fails(args: &[&str], parts: &[&str]) {
    let output = pipit_convert(args);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
}

/// Converts SmolLM2: the fixtures are smaller than the smallest part.
fn convert(out: &Path, options: &[&str]) -> Json {
    let model = support::smollm2();
    let args = [
        "model",
        model.to_str().unwrap(),
        "-t",
        "Q8_0",
        "-o",
        out.to_str().unwrap(),
    ];
    run(&[&args, options].concat())
}

fn parts(dir: &Path, stem: &str, count: usize) -> Vec<PathBuf> {
    (1..=count)
        .map(|no| dir.join(format!("{stem}-{no:05}-of-{count:05}.gguf")))
        .collect()
}

#[test]
fn a_file_in_parts_is_the_whole_file_to_llama_cpp_and_to_every_command() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("a.gguf");
    convert(&out, &["--no-card"]);
    let whole = Gguf::open(&out).unwrap();
    let report = convert(&out, &["--split-max-size", "50M", "--force"]);
    let files = report["files"].as_array().unwrap();
    let paths = parts(scratch.path(), "a", files.len());
    assert_eq!(files.len(), 3, "{report}");
    for (file, path) in files.iter().zip(&paths) {
        assert_eq!(file["path"].as_str(), path.to_str());
        assert_eq!(file["bytes"].as_u64(), Some(path.metadata().unwrap().len()));
        assert_eq!(
            file["sha256"].as_str().unwrap(),
            pipit_convert::checksum::sha256(path).unwrap()
        );
    }
    // Any part stands for all.
    for path in [&paths[0], &paths[2]] {
        let split = Gguf::open(path).unwrap();
        assert_eq!(split.path(), paths[0]);
        assert_eq!(split.get("split.count"), Some(&Value::U16(files.len() as u16)));
        assert_eq!(split.tensors().len(), whole.tensors().len());
        for (found, tensor) in split.tensors().iter().zip(whole.tensors()) {
            assert_eq!(found.name, tensor.name);
            assert!(split.data(found) == whole.data(tensor), "{}", tensor.name);
        }
        let own = |key: &str| key == "pipit.arguments";
        for (key, value) in whole.metadata().iter().filter(|(key, _)| !own(key)) {
            assert_eq!(split.get(key), Some(value), "{key}");
        }
    }
    let args = |path: &Path| path.to_str().unwrap().to_owned();
    let report = run(&["inspect", &args(&paths[1])]);
    assert_eq!(report["files"].as_array().unwrap().len(), files.len());
    // The same bytes come out of the parts as out of the whole.
    let again = scratch.path().join("again.gguf");
    run(&[
        "model",
        &args(&paths[0]),
        "-t",
        "Q8_0",
        "-o",
        &args(&again),
        "--no-card",
    ]);
    let again = Gguf::open(&again).unwrap();
    for tensor in whole.tensors() {
        assert!(again.data(again.tensor(&tensor.name).unwrap()) == whole.data(tensor));
    }
    run(&[
        "import",
        &args(&paths[0]),
        "-o",
        &args(&scratch.path().join("folder")),
    ]);

    let load = |path: &Path| pipit_convert::llama_cpp::load(path, &LlamaModelParams::default());
    assert_eq!(load(&paths[0]).unwrap().n_params(), 134_515_008);

    // Parts that do not belong together.
    let third = std::fs::read(&paths[2]).unwrap();
    std::fs::remove_file(&paths[2]).unwrap();
    fails(
        &["inspect", &args(&paths[0])],
        &["a-00003-of-00003.gguf is not there", "hint: all parts"],
    );
    std::fs::copy(&paths[1], &paths[2]).unwrap();
    fails(
        &["inspect", &args(&paths[0])],
        &["a-00003-of-00003.gguf", "split.no is 1", "need 2"],
    );
    fails(
        &["inspect", &args(&paths[2])],
        &["it is part 2 of 3", "its name says part 3"],
    );
    std::fs::write(&paths[2], &third[..third.len() - 4096]).unwrap();
    fails(
        &["inspect", &args(&paths[0])],
        &["a-00003-of-00003.gguf is truncated"],
    );
    let renamed = scratch.path().join("b.gguf");
    std::fs::rename(&paths[0], &renamed).unwrap();
    fails(
        &["inspect", &args(&renamed)],
        &[
            "part 1 of 3",
            "hint: the parts are named like NAME-00001-of-00003.gguf",
        ],
    );
}

#[test]
fn what_fits_into_one_part_is_not_cut() {
    let scratch = tempfile::tempdir().unwrap();
    let (out, base) = (scratch.path().join("a.gguf"), fixture("tied"));
    let args = ["model", base.to_str().unwrap(), "-o", out.to_str().unwrap()];
    run(&[&args[..], &["--split-max-size", "1M", "--no-card"]].concat());
    assert_eq!(names(scratch.path()), ["a.gguf"]);
    assert_eq!(Gguf::open(&out).unwrap().get("split.count"), None);
    let output = pipit_convert(&[&args[..], &["--split-max-size", "1M", "--modelfile"]].concat());
    assert_eq!(output.status.code(), Some(2), "Ollama reads no parts");
}
