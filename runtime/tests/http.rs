//! The HTTP door of `pipit serve` with a real model (SmolLM2), as a program without a library would knock.
//!
//! What the openai client makes of it is in tests/tests/openai.rs.

#![cfg(all(feature = "http", feature = "embedded-broker"))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

mod models;

const PIPIT: &str = env!("CARGO_BIN_EXE_pipit");
const CHAT: &str = "/v1/chat/completions";

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A device with a broker of its own and a door.
struct Device {
    process: Child,
    broker: u16,
    http: u16,
    folder: tempfile::TempDir,
    settings: Vec<(&'static str, String)>,
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Device {
    fn terminate(&self) {
        let pid = self.process.id().to_string();
        let kill = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(kill.unwrap().success());
    }

    fn start(settings: &[(&'static str, &str)]) -> Self {
        let (broker, http) = (free_port(), free_port());
        let mut all = vec![("PIPIT_HTTP__LISTEN", format!("127.0.0.1:{http}"))];
        all.extend(settings.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let folder = tempfile::tempdir().unwrap();
        let process = serve(folder.path(), broker, &all);
        Self {
            process,
            broker,
            http,
            folder,
            settings: all,
        }
    }

    fn restart(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = serve(self.folder.path(), self.broker, &self.settings);
    }

    fn wait_for_state(&self, state: &str) {
        wait_for(state, Duration::from_secs(60), || {
            TcpStream::connect(("127.0.0.1", self.http)).is_ok()
                && self.get("/health").json()["state"] == state
        });
    }

    fn get(&self, path: &str) -> Response {
        self.send("GET", path, &[], b"")
    }

    fn ask(&self, body: &Value) -> Response {
        let kind = "Content-Type: application/json";
        self.send("POST", CHAT, &[kind], body.to_string().as_bytes())
    }

    fn send(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Response {
        let mut stream = self.begin(method, path, headers, body);
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Response::read(&bytes)
    }

    /// A request whose answer is not waited for. HTTP/1.0: its answer ends with the connection.
    fn begin(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.http)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        stream
            .write_all(&head(method, path, headers, body.len()))
            .unwrap();
        stream.write_all(body).unwrap();
        stream
    }

    fn metric(&self, name: &str) -> f64 {
        let page = self.get("/metrics").body;
        let line = page
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_else(|| panic!("{name}: {page}"));
        line.trim().parse().unwrap()
    }
}

fn head(method: &str, path: &str, headers: &[&str], bytes: usize) -> Vec<u8> {
    let host = match headers.iter().any(|header| header.starts_with("Host:")) {
        true => "",
        false => "Host: localhost\r\n",
    };
    let mut lines = headers.join("\r\n");
    if !lines.is_empty() {
        lines += "\r\n";
    }
    format!("{method} {path} HTTP/1.0\r\n{host}{lines}Content-Length: {bytes}\r\n\r\n").into_bytes()
}

fn serve(folder: &Path, broker: u16, settings: &[(&'static str, String)]) -> Child {
    Command::new(PIPIT)
        .envs(settings.iter().map(|(name, value)| (name, value)))
        .args(["serve", "--device", "dev", "--threads", "1", "--broker"])
        .arg(format!("embedded://127.0.0.1:{broker}"))
        .arg("--model")
        .arg(models::model(
            "PIPIT_TEST_MODEL",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
        ))
        .arg("--state-dir")
        .arg(folder.join("state"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[derive(Debug)]
struct Response {
    status: u16,
    head: String,
    body: String,
}

impl Response {
    fn read(bytes: &[u8]) -> Self {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
        Self {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            head: head.to_ascii_lowercase(),
            body: body.to_owned(),
        }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Status and code of an error that looks like OpenAI's.
    fn refusal(&self) -> (u16, String) {
        let error = &self.json()["error"];
        assert!(
            error["message"].is_string() && error["type"].is_string(),
            "{self:?}"
        );
        (self.status, error["code"].as_str().unwrap().to_owned())
    }

    /// The objects of a stream, which must have come to its end.
    fn events(&self) -> Vec<Value> {
        assert!(
            self.status == 200 && self.head.contains("text/event-stream"),
            "{self:?}"
        );
        let lines = self
            .body
            .strip_suffix("data: [DONE]\n\n")
            .unwrap_or_else(|| panic!("{self:?}"));
        let object = |line: &str| serde_json::from_str(line.strip_prefix("data: ").unwrap()).unwrap();
        lines.split_terminator("\n\n").map(object).collect()
    }
}

fn question(prompt: &str, most: u32) -> Value {
    json!({"messages": [{"role": "user", "content": prompt}], "max_tokens": most})
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"]
        .as_str()
        .unwrap_or_else(|| panic!("{answer}"))
}

fn ask_over_mqtt(device: &Device, prompt: &str, most: &str) -> Output {
    let broker = format!("mqtt://127.0.0.1:{}", device.broker);
    let command = [
        "ask",
        prompt,
        "--max-tokens",
        most,
        "--json",
        "--device",
        "dev",
        "--broker",
        &broker,
    ];
    Command::new(PIPIT).args(command).output().unwrap()
}

#[test]
fn the_answers_of_mqtt_and_errors_as_openai_has_them() {
    let device = Device::start(&[("PIPIT_LIMITS__REQUEST_BYTES", "2000")]);
    device.wait_for_state("ready");

    let whole = device.ask(&question("Say hello.", 24));
    assert_eq!(whole.status, 200, "{whole:?}");
    let answer = whole.json();
    assert_eq!(
        (&answer["object"], &answer["ai_generated"]),
        (&json!("chat.completion"), &json!(true))
    );
    let sha256 = answer["model_sha256"].as_str().unwrap();
    for line in [
        "x-ai-generated: true",
        &format!("x-model-sha256: {sha256}"),
        &format!("x-request-id: {}", answer["id"].as_str().unwrap()),
    ] {
        assert!(whole.head.contains(line), "{line}: {}", whole.head);
    }
    let by_mqtt = ask_over_mqtt(&device, "Say hello.", "24");
    let by_mqtt: Value = serde_json::from_slice(&by_mqtt.stdout).unwrap();
    assert_eq!(content(&answer), content(&by_mqtt));

    // Piece by piece.
    let mut streamed = question("Say hello.", 24);
    (streamed["stream"], streamed["stream_options"]) = (json!(true), json!({"include_usage": true}));
    let events = device.ask(&streamed).events();
    let pieces = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), content(&answer));
    assert!(events.len() >= 4, "{events:?}");
    assert_eq!(
        events.last().unwrap()["usage"]["completion_tokens"],
        answer["usage"]["completion_tokens"]
    );

    // The same id is the same answer, byte for byte, also as a stream; other messages would have given another one.
    let mut once = question("Say hello.", 8);
    once["id"] = json!("twice");
    let first = device.ask(&once);
    let mut twice = question("Count to ten.", 300);
    twice["id"] = json!("twice");
    assert_eq!(device.ask(&twice).body, first.body);
    twice["stream"] = json!(true);
    assert_eq!(
        device.ask(&twice).events()[0]["choices"][0]["delta"]["content"],
        content(&first.json())
    );
    // A name of the same request in a header does that, too, and another user is another client.
    let kind = "Content-Type: application/json";
    let named = |body: &Value| {
        device.send(
            "POST",
            CHAT,
            &[kind, "Idempotency-Key: named"],
            body.to_string().as_bytes(),
        )
    };
    let mut other = question("Count to ten.", 8);
    assert_eq!(named(&question("Say hello.", 8)).body, named(&other).body);
    other["user"] = json!("kitchen");
    let other = named(&other).json();
    assert!(
        other["id"] == "named" && content(&other) != content(&first.json()),
        "{other}"
    );

    for (change, status, code) in [
        (json!({"temprature": 1}), 400, "invalid_request"),
        (json!({"messages": []}), 400, "invalid_request"),
        (json!({"reply_to": "reply/me"}), 400, "invalid_request"),
        (json!({"adapter": "none"}), 400, "invalid_request"),
        (json!({"stop": "x".repeat(3000)}), 413, "too_large"),
        (json!({"stream": true, "n": 2}), 400, "invalid_request"),
        (json!({"deadline_ms": 0}), 504, "expired"),
        (json!({"deadline_ms": 0, "stream": true}), 504, "expired"),
    ] {
        let mut body = question("x", 5);
        for (field, value) in change.as_object().unwrap() {
            body[field] = value.clone();
        }
        let refused = device.ask(&body);
        assert_eq!(refused.refusal(), (status, code.to_owned()), "{change}");
        assert_eq!(
            refused.head.contains("x-should-retry: false"),
            status == 504,
            "{change}"
        );
    }
    for (method, path, headers, status, code) in [
        (
            "POST",
            CHAT,
            &["Content-Type: text/plain"][..],
            415,
            "invalid_request",
        ),
        ("POST", CHAT, &[kind][..], 400, "invalid_request"),
        ("GET", CHAT, &[][..], 405, "method_not_allowed"),
        ("GET", "/v2", &[][..], 404, "not_found"),
        ("GET", "/v1/models/gpt-4", &[][..], 404, "model_not_found"),
        ("GET", "/health", &["Host: evil.example"][..], 421, "wrong_host"),
    ] {
        let refused = device.send(method, path, headers, b"{");
        assert_eq!(refused.refusal(), (status, code.to_owned()), "{path} {headers:?}");
    }
    let models = device.get("/v1/models").json();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["sha256"]),
        (&answer["model"], &json!(sha256))
    );
    assert!(device.metric("pipit_requests_accepted_total") >= 7.0);
}

#[test]
fn who_goes_away_takes_the_request_back() {
    let device = Device::start(&[("PIPIT_MODEL__SLOTS", "1"), ("PIPIT_LIMITS__MAX_TOKENS", "2000")]);
    device.wait_for_state("ready");
    let mut long = question("Tell a very long story.", 2000);
    long["stream"] = json!(true);
    let kind = ["Content-Type: application/json"];
    let begin = || device.begin("POST", CHAT, &kind, long.to_string().as_bytes());
    // One is under way, others wait.
    let mut stories = vec![begin()];
    let mut first = [0; 400];
    stories[0].read_exact(&mut first).unwrap();
    assert!(
        first.starts_with(b"HTTP/1.0 200"),
        "{}",
        String::from_utf8_lossy(&first)
    );
    stories.extend((0..4).map(|_| begin()));
    wait_for("they are there", Duration::from_secs(10), || {
        device.metric("pipit_requests_accepted_total") == 5.0
    });
    stories.clear();
    wait_for("all of them are taken back", Duration::from_secs(10), || {
        device.metric("pipit_requests_running") + device.metric("pipit_requests_waiting") == 0.0
    });
    assert_eq!(device.metric("pipit_answers_total"), 0.0);
    // Nothing of them stays: who asks the same again is answered.
    assert_eq!(device.ask(&question("Say hello.", 4)).status, 200);
    // One that goes while it waits for the whole answer, and comes again with the same id at once.
    let mut body = question("Tell a very long story.", 2000);
    body["id"] = json!("again");
    let gone = device.begin("POST", CHAT, &kind, body.to_string().as_bytes());
    wait_for("it runs", Duration::from_secs(10), || {
        device.metric("pipit_requests_running") == 1.0
    });
    drop(gone);
    wait_for("it is taken back", Duration::from_secs(10), || {
        device.metric("pipit_requests_running") == 0.0
    });
    body["max_tokens"] = json!(4);
    assert_eq!(device.ask(&body).json()["usage"]["completion_tokens"], 4);
    // One that somebody else takes back, over MQTT.
    let mut body = question("Tell a very long story.", 2000);
    body["id"] = json!("taken");
    let mut taken = device.begin("POST", CHAT, &kind, body.to_string().as_bytes());
    wait_for("it runs", Duration::from_secs(10), || {
        device.metric("pipit_requests_running") == 1.0
    });
    let port = device.broker.to_string();
    let cancel = ["-p", &port, "-q", "1", "-t", "pipit/v1/dev/cancel", "-m", "taken"];
    assert!(
        Command::new("mosquitto_pub")
            .args(cancel)
            .status()
            .unwrap()
            .success()
    );
    let mut bytes = Vec::new();
    taken.read_to_end(&mut bytes).unwrap();
    assert_eq!(Response::read(&bytes).refusal(), (499, "cancelled".to_owned()));
}

#[test]
fn a_request_with_an_id_is_answered_after_kill_9_and_one_without_is_forgotten() {
    let mut device = Device::start(&[]);
    device.wait_for_state("ready");
    let kind = ["Content-Type: application/json"];
    let mut body = question("Write a long story about a wagtail.", 150);
    let without = device.begin("POST", CHAT, &kind, body.to_string().as_bytes());
    body["id"] = json!("story");
    let with = device.begin("POST", CHAT, &kind, body.to_string().as_bytes());
    wait_for("they run", Duration::from_secs(10), || {
        device.metric("pipit_requests_running") == 2.0
    });
    device.restart();
    drop((without, with));
    device.wait_for_state("ready");
    // Before anybody asks again.
    wait_for("it is answered", Duration::from_secs(60), || {
        device.metric("pipit_answers_total") == 1.0
    });
    let answer = device.ask(&body);
    assert_eq!(
        (
            answer.status,
            answer.json()["usage"]["completion_tokens"].as_u64()
        ),
        (200, Some(150))
    );
    assert_eq!(
        (
            device.metric("pipit_answers_total"),
            device.metric("pipit_duplicates_total")
        ),
        (1.0, 1.0)
    );
    // The end of the daemon is said, and not a cut connection.
    body["id"] = json!("last");
    body["max_tokens"] = json!(500);
    let mut last = device.begin("POST", CHAT, &kind, body.to_string().as_bytes());
    wait_for("it runs", Duration::from_secs(10), || {
        device.metric("pipit_requests_running") == 1.0
    });
    device.terminate();
    let mut bytes = Vec::new();
    last.read_to_end(&mut bytes).unwrap();
    let last = Response::read(&bytes);
    // Within the grace of five seconds it may even be answered.
    assert!(
        last.status == 200 || last.refusal() == (503, "model_unavailable".to_owned()),
        "{last:?}"
    );
    assert!(device.process.wait().unwrap().success());
}

#[test]
fn a_socket_a_key_and_a_device_that_cannot_answer() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, "k3y\n").unwrap();
    let socket = folder.path().join("http.sock");
    // A socket of before, on which nobody listens any more.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let mut device = Device::start(&[
        ("PIPIT_HTTP__LISTEN", &format!("unix:{}", socket.display())),
        ("PIPIT_HTTP__KEY_FILE", key.to_str().unwrap()),
        // No model fits into a megabyte.
        ("PIPIT_MODEL__MEMORY_BYTES", "1000000"),
    ]);
    let send = |headers: &[&str], body: &[u8]| {
        let (method, path) = if body.is_empty() {
            ("GET", "/health")
        } else {
            ("POST", CHAT)
        };
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream
            .write_all(&head(method, path, headers, body.len()))
            .unwrap();
        stream.write_all(body).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Response::read(&bytes)
    };
    let shown = [
        "Authorization: Bearer k3y",
        "Content-Type: application/json",
        "Host: pipit",
    ];
    wait_for("degraded", Duration::from_secs(60), || {
        UnixStream::connect(&socket).is_ok() && send(&shown, b"").json()["state"] == "degraded"
    });
    assert_eq!(send(&shown, b"").status, 503);
    let body = question("x", 5).to_string();
    assert_eq!(
        send(&shown, body.as_bytes()).refusal(),
        (503, "model_unavailable".to_owned())
    );
    for wrong in [&[][..], &["Authorization: Bearer k3"][..]] {
        assert_eq!(send(wrong, b"").refusal(), (401, "invalid_api_key".to_owned()));
    }
    device.terminate();
    assert!(device.process.wait().unwrap().success());
    assert!(!socket.exists(), "the socket is left");
}

#[test]
fn a_door_that_cannot_be_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (listen, code, why) in [
        ("0.0.0.0:8080", 78, "beyond_localhost"),
        ("here", 78, "http.listen"),
        (taken.as_str(), 1, taken.as_str()),
    ] {
        let mut settings = vec![("PIPIT_HTTP__LISTEN", listen.to_owned())];
        settings.push(("PIPIT_LOG", "error".to_owned()));
        let child = Command::new(PIPIT)
            .envs(settings)
            .args(["serve", "--broker"])
            .arg(format!("embedded://127.0.0.1:{}", free_port()))
            .arg("--model")
            .arg(models::model(
                "PIPIT_TEST_MODEL",
                "SmolLM2-135M-Instruct.Q4_1.gguf",
            ))
            .arg("--state-dir")
            .arg(folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stderr);
        assert_eq!(child.status.code(), Some(code), "{said}");
        assert!(said.contains(why) && said.contains("hint:"), "{said}");
    }
}
