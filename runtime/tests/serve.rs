//! `pipit serve` and `pipit ask` with a real broker (mosquitto) and a real model (SmolLM2).
//!
//! The model is at `PIPIT_TEST_MODEL`, or where ./quickstart and ./check put it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

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

fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A child that does not outlive its test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The device `dev`, on one thread: ggml's threads spin, and tests run side by side.
fn serve(broker: &str, state: &Path, settings: &[(&str, &str)]) -> Process {
    let child = Command::new(PIPIT)
        .envs(settings.iter().copied())
        .args(["serve", "--device", "dev", "--threads", "1"])
        .args(["--broker", broker, "--model"])
        .arg(model())
        .arg("--state-dir")
        .arg(state)
        .stdout(Stdio::null())
        .spawn();
    Process(child.unwrap())
}

/// A mosquitto with persistent sessions in memory, and a folder for one device's state.
struct World {
    _broker: Process,
    folder: tempfile::TempDir,
    port: u16,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let config = folder.path().join("mosquitto.conf");
        std::fs::write(
            &config,
            format!("listener {port} 127.0.0.1\nallow_anonymous true\n"),
        )
        .unwrap();
        let program = if Path::new("/usr/sbin/mosquitto").exists() {
            "/usr/sbin/mosquitto"
        } else {
            "mosquitto"
        };
        let broker = Command::new(program)
            .arg("-c")
            .arg(&config)
            .stderr(Stdio::null())
            .spawn();
        let broker = Process(broker.expect("mosquitto is installed"));
        wait_for("mosquitto", Duration::from_secs(10), || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        Self {
            _broker: broker,
            folder,
            port,
        }
    }

    fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    fn serve(&self) -> Process {
        self.serve_with(&[])
    }

    /// With settings as variables.
    fn serve_with(&self, settings: &[(&str, &str)]) -> Process {
        serve(&self.url(), &self.folder.path().join("state"), settings)
    }

    /// The retained status.
    fn status(&self) -> String {
        let arguments = ["-t", "pipit/v1/dev/status", "-C", "1", "-W", "2"];
        let output = self.tool("mosquitto_sub", &arguments).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn ready(&self) {
        wait_for("ready", Duration::from_secs(60), || {
            self.status().contains("\"ready\"")
        });
    }

    fn tool(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(["-h", "127.0.0.1", "-p", &self.port.to_string()])
            .args(arguments);
        command
    }

    fn publish(&self, payload: &Value) {
        let payload = payload.to_string();
        let status = self
            .tool(
                "mosquitto_pub",
                &["-V", "5", "-q", "1", "-t", "pipit/v1/dev/req", "-m", &payload],
            )
            .status();
        assert!(status.unwrap().success());
    }

    /// Subscribes to the answers of `id` until `count` have come or `seconds` have passed.
    fn listen(&self, id: &str, count: &str, seconds: &str) -> Process {
        let topic = format!("pipit/v1/dev/res/{id}");
        let child = self
            .tool(
                "mosquitto_sub",
                &["-q", "1", "-t", &topic, "-C", count, "-W", seconds],
            )
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Until its SUBACK: mosquitto_sub does not say when.
        std::thread::sleep(Duration::from_millis(300));
        Process(child)
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        Command::new(PIPIT)
            .args([
                "ask",
                "--device",
                "dev",
                "--timeout",
                "60s",
                "--broker",
                &self.url(),
            ])
            .args(arguments)
            .output()
            .unwrap()
    }
}

fn answers(mut listener: Process) -> Vec<Value> {
    let mut text = String::new();
    listener
        .0
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    listener.0.wait().unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"]
        .as_str()
        .unwrap_or_else(|| panic!("{answer}"))
}

/// Two greedy answers to one prompt: their beginnings are the same. Later the last bits of the numbers, which depend on
/// what else was computed, may decide between two tokens.
fn alike(one: &str, other: &str) {
    let beginning = |text: &str| text.chars().take(24).collect::<String>();
    assert!(one.len() > 24, "{one}");
    assert_eq!(beginning(one), beginning(other));
}

fn request(id: &str, prompt: &str, most: u32) -> Value {
    serde_json::json!({"id": id, "messages": [{"role": "user", "content": prompt}], "max_tokens": most, "stream": true})
}

/// Process ids of the workers of `daemon`.
fn workers(daemon: &Process) -> Vec<u32> {
    let pid = daemon.0.id();
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<u32>>()
        })
        .collect()
}

