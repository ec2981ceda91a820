//! A folder with the tiny model, its tokenizer and rows, and the program to run in it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "not every test program uses all of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{AddedToken, Tokenizer};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// The tiny model with a tokenizer of 256 words and a chat template.
pub(crate) struct Workplace {
    pub(crate) dir: TempDir,
}

impl Workplace {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "generation_config.json", "model.safetensors"] {
            fs::copy(fixture("tiny-tied").join(name), model.join(name)).unwrap();
        }
        let special = ["<unk>", "<bos>", "<end>", "<user>", "<bot>"];
        let words = special
            .into_iter()
            .map(str::to_owned)
            .chain((5..256).map(|i| format!("w{i}")));
        let vocab = words.enumerate().map(|(id, word)| (word, id as u32)).collect();
        let words = WordLevel::builder()
            .vocab(vocab)
            .unk_token("<unk>".into())
            .build()
            .unwrap();
        let mut tokenizer = Tokenizer::new(words);
        tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
        tokenizer
            .add_special_tokens(special.map(|token| AddedToken::from(token, true)))
            .unwrap();
        tokenizer.save(model.join("tokenizer.json"), false).unwrap();
        let template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\
            {{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} <end>\n{% endfor %}\
            {% if add_generation_prompt %}<bot> {% endif %}";
        fs::write(model.join("chat_template.jinja"), template).unwrap();
        let place = Self { dir };
        // Eight questions with an answer each.
        let rows: Vec<Value> = (0..8)
            .map(|i| {
                let content = |from: u32, count: u32| {
                    (0..count)
                        .map(|k| format!("w{}", 5 + (from + 7 * k) % 250))
                        .collect::<Vec<_>>()
                        .join(" ")
                };
                json!({"language": if i % 2 == 0 { "nl" } else { "fr" }, "messages": [
                    {"role": "user", "content": content(31 * i, 3 + i % 3)},
                    {"role": "assistant", "content": content(17 * i + 100, 2 + i % 4)}]})
            })
            .collect();
        place.write("train.jsonl", &rows);
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, rows: &[Value]) {
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        fs::write(self.path(name), text).unwrap();
    }

    /// The program with these arguments, not yet started.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipit-distill"));
        command.args(args).current_dir(self.dir.path());
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    pub(crate) fn sft(&self, run: &str, more: &[&str]) -> Output {
        let mut args = vec![
            "sft",
            "--model",
            "model",
            "--data",
            "train.jsonl",
            "-o",
            run,
            "--learning-rate",
            "1e-2",
        ];
        args.extend(more);
        self.run(&args)
    }

    /// Runs and expects this exit code, this text on standard error, and nothing left behind.
    pub(crate) fn refused(&self, code: i32, text: &str, output: &Output) {
        failed(code, text, output);
        let left: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        let left = left
            .iter()
            .filter(|name| name.to_string_lossy().contains("run"))
            .count();
        assert_eq!(left, 0, "something is left behind");
    }
}

pub(crate) fn succeeded(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Expects this exit code, and one error with this text on standard error.
pub(crate) fn failed(code: i32, text: &str, output: &Output) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(error.contains(text), "{text:?} is not in: {error}");
    assert_eq!(error.matches("error:").count(), 1, "{error}");
}
