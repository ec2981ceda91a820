//! The program as a user meets it: results, messages, exit codes, and that nothing half-written stays.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pipit_convert::gguf::{Gguf, TensorType};
use serde_json::Value as Json;
use support::{convert, fixture, names, pipit_convert, stderr};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The program must fail with 1, say all of `parts`, point out a `hint:`, and leave `dir` as it was.
fn fails(args: &[&str], parts: &[&str], dir: &Path) {
    let before = names(dir);
    let output = pipit_convert(args);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.starts_with("error: "), "{message}");
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
    assert!(!message.contains("panicked"), "{message}");
    assert_eq!(names(dir), before);
}

#[test]
fn a_checkpoint_goes_to_gguf_and_back_unchanged() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["tied", "untied"] {
        let base = fixture(name);
        let (first, folder, second) = (
            scratch.path().join("first.gguf"),
            scratch.path().join(name),
            scratch.path().join("second.gguf"),
        );
        let run = |args: &[&str]| {
            let output = pipit_convert(args);
            assert!(output.status.success(), "{}", stderr(&output));
            serde_json::from_slice::<Json>(&output.stdout).unwrap()
        };
        let report = run(&[
            "model",
            text(&base),
            "-t",
            "f32",
            "-o",
            text(&first),
            "--force",
            "--json",
        ]);
        assert_eq!(report["type"], "F32");
        let report = run(&["import", text(&first), "-o", text(&folder), "--json"]);
        assert_eq!(report["architecture"], "llama");
        run(&[
            "model",
            text(&folder),
            "-t",
            "F32",
            "-o",
            text(&second),
            "--force",
            "--json",
        ]);
        let (first, second) = (Gguf::open(&first).unwrap(), Gguf::open(&second).unwrap());
        for tensor in first.tensors() {
            let other = second.tensor(&tensor.name).unwrap();
            assert!(
                first.data(tensor) == second.data(other),
                "{name}: {}",
                tensor.name
            );
        }
        assert_eq!(first.tensors().len(), second.tensors().len());
        // The sampler's settings have no key of the architecture, and the names of files differ.
        let ignored = |key: &str| key.starts_with("pipit.") || key.starts_with("general.sampling.");
        for (key, value) in first.metadata().iter().filter(|(key, _)| !ignored(key)) {
            // In f32 the checksums stay, not the dtype of the file: BF16 became F32.
            assert_eq!(second.get(key), Some(value), "{name}: {key}");
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, adapter) = (fixture("tied"), fixture("adapters/plain"));
    let bytes = ["1", "3"].map(|threads| {
        let out = scratch.path().join(threads);
        let output = Command::new(env!("CARGO_BIN_EXE_pipit-convert"))
            .args([
                "model",
                text(&base),
                "--adapter",
                text(&adapter),
                "-o",
                text(&out),
            ])
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        std::fs::read(&out).unwrap()
    });
    assert!(bytes[0] == bytes[1]);
}

#[test]
fn an_existing_result_stays_without_force() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.gguf");
    std::fs::write(&out, "mine").unwrap();
    let base = fixture("tied");
    let args = ["model", text(&base), "-o", text(&out)];
    fails(
        &args,
        &["out.gguf exists already", "hint: --force"],
        scratch.path(),
    );
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "mine");
    assert!(
        pipit_convert(&[&args[..], &["--force"]].concat())
            .status
            .success()
    );
    Gguf::open(&out).unwrap();
    assert_eq!(names(scratch.path()), ["out.gguf", "out.gguf.md"]);
    let folder = scratch.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    fails(
        &["import", text(&out), "-o", text(&folder)],
        &["folder exists already"],
        scratch.path(),
    );
    assert!(
        pipit_convert(&["import", text(&out), "-o", text(&folder), "--force"])
            .status
            .success()
    );
    assert!(folder.join("config.json").is_file());
}

