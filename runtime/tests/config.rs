//! `pipit config` and the layers, with the real program. No model, no broker.
//!
//! `PIPIT_WRITE_REFERENCE=1` writes docs/reference/config.toml instead of comparing with it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A user's home, and nothing of the user who runs the tests.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Writes a file under the home.
    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    fn pipit(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipit"));
        command.args(arguments);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PIPIT_") {
                command.env_remove(name);
            }
        }
        command
            .env("HOME", self.0.path())
            .env("XDG_CONFIG_HOME", self.0.path().join("config"))
            .env("XDG_STATE_HOME", self.0.path().join("state"))
            .env_remove("STATE_DIRECTORY")
            .current_dir(self.0.path());
        command
    }
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Exit code and lines on standard error.
fn refused(mut command: Command) -> (Option<i32>, Vec<String>) {
    let output = command.output().unwrap();
    assert_eq!(out(&output), "");
    let lines = String::from_utf8(output.stderr).unwrap();
    (
        output.status.code(),
        lines.lines().map(ToOwned::to_owned).collect(),
    )
}

fn shown(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    out(&output)
}

/// The line of a key.
fn line<'a>(text: &'a str, start: &str) -> &'a str {
    text.lines()
        .find(|line| line.starts_with(start))
        .unwrap_or_else(|| panic!("no {start} in\n{text}"))
}

#[test]
fn the_origin_of_each_layer() {
    let home = Home::new();
    let user = home.file(
        "config/pipit/config.toml",
        "root = \"home\"\n\n[model]\npath = \"m.gguf\"\nn_ctx = 256\nthreads = 3\nslots = 2\n",
    );
    let mut command = home.pipit(&["config", "show", "--origin", "--ctx", "512", "--state-dir", "s"]);
    command
        .env("PIPIT_MODEL__N_CTX", "384")
        .env("PIPIT_MODEL__THREADS", "1")
        .env("PIPIT_BROKER", "mqtt://broker.local");
    let text = shown(command);
    let user_line = |number: usize| format!("# {}:{number}", user.display());
    for (start, end) in [
        ("root = \"home\"", user_line(1)),
        ("path = ", user_line(4)),
        ("slots = 2 ", user_line(7)),
        ("threads = 1 ", "# variable PIPIT_MODEL__THREADS".to_owned()),
        ("n_ctx = 512 ", "# flag --ctx".to_owned()),
        ("state_dir = \"s\" ", "# flag --state-dir".to_owned()),
        (
            "url = \"mqtt://broker.local\"",
            "# variable PIPIT_BROKER".to_owned(),
        ),
        ("top_p = 0.95 ", "# default".to_owned()),
        ("# username is not set ", "# default".to_owned()),
    ] {
        let line = line(&text, start);
        assert!(line.ends_with(&end), "{line}\nshould end with {end}");
    }
    // A relative path is one beside its file.
    assert!(line(&text, "path = ").contains(user.with_file_name("m.gguf").to_str().unwrap()));

    let mut command = home.pipit(&["config", "show", "--origin", "--json"]);
    command.env("PIPIT_DEVICE", "kitchen");
    let json: Value = serde_json::from_str(&shown(command)).unwrap();
    assert_eq!(json["model"]["n_ctx"]["value"], 256);
    assert_eq!(json["model"]["n_ctx"]["origin"]["file"], user.to_str().unwrap());
    assert_eq!(json["model"]["n_ctx"]["origin"]["line"], 5);
    assert_eq!(json["device"]["origin"]["kind"], "variable");
    assert_eq!(json["device"]["origin"]["name"], "PIPIT_DEVICE");
    assert_eq!(json["metrics"]["interval_s"]["origin"]["kind"], "default");
}

#[test]
fn what_is_shown_can_be_read_again() {
    let home = Home::new();
    home.file(
        "config/pipit/config.toml",
        "[sampling]\ntop_p = 0.7\n[adapters]\n\"two words\" = \"/a.gguf\"\n",
    );
    let json = shown(home.pipit(&["config", "show", "--json"]));
    let text = shown(home.pipit(&["config", "show", "--origin"]));
    let file = home.file("shown.toml", &text);
    let again = shown(home.pipit(&["config", "show", "--json", "--config", file.to_str().unwrap()]));
    assert_eq!(json, again);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["adapters"]["two words"], "/a.gguf");
    assert_eq!(json["sampling"]["top_p"], 0.7);
    assert_eq!(json["broker"]["username"], Value::Null);
}

#[test]
fn a_named_file_replaces_the_users() {
    let home = Home::new();
    home.file("config/pipit/config.toml", "root = \"user\"\ngrace_s = 9\n");
    let file = home.file("named.toml", "root = \"named\"\n");
    let text = shown(home.pipit(&["config", "show", "--config", file.to_str().unwrap()]));
    assert_eq!(line(&text, "root"), "root = \"named\"");
    assert_eq!(line(&text, "grace_s"), "grace_s = 5");
}

