//! The program itself on the tiny model: a run, the same run again, evaluation, and bad input.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod workplace;

use std::fs;

use serde_json::{Value, json};
use workplace::{Workplace, failed, fixture, succeeded};

#[test]
fn a_run_learns_its_rows_and_eval_says_so() {
    let place = Workplace::new();
    for (method, run) in [("lora", "run-lora"), ("full", "run-full")] {
        let more = [
            "--method",
            method,
            "--max-steps",
            "300",
            "--per-device-train-batch-size",
            "4",
            "--eval-data",
            "train.jsonl",
            "--json",
        ];
        let summary: Value = serde_json::from_str(&succeeded(&place.sft(run, &more))).unwrap();
        // The random output layer is frozen under LoRA: with hidden states of norm 8 and rows of norm 0.64 no
        // probability comes near 1, so only full training can reach a loss near 0.
        let reached = if method == "lora" { 1.3 } else { 0.05 };
        assert!(
            summary["eval_loss"].as_f64().unwrap() < reached,
            "{method}: {summary}"
        );
        assert_eq!(summary["data"]["used"], 8);
        let mut args = vec![
            "eval",
            "--data",
            "train.jsonl",
            "--by",
            "language",
            "--max-new-tokens",
            "8",
            "--json",
        ];
        match method {
            "lora" => args.extend(["--model", "model", "--adapter", run]),
            _ => args.extend(["--model", run]),
        }
        let eval: Value = serde_json::from_str(&succeeded(&place.run(&args))).unwrap();
        assert_eq!(
            (eval["exact_match"].as_f64(), eval["rows"].as_u64()),
            (Some(1.0), Some(8))
        );
        assert_eq!(eval["by"]["nl"]["rows"], 4);
        let metrics = fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap();
        assert!(metrics.lines().count() >= 8 && metrics.contains("grad_norm"));
        let samples = fs::read_to_string(place.path(run).join("samples.jsonl")).unwrap();
        assert_eq!(
            samples
                .lines()
                .filter(|line| line.contains("\"exact\":true"))
                .count(),
            8
        );
    }
    let before: Value = serde_json::from_str(&succeeded(&place.run(&[
        "eval",
        "--model",
        "model",
        "--data",
        "train.jsonl",
        "--max-new-tokens",
        "8",
        "--json",
    ])))
    .unwrap();
    assert_eq!(before["exact_match"], 0.0);
    let distance = |teacher: &str| {
        let args = [
            "eval",
            "--model",
            "run-full",
            "--data",
            "train.jsonl",
            "--no-generate",
            "--json",
            "--teacher",
            teacher,
        ];
        let eval: Value = serde_json::from_str(&succeeded(&place.run(&args))).unwrap();
        eval["divergence"]["forward_kl"].as_f64().unwrap()
    };
    assert!(distance("run-full") < 1e-9);
    assert!(distance("model") > 0.5);
    let served = [
        "eval",
        "--model",
        "model",
        "--data",
        "train.jsonl",
        "--teacher",
        "http://127.0.0.1:1",
    ];
    failed(2, "`pipit-distill opd` takes servers", &place.run(&served));
}

#[test]
fn the_same_seed_gives_the_same_bits_and_accumulation_the_large_batch() {
    let place = Workplace::new();
    let adapter = |run: &str, more: &[&str]| -> Vec<u8> {
        let mut args = vec!["--max-steps", "6", "--r", "4"];
        args.extend(more);
        succeeded(&place.sft(run, &args));
        fs::read(place.path(run).join("adapter_model.safetensors")).unwrap()
    };
    let dropout = ["--lora-dropout", "0.2", "--per-device-train-batch-size", "4"];
    let first = adapter("run-1", &dropout);
    assert_eq!(first, adapter("run-2", &dropout), "the same seed");
    assert_ne!(
        first,
        adapter("run-3", &[&dropout[..], &["--seed", "1"]].concat()),
        "another seed"
    );

    let whole = adapter("run-4", &["--per-device-train-batch-size", "6"]);
    let parts = adapter(
        "run-5",
        &[
            "--per-device-train-batch-size",
            "2",
            "--gradient-accumulation-steps",
            "3",
        ],
    );
    let floats = |bytes: &[u8]| -> Vec<f32> {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let mut tensors = file.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let bytes = tensors.iter().flat_map(|(_, view)| view.data().chunks_exact(4));
        bytes
            .map(|raw| f32::from_le_bytes(raw.try_into().unwrap()))
            .collect()
    };
    let worst = floats(&whole)
        .iter()
        .zip(floats(&parts))
        .fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
    assert!(worst < 1e-4, "accumulation differs by {worst}");
}