#[test]
fn bad_gguf_files_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let good = scratch.path().join("good.gguf");
    convert(&fixture("tied"), &[], TensorType::F16, &good).unwrap();
    let bytes = std::fs::read(&good).unwrap();
    let bad = scratch.path().join("bad.gguf");
    std::fs::write(&bad, "").unwrap();
    let out = scratch.path().join("out");
    let import =
        |file: &Path, parts: &[&str]| fails(&["import", text(file), "-o", text(&out)], parts, scratch.path());
    import(&scratch.path().join("none.gguf"), &["none.gguf", "No such file"]);
    import(scratch.path(), &["it is not a file"]);
    import(&bad, &["bad.gguf is no GGUF file", "hint:"]);
    std::fs::write(&bad, "<html>not found</html>").unwrap();
    import(&bad, &["bad.gguf is no GGUF file", "hint:"]);
    std::fs::write(&bad, &bytes[..bytes.len() / 2]).unwrap();
    import(&bad, &["bad.gguf is truncated: tensor", "hint:"]);
    std::fs::write(&bad, &bytes[..100]).unwrap();
    import(&bad, &["bad.gguf is truncated", "hint:"]);
    // Another architecture, another tokenizer.
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut bytes = bytes.clone();
        while let Some(at) = bytes
            .windows(from.len())
            .position(|window| window == from.as_bytes())
        {
            bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        }
        std::fs::write(&bad, bytes).unwrap();
    };
    replaced("llama", "bloom");
    import(
        &bad,
        &[
            "the architecture bloom is not supported",
            "hint: built so far: llama",
        ],
    );
    replaced("smollm", "chatgl");
    import(&bad, &["the pre-tokenizer \"chatgl\" is not supported", "hint:"]);
    fails(
        &["inspect", text(&scratch.path().join("none.gguf"))],
        &["none.gguf"],
        scratch.path(),
    );
}

/// A copy of a fixture that a test may spoil.
fn copy(name: &str, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for file in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        std::fs::copy(fixture(name).join(file), to.join(file)).unwrap();
    }
}

fn edit(path: &Path, edit: impl FnOnce(&mut Json)) {
    let mut json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn bad_checkpoints_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.gguf");
    let model =
        |dir: &Path, parts: &[&str]| fails(&["model", text(dir), "-o", text(&out)], parts, scratch.path());
    model(
        &scratch.path().join("none"),
        &["is no checkpoint: it does not exist", "hint:"],
    );
    model(
        scratch.path(),
        &["is no checkpoint: it has no config.json", "hint:"],
    );
    let mut at = 0;
    let mut spoiled = |spoil: &dyn Fn(&Path), parts: &[&str]| {
        at += 1;
        let dir = scratch.path().join(format!("copy{at}"));
        copy("tied", &dir);
        spoil(&dir);
        model(&dir, parts);
    };
    spoiled(
        &|dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap(),
        &["no model.safetensors", "hint:"],
    );
    spoiled(
        &|dir| std::fs::remove_file(dir.join("tokenizer.json")).unwrap(),
        &["tokenizer.json", "does not exist"],
    );
    spoiled(
        &|dir| {
            let path = dir.join("model.safetensors");
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() - 1000]).unwrap();
        },
        &["model.safetensors", "truncated"],
    );
    spoiled(
        &|dir| std::fs::write(dir.join("model.safetensors"), "x").unwrap(),
        &["no valid safetensors"],
    );
    spoiled(
        &|dir| std::fs::write(dir.join("config.json"), "{").unwrap(),
        &["config.json"],
    );
    let config = |change: fn(&mut Json)| move |dir: &Path| edit(&dir.join("config.json"), change);
    spoiled(
        &config(|c| c["architectures"] = "GPT2LMHeadModel".into()),
        &["config.json: architectures names no architecture"],
    );
    spoiled(
        &config(|c| c["architectures"][0] = "GPT2LMHeadModel".into()),
        &["GPT2LMHeadModel is not supported"],
    );
    spoiled(
        &config(|c| c["num_hidden_layers"] = 3.into()),
        &["lacks tensors", "model.layers.2.", "llama"],
    );
    spoiled(
        &config(|c| c["num_hidden_layers"] = 1.into()),
        &["does not have: model.layers.1."],
    );
    spoiled(
        &config(|c| c["tie_word_embeddings"] = false.into()),
        &["lm_head.weight", "hint:"],
    );
    spoiled(
        &config(|c| c["vocab_size"] = 400.into()),
        &["model.embed_tokens.weight", "[340, 32]", "[400, 32]"],
    );
    spoiled(
        &config(|c| c["hidden_size"] = "big".into()),
        &["hidden_size is \"big\""],
    );
    spoiled(
        &config(|c| c["rope_parameters"]["rope_type"] = "yarn".into()),
        &["rope_parameters asks for yarn"],
    );
    spoiled(
        &config(|c| c["quantization_config"] = serde_json::json!({"quant_method": "gptq"})),
        &["quantised by gptq", "hint:"],
    );
    let tokenizer = |change: fn(&mut Json)| move |dir: &Path| edit(&dir.join("tokenizer.json"), change);
    spoiled(
        &tokenizer(|t| t["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false.into()),
        &["the pre_tokenizer", "is not supported", "hint:"],
    );
    spoiled(
        &tokenizer(|t| t["normalizer"] = serde_json::json!({"type": "NFKC"})),
        &["the normalizer", "NFKC"],
    );
    spoiled(
        &tokenizer(|t| t["model"]["type"] = "Unigram".into()),
        &["a tokenizer model of type Unigram"],
    );
    spoiled(
        &tokenizer(|t| t["model"]["merges"][0] = "zz qq".into()),
        &["the merge \"zz qq\""],
    );
    spoiled(
        &tokenizer(|t| t["added_tokens"][0]["id"] = 5000.into()),
        &["5000", "vocab_size"],
    );
    model(
        &fixture("tied").join("model.safetensors"),
        &["is no GGUF file", "hint:"],
    );
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("copy");
    copy("tied", &dir);
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let n = bytes.len();
    bytes[n - 8..n - 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let out = scratch.path().join("out.gguf");
    fails(
        &["model", text(&dir), "-o", text(&out)],
        &["is NaN", "hint:"],
        scratch.path(),
    );
}

#[test]
fn adapters_that_do_not_fit_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.gguf");
    let (plain, tied, untied) = (fixture("adapters/plain"), fixture("tied"), fixture("untied"));
    let model = |base: &Path, adapter: &str, parts: &[&str]| {
        fails(
            &["model", text(base), "--adapter", adapter, "-o", text(&out)],
            parts,
            scratch.path(),
        );
    };
    model(
        &untied,
        text(&plain),
        &[
            "adapters/plain",
            "mlp.down_proj.weight is [32, 64]",
            "[36, 64]",
            "another base",
            "names tied",
        ],
    );
    model(
        &tied,
        text(&tied),
        &["is no adapter: it has no adapter_config.json", "hint:"],
    );
    model(
        &tied,
        &format!("{}=much", text(&plain)),
        &["\"much\" is no scale", "hint:"],
    );
    let dir = scratch.path().join("adapter");
    std::fs::create_dir(&dir).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(plain.join(file), dir.join(file)).unwrap();
    }
    edit(&dir.join("adapter_config.json"), |config| {
        config["use_qalora"] = true.into()
    });
    model(
        &tied,
        text(&dir),
        &["`use_qalora` is active (true)", "not supported"],
    );
    let deep = scratch.path().join("deep");
    copy("tied", &deep);
    edit(&dir.join("adapter_config.json"), |config| {
        config["use_qalora"] = false.into();
        config["r"] = 8.into();
    });
    model(&tied, text(&dir), &["rank 4", "says 8"]);
}