#[test]
fn check_lists_every_problem() {
    let home = Home::new();
    let file = home.file(
        "bad.toml",
        "devise = \"a\"\n[model]\nn_ctx = \"x\"\n[brokr]\nurl = \"x\"\n",
    );
    let path = file.to_str().unwrap();
    let mut command = home.pipit(&["config", "check", path]);
    command.env("PIPIT_LIMITS__QUEU", "4");
    let (code, lines) = refused(command);
    assert_eq!(code, Some(78));
    assert_eq!(
        lines,
        [
            format!("error: {path}:1: unknown key `devise`; hint: did you mean `device`?"),
            format!(
                "error: {path}:3: model.n_ctx: invalid type: string \"x\", expected u32; hint: its default is 2048"
            ),
            format!("error: {path}:4: unknown key `brokr`; hint: did you mean `broker`?"),
            "error: variable PIPIT_LIMITS__QUEU: unknown key `limits.queu`; hint: did you mean `PIPIT_LIMITS__QUEUE`?"
                .to_owned(),
        ]
    );

    // Files that are not there, whose names are right.
    home.file("here.gguf", "");
    let file = home.file(
        "absent.toml",
        "[model]\npath = \"absent.gguf\"\n[adapters]\na = \"absent.gguf\"\nb = \"here.gguf\"\n\
         [broker]\nca = \"absent.pem\"\nusername = \"u\"\npassword_file = \"absent\"\n",
    );
    let path = file.to_str().unwrap();
    let (code, lines) = refused(home.pipit(&["config", "check", path]));
    assert_eq!((code, lines.len()), (Some(78), 4), "{lines:#?}");
    for (number, key) in [
        (2, "model.path"),
        (4, "adapters.a"),
        (7, "broker.ca"),
        (9, "broker.password_file"),
    ] {
        let start = format!("error: {path}:{number}: {key}: ");
        let found = lines.iter().find(|line| line.starts_with(&start));
        assert!(
            found.is_some_and(|line| line.contains("hint:")),
            "{start} {lines:#?}"
        );
    }
    let output = home.pipit(&["config", "check", path, "--json"]).output().unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(78));
    assert_eq!(json["problems"].as_array().map(Vec::len), Some(4), "{json}");
}

#[test]
fn check_of_what_is_right() {
    let home = Home::new();
    home.file("secret", "hunter2\n");
    home.file("m.gguf", "");
    let file = home.file(
        "good.toml",
        "[model]\npath = \"m.gguf\"\n[broker]\nusername = \"u\"\npassword_file = \"secret\"\n",
    );
    let path = file.to_str().unwrap();
    assert_eq!(
        shown(home.pipit(&["config", "check", path])),
        format!("{path}: good\n")
    );
    let json = shown(home.pipit(&["config", "check", path, "--json"]));
    assert_eq!(json, "{\"problems\":[]}\n");
    // The file is named, what is in it is not.
    let text = shown(home.pipit(&["config", "show", "--origin", "--config", path]));
    assert!(line(&text, "password_file").contains("secret"));
    assert!(!text.contains("hunter2"), "{text}");
}

#[test]
fn serve_and_ask_have_the_layers() {
    let home = Home::new();
    let file = home.file("config/pipit/config.toml", "[model]\npaht = \"m.gguf\"\n");
    let expected = format!(
        "error: {}:2: unknown key `model.paht`; hint: did you mean `model.path`?",
        file.display()
    );
    for command in [&["serve"][..], &["ask", "x"], &["config", "show"]] {
        let (code, lines) = refused(home.pipit(command));
        assert_eq!((code, lines), (Some(78), vec![expected.clone()]), "{command:?}");
    }
    // The user's file names a model that is not there: `serve` has read it.
    let file = home.file("config/pipit/config.toml", "[model]\npath = \"absent.gguf\"\n");
    let (code, lines) = refused(home.pipit(&["serve"]));
    let model = file.with_file_name("absent.gguf");
    assert_eq!(code, Some(78));
    assert!(lines.concat().contains(model.to_str().unwrap()), "{lines:?}");
    // A broker that a variable names and nobody is at: `ask` has read it.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .unwrap()
        .port();
    let mut command = home.pipit(&["ask", "x"]);
    command.env("PIPIT_BROKER__URL", format!("mqtt://127.0.0.1:{port}"));
    let (code, lines) = refused(command);
    assert_eq!(code, Some(69));
    assert!(lines.concat().contains(&port.to_string()), "{lines:?}");
    let (code, lines) = refused(home.pipit(&["ask", "x", "--broker", "http://x"]));
    assert_eq!(code, Some(78));
    assert!(
        lines[0].starts_with("error: flag --broker: broker.url: ") && lines[0].contains("hint:"),
        "{lines:?}"
    );
}

#[test]
fn the_generated_file_is_the_reference_and_changes_nothing() {
    let home = Home::new();
    let text = shown(home.pipit(&["config", "generate"]));
    let file = home.file("generated.toml", &text);
    let path = file.to_str().unwrap();
    let with = shown(home.pipit(&["config", "show", "--json", "--config", path]));
    assert_eq!(with, shown(home.pipit(&["config", "show", "--json"])));
    assert_eq!(
        shown(home.pipit(&["config", "check", path])),
        format!("{path}: good\n")
    );

    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/config.toml");
    if std::env::var_os("PIPIT_WRITE_REFERENCE").is_some() {
        std::fs::create_dir_all(reference.parent().unwrap()).unwrap();
        std::fs::write(&reference, &text).unwrap();
    }
    assert_eq!(
        std::fs::read_to_string(&reference).unwrap_or_default(),
        text,
        "docs/reference/config.toml is stale; hint: PIPIT_WRITE_REFERENCE=1 cargo test -p pipit --test config"
    );
}