#[test]
fn every_adapter_is_trained_evaluated_and_trained_further() {
    let place = Workplace::new();
    let text = [
        "--prompt-tuning-init",
        "TEXT",
        "--prompt-tuning-init-text",
        "w9 w8 w7",
    ];
    let prompt = [&["--method", "prompt", "--num-virtual-tokens", "4"][..], &text].concat();
    let prefix = vec![
        "--method",
        "prefix",
        "--num-virtual-tokens",
        "3",
        "--prefix-projection",
    ];
    let saved = vec![
        "--use-dora",
        "--target-modules",
        "embed_tokens,q_proj",
        "--modules-to-save",
        "lm_head,norm",
    ];
    for (name, options) in [("prompt", prompt), ("prefix", prefix), ("lora", saved)] {
        let (run, further) = (format!("run-{name}"), format!("run-{name}-further"));
        let steps = |steps| vec!["--max-steps", steps, "--eval-data", "train.jsonl", "--json"];
        let json =
            |output: &std::process::Output| -> Value { serde_json::from_str(&succeeded(output)).unwrap() };
        let first = json(&place.sft(&run, &[options, steps("4")].concat()));
        assert_eq!(first["method"], name);
        let eval = [
            "eval",
            "--model",
            "model",
            "--adapter",
            &run,
            "--data",
            "train.jsonl",
            "--json",
        ];
        let eval = json(&place.run(&[&eval[..], &["--max-new-tokens", "4"]].concat()));
        let difference = eval["loss"].as_f64().unwrap() - first["eval_loss"].as_f64().unwrap();
        assert!(difference.abs() < 1e-5, "{name}: {difference}");
        // The stored adapter decides the method, and training goes on from its loss.
        let second = json(&place.sft(&further, &[vec!["--adapter", &run], steps("30")].concat()));
        assert_eq!(second["method"], name);
        assert!(
            second["eval_loss"].as_f64().unwrap() < first["eval_loss"].as_f64().unwrap(),
            "{name}"
        );
        let config = |run: &str| fs::read_to_string(place.path(run).join("adapter_config.json")).unwrap();
        assert_eq!(config(&run), config(&further));
        let resolved = fs::read_to_string(place.path(&further).join("config.resolved.toml")).unwrap();
        assert!(
            resolved.contains("adapter = ") && !resolved.contains("num_virtual_tokens"),
            "{resolved}"
        );
        let config = format!("{further}/config.resolved.toml");
        succeeded(&place.run(&[
            "sft",
            "--config",
            &config,
            "--max-steps",
            "1",
            "-o",
            &format!("{run}-again"),
        ]));
    }
}