#[test]
fn dry_run_prints_the_table_and_writes_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.gguf");
    let (base, adapter) = (fixture("tied"), fixture("adapters/plain"));
    let args = [
        "model",
        text(&base),
        "--adapter",
        text(&adapter),
        "-t",
        "q8_0",
        "-o",
        text(&out),
        "--dry-run",
    ];
    let output = pipit_convert(&args);
    assert!(output.status.success());
    let table = String::from_utf8(output.stdout).unwrap();
    let line = table
        .lines()
        .find(|line| line.starts_with("blk.1.attn_q.weight"))
        .unwrap();
    assert!(
        line.contains("Q8_0") && line.contains("32×32") && line.ends_with("adapter merged"),
        "{line}"
    );
    assert!(names(scratch.path()).is_empty());
    let output = pipit_convert(&[&args[..], &["--json"]].concat());
    let report: Json = serde_json::from_slice(&output.stdout).unwrap();
    let merged = report["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|tensor| tensor["merged"] == true)
        .count();
    assert_eq!(merged, 4);
    let of = |name: &str| -> Json {
        let tensors = report["tensors"].as_array().unwrap();
        tensors
            .iter()
            .find(|tensor| tensor["name"] == name)
            .unwrap()
            .clone()
    };
    // Rows of 32 are whole blocks of Q8_0; the norms are vectors.
    assert_eq!(of("blk.0.attn_q.weight")["repacked"], "yes");
    assert_eq!(of("blk.0.attn_q.weight")["fallback"], Json::Null);
    assert_eq!(of("token_embd.weight")["repacked"], "copy");
    assert_eq!(of("output_norm.weight")["rule"], "a vector");
    assert!(report["peak_memory"].as_u64().unwrap() < 64 << 20);
    let output = pipit_convert(&["model", text(&base), "-t", "Q4_K_M", "--dry-run"]);
    let table = String::from_utf8(output.stdout).unwrap();
    let why = "Q6_K by attn_v: more bits in half of the layers; rows of 32 are no whole blocks of 256";
    assert!(
        table
            .lines()
            .any(|line| line.starts_with("blk.1.attn_v.weight") && line.ends_with(why)),
        "{table}"
    );
}