fn kill(pid: u32, signal: &str) {
    assert!(
        Command::new("kill")
            .args([signal, &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
}

fn gone(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z"))
}

#[test]
fn answers_over_mqtt() {
    let world = World::new();
    // One at a time, so that a request has somebody to wait for.
    let mut daemon = world.serve_with(&[("PIPIT_MODEL__SLOTS", "1")]);
    world.ready();

    let whole = world.ask(&["Say hello.", "--max-tokens", "24", "--json"]);
    assert!(whole.status.success(), "{whole:?}");
    let whole: Value = serde_json::from_slice(&whole.stdout).unwrap();
    assert!(!content(&whole).is_empty());
    assert_eq!(whole["ai_generated"], true);
    assert_eq!(whole["model_sha256"].as_str().unwrap().len(), 64);
    assert!(whole["usage"]["completion_tokens"].as_u64().unwrap() <= 24);

    // Streamed, the same text (greedy), and chunks that add up to it.
    let streamed = world.ask(&["Say hello.", "--max-tokens", "24", "--stream"]);
    alike(&String::from_utf8(streamed.stdout).unwrap(), content(&whole));
    let lines = world.ask(&["Say hello.", "--max-tokens", "24", "--stream", "--json"]);
    let lines: Vec<Value> = String::from_utf8(lines.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let (last, chunks) = lines.split_last().unwrap();
    assert!(!chunks.is_empty());
    for (at, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk["seq"], at);
    }
    let text: String = chunks
        .iter()
        .map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().unwrap())
        .collect();
    assert!(content(last).starts_with(&text));

    // Plain text in, plain text out, from a stock tool; a reply topic that is not allowed is not used.
    let reply = world
        .tool(
            "mosquitto_rr",
            &[
                "-V",
                "5",
                "-t",
                "pipit/v1/dev/req",
                "-e",
                "reply/me",
                "-m",
                "Say hello.",
                "-W",
                "60",
            ],
        )
        .output()
        .unwrap();
    let reply = String::from_utf8(reply.stdout).unwrap();
    assert!(
        !reply.trim().is_empty() && serde_json::from_str::<Value>(&reply).is_err(),
        "{reply}"
    );
    let refused = world
        .tool(
            "mosquitto_rr",
            &[
                "-V",
                "5",
                "-t",
                "pipit/v1/dev/req",
                "-e",
                "elsewhere/me",
                "-m",
                "x",
                "-W",
                "2",
            ],
        )
        .output()
        .unwrap();
    assert!(refused.stdout.is_empty(), "{refused:?}");

    // The same id is the same answer, without a second run: other messages would have given another one.
    let mut once = request("twice", "Say hello.", 16);
    once["stream"] = Value::Bool(false);
    let mut twice = Vec::new();
    for (prompt, most) in [("Say hello.", 16), ("Count to ten.", 300)] {
        once["messages"][0]["content"] = Value::from(prompt);
        once["max_tokens"] = Value::from(most);
        let listener = world.listen("twice", "1", "60");
        world.publish(&once);
        twice.extend(answers(listener));
    }
    assert_eq!(twice.len(), 2);
    assert_eq!(twice[0], twice[1]);

    // Cancelled while it runs, and too late before it begins.
    let listener = world.listen("cancelled", "400", "20");
    let late = world.listen("late", "1", "20");
    world.publish(&request("cancelled", "Tell a very long story.", 500));
    let mut request_late = request("late", "Say hello.", 5);
    request_late["deadline_ms"] = Value::from(1);
    world.publish(&request_late);
    std::thread::sleep(Duration::from_millis(500));
    let cancel = world.tool(
        "mosquitto_pub",
        &[
            "-q",
            "1",
            "-t",
            "pipit/v1/dev/cancel",
            "-m",
            r#"{"id":"cancelled"}"#,
        ],
    );
    let mut cancel = cancel;
    assert!(cancel.status().unwrap().success());
    assert_eq!(answers(late)[0]["error"]["code"], "expired");
    wait_for(
        "the cancelled answer is repeated",
        Duration::from_secs(20),
        || {
            let again = world.listen("cancelled", "1", "3");
            world.publish(&request("cancelled", "x", 1));
            answers(again)
                .last()
                .is_some_and(|answer| answer["error"]["code"] == "cancelled")
        },
    );
    drop(listener);

    // Bad requests are refused by name.
    let bad = world.listen("bad", "1", "10");
    world.publish(
        &serde_json::json!({"id": "bad", "messages": [{"role": "user", "content": "x"}], "adapter": "a"}),
    );
    let bad = &answers(bad)[0]["error"];
    assert_eq!(bad["code"], "invalid_request");
    assert!(bad["message"].as_str().unwrap().contains("adapter"));

    // The end: offline is said, and no process stays.
    let worker = workers(&daemon)[0];
    kill(daemon.0.id(), "-TERM");
    let status = daemon.0.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(gone(worker));
    assert!(world.status().contains("offline"));
}

#[test]
fn a_prompt_survives_kill_9_of_the_worker_and_of_the_daemon() {
    let world = World::new();
    let mut daemon = world.serve();
    world.ready();
    let prompt = "Write a long story about a wagtail.";

    // The worker, in the middle of an answer.
    let reference = world.ask(&[prompt, "--max-tokens", "120", "--json"]);
    let reference: Value = serde_json::from_slice(&reference.stdout).unwrap();
    let mut ask = Command::new(PIPIT)
        .args([
            "ask",
            prompt,
            "--max-tokens",
            "120",
            "--stream",
            "--device",
            "dev",
            "--broker",
            &world.url(),
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = ask.stdout.take().unwrap();
    let mut first = [0; 1];
    output.read_exact(&mut first).unwrap();
    let worker = workers(&daemon)[0];
    kill(worker, "-9");
    let mut text = String::from_utf8(first.to_vec()).unwrap();
    output.read_to_string(&mut text).unwrap();
    assert!(ask.wait().unwrap().success());
    alike(&text, content(&reference));
    assert_ne!(workers(&daemon)[0], worker);

    // The daemon, after it has taken two requests.
    let listeners = [world.listen("one", "1", "90"), world.listen("two", "1", "90")];
    for id in ["one", "two"] {
        let mut body = request(id, prompt, 120);
        body["stream"] = Value::Bool(false);
        world.publish(&body);
    }
    std::thread::sleep(Duration::from_millis(300));
    let worker = workers(&daemon)[0];
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
    wait_for("the worker ends with the daemon", Duration::from_secs(5), || {
        gone(worker)
    });
    let _daemon = world.serve();
    for listener in listeners {
        let answers = answers(listener);
        assert_eq!(answers.len(), 1, "{answers:?}");
        alike(content(&answers[0]), content(&reference));
    }
}

#[test]
fn an_idle_model_is_unloaded_until_somebody_asks() {
    let world = World::new();
    let daemon = world.serve_with(&[("PIPIT_MODEL__IDLE_UNLOAD_S", "1")]);
    world.ready();
    wait_for("unloaded", Duration::from_secs(30), || {
        world.status().contains("\"online\"") && workers(&daemon).is_empty()
    });
    assert!(world.status().contains("unloaded"), "{}", world.status());
    let resident = std::fs::read_to_string(format!("/proc/{}/status", daemon.0.id())).unwrap();
    let line = resident.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 64 * 1024, "the daemon alone is small: {line}");
    let answer = world.ask(&["Say hello.", "--max-tokens", "4"]);
    assert!(answer.status.success(), "{answer:?}");
    wait_for("unloaded again", Duration::from_secs(30), || {
        workers(&daemon).is_empty()
    });
    assert!(world.ask(&["Say hello.", "--max-tokens", "4"]).status.success());
}

#[test]
fn bad_input_has_a_line_a_hint_and_a_code() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(PIPIT)
            .args(arguments)
            .env("XDG_STATE_HOME", folder.path())
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let cut = folder.path().join("cut.gguf");
    let whole = std::fs::File::open(model()).unwrap();
    std::io::copy(
        &mut whole.take(4_000_000),
        &mut std::fs::File::create(&cut).unwrap(),
    )
    .unwrap();
    let (code, message) = run(&["serve", "--model", cut.to_str().unwrap()]);
    assert!(
        code == Some(78) && message.contains("cut short") && message.contains("hint:"),
        "{code:?} {message}"
    );
    let (code, message) = run(&["serve", "--model", "/nonexistent.gguf"]);
    assert!(
        code == Some(78) && message.matches("No such file").count() == 1,
        "{code:?} {message}"
    );
    let (code, message) = run(&["serve"]);
    assert!(
        code == Some(78) && message.contains("--model"),
        "{code:?} {message}"
    );

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let broker = format!("embedded://127.0.0.1:{port}");
    let (code, message) = run(&["serve", "--model", model().to_str().unwrap(), "--broker", &broker]);
    assert!(
        code == Some(69) && message.contains(&port.to_string()) && message.contains("hint:"),
        "{code:?} {message}"
    );
    drop(listener);
    let (code, message) = run(&["ask", "x", "--broker", &format!("mqtt://127.0.0.1:{port}")]);
    assert!(
        code == Some(69) && message.contains("hint:"),
        "{code:?} {message}"
    );

    let config = folder.path().join("pipit.toml");
    std::fs::write(&config, "[model]\npaht = \"x\"\n").unwrap();
    let (code, message) = run(&["serve", "--config", config.to_str().unwrap()]);
    assert!(
        code == Some(78) && message.contains("model.path"),
        "{code:?} {message}"
    );
    assert_eq!(run(&["serve", "--nonsense"]).0, Some(2));
}

#[cfg(feature = "embedded-broker")]
#[test]
fn the_embedded_broker_speaks_both_versions() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let url = format!("embedded://127.0.0.1:{port}");
    let mut daemon = serve(&url, folder.path(), &[]);
    wait_for("the broker", Duration::from_secs(20), || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    for version in ["311", "5"] {
        let port = port.to_string();
        let common = ["-h", "127.0.0.1", "-p", &port, "-V", version];
        let sub = Command::new("mosquitto_sub")
            .args(common)
            .args(["-q", "1", "-t", "pipit/v1/dev/res/#", "-C", "1", "-W", "40"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let sent = Command::new("mosquitto_pub")
            .args(common)
            .args(["-q", "1", "-t", "pipit/v1/dev/req", "-m", "Say hello."])
            .status();
        assert!(sent.unwrap().success());
        let output = sub.wait_with_output().unwrap();
        assert!(!output.stdout.is_empty(), "version {version}");
    }
    // A client that waits while broker and daemon are killed gets its answer after their restart.
    let mut ask = Command::new(PIPIT)
        .args([
            "ask",
            "Write a long story.",
            "--max-tokens",
            "150",
            "--device",
            "dev",
            "--broker",
        ])
        .arg(format!("mqtt://127.0.0.1:{port}"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(
        ask.try_wait().unwrap().is_none(),
        "it answered before it was killed"
    );
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
    let _daemon = serve(&url, folder.path(), &[]);
    let output = ask.wait_with_output().unwrap();
    assert!(output.status.success() && output.stdout.len() > 20, "{output:?}");
}