#[test]
fn adapter_options_that_do_not_fit_are_refused() {
    let place = Workplace::new();
    let refused = |code, text, options: &[&str]| place.refused(code, text, &place.sft("run", options));
    refused(
        2,
        "--use-dora is not for --method prefix",
        &["--method", "prefix", "--use-dora"],
    );
    refused(
        2,
        "--prompt-tuning-init-text go together",
        &["--method", "prompt", "--prompt-tuning-init", "TEXT"],
    );
    refused(
        2,
        "no room",
        &["--method", "prompt", "--num-virtual-tokens", "127"],
    );
    refused(
        2,
        "virtual ones among them",
        &["--method", "prompt", "--max-length", "120"],
    );
    refused(2, "pissa", &["--init-lora-weights", "pissa"]);
    refused(1, "layers_to_transform needs", &["--layers-to-transform", "1"]);
    refused(
        1,
        "nearest names are q_proj",
        &["--rank-pattern", r#"{"q_porj": 2}"#],
    );
    let (other, prompt) = (fixture("tiny-untied-lora"), fixture("adapters/prompt"));
    refused(
        1,
        "does not fit this model",
        &["--adapter", other.to_str().unwrap()],
    );
    refused(
        2,
        "is for prompt",
        &["--method", "lora", "--adapter", prompt.to_str().unwrap()],
    );
    refused(
        2,
        "--r cannot be given",
        &["--r", "4", "--adapter", prompt.to_str().unwrap()],
    );
}

#[test]
fn a_configuration_file_is_as_good_as_flags() {
    let place = Workplace::new();
    let text = "model = 'model'\ndata = 'train.jsonl'\nmax_steps = 2\nr = 2\ntarget_modules = ['q_proj']\n";
    fs::write(place.path("sft.toml"), text).unwrap();
    succeeded(&place.run(&["sft", "--config", "sft.toml", "-o", "run"]));
    let config: Value =
        serde_json::from_slice(&fs::read(place.path("run/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["r"], &config["target_modules"]),
        (&json!(2), &json!(["q_proj"]))
    );
    let resolved = fs::read_to_string(place.path("run/config.resolved.toml")).unwrap();
    assert!(resolved.contains("max_steps = 2") && resolved.contains("seed = 42"));
}

#[test]
fn bad_rows_are_counted_by_line() {
    let place = Workplace::new();
    let mut text = fs::read_to_string(place.path("train.jsonl")).unwrap();
    text += "not json\n{\"prompt\":\"w9\",\"completion\":\" \"}\n";
    text += &format!("{{\"text\":\"{}\"}}\n", "w7 ".repeat(60));
    fs::write(place.path("train.jsonl"), text).unwrap();
    let output = place.sft("run", &["--max-steps", "1", "--max-length", "40"]);
    succeeded(&output);
    let summary: Value = serde_json::from_slice(&fs::read(place.path("run/summary.json")).unwrap()).unwrap();
    let data = &summary["data"];
    assert_eq!((&data["rows"], &data["used"]), (&json!(11), &json!(9)));
    assert_eq!(data["broken"][0][0], 9);
    assert_eq!(
        (&data["empty_answers"], &data["truncated"]),
        (&json!([10]), &json!([11]))
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("line 9"));
}

#[test]
fn bad_input_is_named_and_leaves_nothing() {
    let place = Workplace::new();
    fs::create_dir(place.path("empty")).unwrap();
    let sft = |args: &[&str]| place.run(&[&["sft", "-o", "run"], args].concat());
    place.refused(
        1,
        "no config.json",
        &sft(&["--model", "empty", "--data", "train.jsonl"]),
    );
    place.refused(
        1,
        "m.gguf is no checkpoint: it does not exist",
        &sft(&["--model", "m.gguf", "--data", "train.jsonl"]),
    );
    place.refused(
        1,
        "nowhere.jsonl",
        &sft(&["--model", "model", "--data", "nowhere.jsonl"]),
    );
    place.refused(2, "--model is missing", &sft(&["--data", "train.jsonl"]));
    place.refused(2, "--learning-rate", &place.sft("run", &["--learning-rate=-1"]));
    place.refused(
        1,
        "nearest names are q_proj",
        &place.sft("run", &["--target-modules", "q_prj"]),
    );
    place.refused(
        2,
        "max_position_embeddings",
        &place.sft("run", &["--max-length", "4096"]),
    );
    fs::write(place.path("bad.toml"), "learning_rte = 1\n").unwrap();
    place.refused(
        78,
        "did you mean `learning_rate`",
        &sft(&["--config", "bad.toml"]),
    );

    let turn = |role: &str| json!({"role": role, "content": "w9"});
    place.write(
        "tool.jsonl",
        &[json!({"messages": [turn("tool"), turn("assistant")]})],
    );
    place.refused(
        1,
        "tool.jsonl, line 1: the chat template refuses",
        &sft(&["--model", "model", "--data", "tool.jsonl"]),
    );
    place.write("none.jsonl", &[json!({"other": 1})]);
    place.refused(
        1,
        "no usable row",
        &sft(&["--model", "model", "--data", "none.jsonl"]),
    );

    let eval = place.run(&[
        "eval",
        "--model",
        "model",
        "--data",
        "train.jsonl",
        "--by",
        "colour",
    ]);
    place.refused(2, "the columns are language", &eval);
    let adapter = fixture("tiny-untied-lora");
    let eval = place.run(&[
        "eval",
        "--model",
        "model",
        "--adapter",
        adapter.to_str().unwrap(),
        "--data",
        "train.jsonl",
    ]);
    place.refused(1, "does not fit this model", &eval);

    fs::rename(place.path("model/tokenizer.json"), place.path("model/other.json")).unwrap();
    place.refused(1, "tokenizer.json: is missing", &place.sft("run", &[]));
    let text = fs::read_to_string(place.path("model/other.json")).unwrap();
    fs::write(
        place.path("model/tokenizer.json"),
        text.replace("\"w255\": 255", "\"w255\": 999")
            .replace("\"w255\":255", "\"w255\":999"),
    )
    .unwrap();
    place.refused(1, "token 999", &place.sft("run", &[]));
}

#[test]
fn a_run_that_exists_is_not_overwritten() {
    let place = Workplace::new();
    fs::create_dir(place.path("run")).unwrap();
    fs::write(place.path("run/mine"), "hours of work").unwrap();
    let output = place.sft("run", &["--max-steps", "1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("exists already"));
    assert_eq!(
        fs::read_to_string(place.path("run/mine")).unwrap(),
        "hours of work"
    );
}

#[test]
fn a_rate_that_blows_up_stops_and_names_the_batch() {
    let place = Workplace::new();
    let args = [
        "--method",
        "full",
        "--max-steps",
        "60",
        "--learning-rate",
        "1e3",
        "--max-grad-norm",
        "0",
        "--weight-decay",
        "1000",
    ];
    let mut command = vec!["sft", "--model", "model", "--data", "train.jsonl", "-o", "run"];
    command.extend(args);
    let output = place.run(&command);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("hint: lower --learning-rate"), "{error}");
    let batch: Value = serde_json::from_slice(&fs::read(place.path("run/bad-batch.json")).unwrap()).unwrap();
    let sample = &batch["samples"][0];
    assert!(sample["line"].as_u64().unwrap() >= 1);
    assert_eq!(
        sample["ids"].as_array().unwrap().len(),
        sample["labels"].as_array().unwrap().len()
    );
    assert!(!place.path("run/summary.json").exists());
    // What came to no checkpoint does not stand in the way of the next run.
    succeeded(&place.sft("run", &["--max-steps", "1"]));
    assert!(!place.path("run/bad-batch.json").exists());
}

#[test]
fn eight_bits_are_for_the_cpu() {
    let place = Workplace::new();
    let more = ["--optim", "adamw_8bit", "--device", "cuda"];
    place.refused(
        2,
        "--optim adamw_8bit runs on the CPU, not on cuda",
        &place.sft("run", &more),
    );
    succeeded(&place.sft(
        "run",
        &["--optim", "adamw_8bit", "--method", "full", "--max-steps", "2"],
    ));
}

#[test]
fn a_device_or_a_type_that_cannot_be_used_is_refused_before_anything_is_read() {
    let place = Workplace::new();
    for (text, more) in [
        ("device \"gpu\" is not known", &["--device", "gpu"][..]),
        ("--bf16 needs a GPU", &["--bf16"]),
        ("--fp16 needs a GPU", &["--device", "cpu", "--fp16", "true"]),
        ("--bf16 and --fp16 do not go together", &["--bf16", "--fp16"]),
        #[cfg(not(feature = "cuda"))]
        ("--features cuda", &["--device", "cuda:1", "--bf16"]),
        #[cfg(not(feature = "metal"))]
        ("--features metal", &["--device", "metal"]),
    ] {
        place.refused(2, text, &place.sft("run", more));
        let eval = [
            &["eval", "--model", "nowhere", "--data", "nowhere.jsonl"][..],
            more,
        ]
        .concat();
        if !more.contains(&"true") {
            failed(2, text, &place.run(&eval));
        }
    }
}