#[test]
fn unknown_types_are_usage_errors_that_list_the_known_ones() {
    let base = fixture("tied");
    for (flag, value, known) in [
        ("-t", "Q9", "it knows F32, F16, BF16, Q8_0, Q6_K, Q5_K_M"),
        ("-t", "NVFP4", "--tensor-type '.*=NVFP4'"),
        (
            "--token-embedding-type",
            "Q8_K",
            "ggml quantises to F32, F16, Q4_0",
        ),
        (
            "--output-tensor-type",
            "Q4_K_M",
            "ggml quantises to F32, F16, Q4_0",
        ),
        ("--tensor-type", "attn_q", "it is not REGEX=TYPE"),
        ("--tensor-type", "attn_(q=Q8_0", "unclosed group"),
    ] {
        let output = pipit_convert(&["model", text(&base), flag, value, "--dry-run"]);
        assert_eq!(output.status.code(), Some(2));
        let message = stderr(&output);
        assert!(message.contains(value) && message.contains(known), "{message}");
    }
    assert_eq!(pipit_convert(&["model"]).status.code(), Some(2));
    assert_eq!(pipit_convert(&[]).status.code(), Some(2));
}

#[test]
fn inspect_and_archs_tell_as_text_and_as_json() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.gguf");
    convert(&fixture("untied"), &[], TensorType::Q8_0, &out).unwrap();
    let output = pipit_convert(&["inspect", text(&out)]);
    let shown = String::from_utf8(output.stdout).unwrap();
    for part in [
        "general.architecture",
        "\"llama\"",
        "blk.1.ffn_down.weight",
        "64×36",
        "rope_freqs.weight",
    ] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    let output = pipit_convert(&["inspect", text(&out), "--json"]);
    let report: Json = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["metadata"]["llama.block_count"], 2);
    assert_eq!(report["metadata"]["tokenizer.ggml.tokens"]["elements"], 353);
    assert_eq!(report["tensors"].as_array().unwrap().len(), 36);
    let output = pipit_convert(&["archs", "--json"]);
    let report: Json = serde_json::from_slice(&output.stdout).unwrap();
    let llama = &report["architectures"][0];
    assert_eq!(llama["name"], "llama");
    assert_eq!(llama["hugging_face"][1], "MistralForCausalLM");
    assert_eq!(llama["proved_on"].as_array().unwrap().len(), 5);
    let shown = String::from_utf8(pipit_convert(&["archs"]).stdout).unwrap();
    for arch in report["architectures"].as_array().unwrap() {
        assert!(
            shown.contains(arch["hugging_face"][0].as_str().unwrap()),
            "{shown}"
        );
    }
}

#[test]
fn a_disk_that_fills_is_one_line_and_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_pipit-convert");
    let base = fixture("tied");
    let gguf = scratch.path().join("in.gguf");
    convert(&base, &[], TensorType::F32, &gguf).unwrap();
    let (out, folder) = (scratch.path().join("out.gguf"), scratch.path().join("folder"));
    for args in [
        ["model", text(&base), text(&out)],
        ["import", text(&gguf), text(&folder)],
    ] {
        // No file may grow beyond 64 KiB (ulimit counts in 512 or 1024 bytes); the kernel then refuses the write.
        let script = format!(
            "trap '' XFSZ; ulimit -f 64; exec {program} {} {} -o {}",
            args[0], args[1], args[2]
        );
        let script = if args[0] == "model" {
            format!("{script} -t F32")
        } else {
            script
        };
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(
            message.starts_with("error: cannot write ") && message.matches("File too large").count() == 1,
            "{message}"
        );
        assert_eq!(message.lines().count(), 2, "one line and its hint: {message}");
        assert!(message.contains("\nhint: free some space"), "{message}");
        assert_eq!(names(scratch.path()), ["in.gguf"]);
    }
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    for signal in ["INT", "TERM"] {
        let scratch = tempfile::tempdir().unwrap();
        let base = support::smollm2();
        let out = scratch.path().join("out");
        let mut child = Command::new(env!("CARGO_BIN_EXE_pipit-convert"))
            .args(["import", text(&base), "-o", text(&out)])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // As soon as the hidden folder is there, it is being written.
        let deadline = Instant::now() + Duration::from_secs(20);
        while names(scratch.path()).is_empty() {
            assert!(Instant::now() < deadline, "nothing was begun");
            std::thread::sleep(Duration::from_millis(2));
        }
        let id = child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-s", signal, &id])
                .status()
                .unwrap()
                .success()
        );
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(130), "{signal}");
        assert!(names(scratch.path()).is_empty(), "{:?}", names(scratch.path()));
    }
}
