//! `pipit check`, the memory plan in `pipit serve`, and the guard of the kernels, with the real program.
//!
//! The model is at `PIPIT_TEST_MODEL`, or where ./quickstart and ./check put it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

mod models;

const PIPIT: &str = env!("CARGO_BIN_EXE_pipit");

fn model() -> PathBuf {
    models::model("PIPIT_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf")
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// A place for a state folder, and the address of an embedded broker that nobody runs.
struct World {
    folder: tempfile::TempDir,
    broker: String,
}

impl World {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            broker: format!("embedded://127.0.0.1:{}", free_port()),
        }
    }

    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(PIPIT);
        command
            .args([what, "--device", "dev", "--broker", &self.broker, "--state-dir"])
            .arg(self.folder.path().join("state"));
        command
    }

    fn config(&self, text: &str) -> PathBuf {
        let path = self.folder.path().join("pipit.toml");
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

fn finding<'a>(report: &'a Value, what: &str) -> &'a Value {
    let findings = report["findings"].as_array().unwrap();
    findings
        .iter()
        .find(|finding| finding["what"] == what)
        .unwrap_or_else(|| panic!("nothing about {what}: {report}"))
}

#[test]
fn all_is_well() {
    let world = World::new();
    let output = world
        .command("check")
        .arg("--json")
        .arg("--model")
        .arg(model())
        .output()
        .unwrap();
    let report = report(&output);
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert_eq!(report["ok"], true);
    for what in ["kernels", "state folder", "disk", "model", "memory", "broker"] {
        assert_eq!(finding(&report, what)["state"], "ok", "{what}: {report}");
    }
    assert_eq!(finding(&report, "signature")["state"], "info");
    let sum = |rows: &Value| {
        rows.as_array()
            .unwrap()
            .iter()
            .filter_map(|row| row["bytes"].as_u64())
            .sum::<u64>()
    };
    let (worker, daemon) = (sum(&report["plan"]["worker"]), sum(&report["plan"]["daemon"]));
    assert_eq!(report["worker_bytes"], worker);
    assert_eq!(report["bytes"], worker + daemon);
    // The weights of the file are in it, once.
    assert!(worker > std::fs::metadata(model()).unwrap().len());

    let text = world
        .command("check")
        .arg("--model")
        .arg(model())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("KV cache") && text.contains("ok   kernels"),
        "{text}"
    );
    assert!(
        !world.folder.path().join("state").exists(),
        "check changes nothing"
    );
}

#[test]
fn the_plan_grows_with_the_context() {
    let world = World::new();
    let bytes = |ctx: &str| {
        let mut command = world.command("check");
        let output = command
            .args(["--json", "--ctx", ctx, "--model"])
            .arg(model())
            .output()
            .unwrap();
        report(&output)["worker_bytes"].as_u64().unwrap()
    };
    // 30 layers · 2 · 3 heads · 64 elements · 2 bytes for each token (SmolLM2-135M).
    let tokens = 8192 - 2048;
    assert!(bytes("8192") - bytes("2048") >= tokens * 30 * 2 * 3 * 64 * 2);
}

#[test]
fn what_fails_is_said_and_counted() {
    let world = World::new();
    let check = |arguments: &[&str]| {
        let mut command = Command::new(PIPIT);
        command
            .args(["check", "--json", "--state-dir"])
            .arg(world.folder.path());
        let output = command.args(arguments).output().unwrap();
        (output.status.code(), report(&output))
    };
    let (code, report) = check(&[]);
    assert_eq!((code, &report["ok"]), (Some(1), &Value::Bool(false)));
    assert_eq!(finding(&report, "model")["state"], "fail");
    assert!(
        finding(&report, "model")["hint"]
            .as_str()
            .unwrap()
            .contains("--model")
    );

    // Nobody listens there.
    let nobody = format!("mqtt://127.0.0.1:{}", free_port());
    let (code, report) = check(&["--broker", &nobody]);
    assert_eq!(code, Some(1));
    assert_eq!(finding(&report, "broker")["state"], "fail", "{report}");
    // Somebody takes the connection and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("mqtt://{}", silent.local_addr().unwrap());
    let (_, report) = check(&["--broker", &url]);
    let says = finding(&report, "broker")["says"].as_str().unwrap().to_owned();
    assert!(says.contains("no answer within 3 s"), "{says}");
    // The embedded broker's port is taken.
    let taken = format!("embedded://{}", silent.local_addr().unwrap());
    assert_eq!(
        finding(&check(&["--broker", &taken]).1, "broker")["state"],
        "fail"
    );
}

#[test]
fn a_model_of_another_hash_is_3() {
    let world = World::new();
    let path = world.folder.path().join("m.gguf");
    std::fs::copy(model(), &path).unwrap();
    let check = |sha256: &[&str]| {
        let mut command = world.command("check");
        command
            .args(["--json", "--model"])
            .arg(&path)
            .arg("--sha256")
            .args(sha256)
            .output()
            .unwrap()
    };
    let output = check(&[]);
    assert_eq!(output.status.code(), Some(0));
    let hash = finding(&report(&output), "sha256")["says"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(hash.len(), 64);
    assert_eq!(check(&[&hash.to_uppercase()]).status.code(), Some(0));
    let other = check(&[&"0".repeat(64)]);
    assert_eq!(other.status.code(), Some(3));
    assert_eq!(finding(&report(&other), "sha256")["state"], "fail");
}

#[test]
fn what_does_not_fit_is_not_loaded() {
    let world = World::new();
    let config = world.config("[model]\nmemory_bytes = 200000000\nn_ctx = 8192\n");
    let arguments = |command: &mut Command| {
        command.arg("--config").arg(&config).arg("--model").arg(model());
    };
    let mut check = world.command("check");
    arguments(&mut check);
    let output = check.arg("--json").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report = report(&output);
    let memory = finding(&report, "memory");
    assert_eq!(memory["state"], "fail");
    assert!(
        memory["says"].as_str().unwrap().contains("memory_bytes"),
        "{memory}"
    );

    // The daemon says the same with its table, and starts no worker.
    let mut serve = world.command("serve");
    arguments(&mut serve);
    let mut daemon = serve
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(daemon.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let refused = lines.by_ref().find(|line| line.contains("does not fit"));
    let hint = lines.find(|line| line.contains("hint: "));
    let workers = children(daemon.id());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(refused.is_some_and(|line| line.contains("memory_bytes")));
    assert!(hint.is_some_and(|line| line.contains("it fits with") || line.contains("no setting")));
    assert_eq!(workers, Vec::<u32>::new());
}

/// Processes whose parent is `pid`.
fn children(pid: u32) -> Vec<u32> {
    let parent = format!("PPid:\t{pid}");
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let status = std::fs::read_to_string(entry.ok()?.path().join("status")).ok()?;
            let name = |label: &str| status.lines().find(|line| line.starts_with(label));
            (name("PPid:")? == parent).then(|| name("Pid:")?.split_whitespace().nth(1)?.parse().ok())?
        })
        .collect()
}

/// The guard stands before the constructors of llama.cpp: else a CPU that lacks something would end them with an
/// illegal instruction.
#[test]
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn the_guard_is_in_the_program() {
    let program = std::fs::read(PIPIT).unwrap();
    assert!(
        program.windows(15).any(|window| window == b".preinit_array\0"),
        "the linker dropped the guard"
    );
}
