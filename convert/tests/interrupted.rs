//! Interrupted at any moment, the old result is there, or none, or the new one; and the next run cleans up.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pipit_convert::checkpoint::Checkpoint;
use pipit_convert::gguf::Gguf;
use support::{names, pipit_convert, smollm2, stderr};

/// Milliseconds after the start: before anything is there, while it is written, near the end.
const MOMENTS: [u64; 4] = [5, 80, 200, 450];

fn start(args: &[String]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_pipit-convert"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn run(args: &[String]) {
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let output = pipit_convert(&args);
    assert!(output.status.success(), "{}", stderr(&output));
}

fn args(words: &[&str], out: &Path) -> Vec<String> {
    let model = smollm2();
    let mut args: Vec<_> = words.iter().map(|word| word.to_string()).collect();
    args.extend(["-o", out.to_str().unwrap(), "--force", model.to_str().unwrap()].map(str::to_owned));
    args
}

fn send(child: &Child, signal: &str) {
    let id = child.id().to_string();
    // A program that has ended already takes no signal.
    let _ = Command::new("kill").args(["-s", signal, &id]).status().unwrap();
}

/// The names that no result has.
fn leftovers(dir: &Path) -> Vec<String> {
    let mut names = names(dir);
    names.retain(|name| name.ends_with(".part"));
    names
}

/// Interrupts `job` at every moment. `check` looks at what is there then.
fn interrupt(dir: &Path, job: &[String], check: &dyn Fn()) {
    for signal in ["INT", "TERM", "KILL"] {
        for moment in MOMENTS {
            let mut child = start(job);
            std::thread::sleep(Duration::from_millis(moment));
            send(&child, signal);
            let status = child.wait().unwrap();
            check();
            if signal != "KILL" {
                // Before the handler stands, a signal ends the program with nothing begun.
                let ended = status.success() || status.code() == Some(130) || status.code().is_none();
                assert!(ended, "{signal} after {moment} ms: {status}");
                assert!(
                    leftovers(dir).is_empty(),
                    "{signal} after {moment} ms: {:?}",
                    names(dir)
                );
            }
        }
    }
    run(job);
    assert!(leftovers(dir).is_empty(), "{:?}", names(dir));
}

/// The types of a model's tensors. They differ between the old and the new result.
fn types(gguf: &Gguf) -> BTreeSet<&'static str> {
    gguf.tensors().iter().map(|tensor| tensor.kind.name()).collect()
}

#[test]
fn a_file_is_the_old_one_or_the_new_one() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("a.gguf");
    run(&args(&["model", "-t", "Q5_1"], &out));
    let old = types(&Gguf::open(&out).unwrap());
    let job = args(&["model", "-t", "Q8_0"], &out);
    interrupt(scratch.path(), &job, &|| {
        let found = types(&Gguf::open(&out).unwrap());
        assert!(
            found == old || found == BTreeSet::from(["F32", "Q8_0"]),
            "{found:?}"
        );
    });
    assert_eq!(names(scratch.path()), ["a.gguf", "a.gguf.md"]);
}

#[test]
fn parts_are_the_old_ones_or_none_or_the_new_ones() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("a.gguf");
    let split = ["--split-max-size", "50M", "--no-card"];
    run(&args(&[&["model", "-t", "Q5_1"], &split[..]].concat(), &out));
    let first = scratch.path().join("a-00001-of-00003.gguf");
    let old = types(&Gguf::open(&first).unwrap());
    let job = args(&[&["model", "-t", "Q8_0"], &split[..]].concat(), &out);
    interrupt(scratch.path(), &job, &|| {
        if first.exists() {
            let found = types(&Gguf::open(&first).unwrap());
            assert!(
                found == old || found == BTreeSet::from(["F32", "Q8_0"]),
                "{found:?}"
            );
        }
    });
    assert_eq!(names(scratch.path()).len(), 3);
}

#[test]
fn a_folder_is_the_old_one_or_the_new_one() {
    let scratch = tempfile::tempdir().unwrap();
    let out: PathBuf = scratch.path().join("folder");
    run(&args(&["import", "--dtype", "f16"], &out));
    let job = args(&["import", "--dtype", "bf16"], &out);
    interrupt(scratch.path(), &job, &|| {
        let checkpoint = Checkpoint::open(&out).unwrap();
        let dtype = checkpoint.tensor("model.norm.weight").unwrap().dtype;
        let said = checkpoint.config()["dtype"].as_str().unwrap();
        let pair = format!("{dtype:?} {said}");
        assert!(
            ["F16 float16", "BF16 bfloat16"].contains(&pair.as_str()),
            "{pair}"
        );
    });
    assert_eq!(names(scratch.path()), ["folder"]);
}
