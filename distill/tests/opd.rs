//! On-policy distillation by the program itself, on tiny models.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod workplace;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use workplace::{Workplace, failed, succeeded};

const EVAL: [&str; 2] = ["--eval-data", "train.jsonl"];

/// A place with a teacher: the model after it has learned the rows.
fn taught() -> Workplace {
    let place = Workplace::new();
    let steps = ["--method", "full", "--max-steps", "120"];
    succeeded(&place.sft("teacher", &steps));
    place
}

fn opd(place: &Workplace, run: &str, more: &[&str]) -> Output {
    place.run(&args(run, more))
}

fn args<'a>(run: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let defaults = [
        ("--student", "model"),
        ("--teacher", "teacher"),
        ("--prompts", "train.jsonl"),
        ("--method", "full"),
        ("--learning-rate", "3e-3"),
        ("--max-new-tokens", "8"),
    ];
    let mut args = vec!["opd", "-o", run];
    let defaults = defaults.iter().filter(|(flag, _)| !more.contains(flag));
    args.extend(defaults.flat_map(|(flag, value)| [*flag, *value]));
    args.extend(more);
    args
}

fn summary(place: &Workplace, run: &str) -> Value {
    serde_json::from_slice(&fs::read(place.path(run).join("summary.json")).unwrap()).unwrap()
}

/// The figures of every step without the times.
fn metrics(place: &Workplace, run: &str) -> Vec<Value> {
    let text = fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        for time in [
            "tokens_per_second",
            "seconds",
            "rollout_seconds",
            "teacher_seconds",
        ] {
            line.as_object_mut().unwrap().remove(time);
        }
        line
    });
    lines.collect()
}

/// The weights by their names, to the bit.
fn weights(place: &Workplace, run: &str) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(place.path(run).join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors.map(|(name, view)| (name, view.data().to_vec())).collect()
}

fn kl(summary: &Value) -> f64 {
    summary["divergence"]["forward_kl"].as_f64().unwrap()
}

#[test]
fn a_student_comes_near_its_teacher() {
    let place = taught();
    let run = |name: &str, more: &[&str]| {
        succeeded(&opd(&place, name, &[&EVAL, more].concat()));
        summary(&place, name)
    };
    let before = run("run-before", &["--max-steps", "1", "--learning-rate", "1e-12"]);
    let losses = [
        ("on-policy", "reverse-kl", "1"),
        ("mixed", "jsd", "0.5"),
        ("off-policy", "forward-kl", "0"),
    ];
    for (name, loss, fraction) in losses {
        let run_name = format!("run-{name}");
        let more = [
            "--loss",
            loss,
            "--on-policy-fraction",
            fraction,
            "--max-steps",
            "150",
        ];
        let after = run(&run_name, &more);
        assert!(
            kl(&after) < 0.5 * kl(&before),
            "{name}: {} of {}",
            kl(&after),
            kl(&before)
        );
        let on_policy: f64 = fraction.parse().unwrap();
        for line in metrics(&place, &run_name)
            .iter()
            .filter(|line| line["kind"] == "train")
        {
            let share = line["on_policy"].as_f64().unwrap();
            assert!(if on_policy == 0.5 {
                (0.2..0.9).contains(&share)
            } else {
                share == on_policy
            });
            assert_eq!(line["answer_tokens"].is_null(), on_policy == 0.0);
        }
        let rate = |summary: &Value| summary["draft"]["acceptance_rate"].as_f64().unwrap();
        assert!(rate(&after) > rate(&before) && rate(&after) <= 1.0);
        let page = fs::read_to_string(place.path(&run_name).join("report.html")).unwrap();
        assert!(
            page.contains("KL(teacher‖student)") && page.contains("speed-up"),
            "{name}"
        );
    }
}

#[test]
fn an_adapter_learns_from_the_drawn_tokens_only() {
    let place = convertible();
    // A student that knows something already: what it draws is not all noise.
    succeeded(&place.sft("half", &["--method", "full", "--max-steps", "20"]));
    let more = [
        "--student",
        "half",
        "--method",
        "lora",
        "--loss",
        "policy-gradient",
        "--on-policy-fraction",
        "1",
        "--num-generations",
        "8",
        "--learning-rate",
        "1e-2",
        "--max-steps",
        "60",
        "--max-new-tokens",
        "6",
    ];
    succeeded(&opd(&place, "run", &[&EVAL[..], &more].concat()));
    assert!(place.path("run/adapter_model.safetensors").is_file());
    // What the gradient of a policy makes smaller is the reverse KL on its own answers, which every step estimates.
    let lines = metrics(&place, "run");
    let sampled: Vec<f64> = lines
        .iter()
        .filter_map(|line| line["sampled_kl"].as_f64())
        .collect();
    assert!(sampled[sampled.len() - 1] < 0.75 * sampled[0], "{sampled:?}");
}

#[test]
fn a_teacher_that_is_the_student_teaches_nothing() {
    let place = Workplace::new();
    for (name, loss) in [("run-f", "forward-kl"), ("run-r", "reverse-kl"), ("run-j", "jsd")] {
        let more = [
            "--teacher",
            "model",
            "--loss",
            loss,
            "--max-steps",
            "20",
            "--learning-rate",
            "1e-2",
            "--logging-steps",
            "1",
        ];
        succeeded(&opd(&place, name, &[&EVAL[..], &more].concat()));
        for line in metrics(&place, name)
            .iter()
            .filter(|line| line["kind"] == "train")
        {
            assert!(line["loss"].as_f64().unwrap().abs() < 1e-6, "{line}");
        }
        assert!(
            weights(&place, name) == weights(&place, "model"),
            "{loss}: the weights drift"
        );
        assert!(kl(&summary(&place, name)).abs() < 1e-6);
    }
    // An adapter learns nothing from its own base.
    let more = [
        "--teacher",
        "base",
        "--method",
        "lora",
        "--max-steps",
        "20",
        "--logging-steps",
        "1",
    ];
    succeeded(&opd(&place, "run-base", &more));
    assert!(
        metrics(&place, "run-base")
            .iter()
            .all(|line| line["loss"].as_f64().unwrap().abs() < 1e-6)
    );
}

#[test]
fn a_distillation_that_was_stopped_ends_with_the_bits_of_one_that_was_not() {
    let place = taught();
    let settings = [
        "--max-steps",
        "120",
        "--per-device-train-batch-size",
        "2",
        "--gradient-accumulation-steps",
        "2",
        "--num-generations",
        "2",
        "--steps-per-generation",
        "5",
        "--top-p",
        "0.9",
        "--logging-steps",
        "3",
        "--eval-data",
        "train.jsonl",
        "--eval-steps",
        "40",
        "--lr-scheduler-type",
        "cosine",
        "--save-steps",
        "7",
    ];
    succeeded(&opd(&place, "run-whole", &settings));
    let mut child = place
        .command(&args("run", &settings))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("step 9/")));
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &id])
            .status()
            .unwrap()
            .success()
    );
    let said: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{said:?}");
    assert!(
        said.join("\n")
            .contains("hint: pipit-distill opd --resume-from-checkpoint run"),
        "{said:?}"
    );

    let changed = place.run(&["opd", "--resume-from-checkpoint", "run", "--beta", "0.1"]);
    failed(2, "--beta is 0.1, but the run began with 0.5", &changed);
    succeeded(&place.run(&["opd", "--resume-from-checkpoint", "run"]));
    assert!(weights(&place, "run") == weights(&place, "run-whole"));
    assert_eq!(metrics(&place, "run"), metrics(&place, "run-whole"));
    // The same seed on one thread gives the same bits, another seed others.
    let alone = place
        .command(&args("run-alone", &settings))
        .env("RAYON_NUM_THREADS", "1")
        .output()
        .unwrap();
    succeeded(&alone);
    assert!(weights(&place, "run-alone") == weights(&place, "run-whole"));
    succeeded(&opd(
        &place,
        "run-other",
        &[&settings[..], &["--seed", "1"]].concat(),
    ));
    assert!(weights(&place, "run-other") != weights(&place, "run-whole"));
}

#[test]
fn what_cannot_work_is_refused_by_name() {
    let place = Workplace::new();
    fs::rename(place.path("model"), place.path("teacher")).unwrap();
    fs::create_dir(place.path("model")).unwrap();
    for entry in fs::read_dir(place.path("teacher")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), place.path("model").join(entry.file_name())).unwrap();
    }
    let refused = |code, text: &str, more: &[&str]| {
        let more = [more, &["--max-steps", "2"]].concat();
        place.refused(code, text, &opd(&place, "run", &more));
    };
    refused(
        1,
        "temperature is 0; it must be greater than 0",
        &["--temperature", "0"],
    );
    refused(
        1,
        "temperature is -1",
        &["--temperature=-1", "--rollout-temperature", "1"],
    );
    refused(1, "beta is 1.5; it must be from 0 to 1", &["--beta", "1.5"]);
    refused(2, "--on-policy-fraction is 1.1", &["--on-policy-fraction", "1.1"]);
    refused(1, "needs --on-policy-fraction 1", &["--loss", "policy-gradient"]);
    refused(
        1,
        "leave --rollout-temperature, --top-k and --top-p out",
        &[
            "--loss",
            "policy-gradient",
            "--on-policy-fraction",
            "1",
            "--top-p",
            "0.9",
        ],
    );
    refused(2, "--packing is not for opd", &["--packing"]);
    refused(1, "--teacher base", &["--teacher", "base"]);
    refused(2, "--through: Q4_9", &["--through", "Q4_9"]);

    place.write(
        "prompts.jsonl",
        &[json!({"messages": [{"role": "user", "content": "w9 w8"}]})],
    );
    refused(1, "the answer is empty", &["--prompts", "prompts.jsonl"]);
    let more = [
        "--prompts",
        "prompts.jsonl",
        "--on-policy-fraction",
        "1",
        "--max-steps",
        "2",
    ];
    succeeded(&opd(&place, "answers-itself", &more));

    // The same words, but two of them change places.
    let path = place.path("teacher/tokenizer.json");
    let tokenizer = fs::read_to_string(&path).unwrap();
    let swapped = tokenizer
        .replace("\"w9\":9,", "\"w9\":8,")
        .replacen("\"w8\":8,", "\"w8\":9,", 1);
    assert_ne!(tokenizer, swapped);
    fs::write(&path, swapped).unwrap();
    refused(1, "tokenizer", &[]);
    fs::write(&path, tokenizer).unwrap();
    let template = place.path("teacher/chat_template.jinja");
    let text = fs::read_to_string(&template).unwrap();
    fs::write(&template, text.replace("%}<bot> {%", "%}<bot> <user> {%")).unwrap();
    refused(1, "template", &[]);
}

/// A tiny model that becomes a GGUF file, and rows for it.
fn convertible() -> Workplace {
    let place = Workplace::new();
    fs::remove_dir_all(place.path("model")).unwrap();
    fs::create_dir(place.path("model")).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../convert/tests/fixtures/tied");
    for entry in fs::read_dir(fixture).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), place.path("model").join(entry.file_name())).unwrap();
    }
    let row = |i: usize| {
        let content = [
            "a lamp", "the door", "heat", "music", "a fan", "blinds", "a lock", "the tv",
        ][i];
        json!({"prompt": format!("switch {content} "), "completion": format!("{content} on")})
    };
    place.write("train.jsonl", &(0..8).map(row).collect::<Vec<_>>());
    succeeded(&place.sft("teacher", &["--method", "full", "--max-steps", "80"]));
    place
}

#[test]
fn three_ways_side_by_side_measured_as_gguf() {
    let place = convertible();
    let more = [
        "--through",
        "Q4_0",
        "--controls",
        "--max-steps",
        "40",
        "--on-policy-fraction",
        "1",
        "--loss",
        "reverse-kl",
        "--steps-per-generation",
        "4",
    ];
    succeeded(&opd(&place, "runs", &[&EVAL[..], &more].concat()));
    let of = |arm: &str| summary(&place, &format!("runs/{arm}"));
    let kl_of_gguf = |arm: &str| of(arm)["gguf"]["forward_kl"].as_f64().unwrap();
    for arm in ["off-policy", "on-policy", "through"] {
        assert_eq!(of(arm)["gguf"]["type"], "Q4_0", "{arm}");
        println!("{arm}: {} {}", kl(&of(arm)), kl_of_gguf(arm));
    }
    // Through quantised weights the student is, but for activations, what its file is; the others are not.
    let gap = |arm: &str| (kl_of_gguf(arm) - kl(&of(arm))).abs() / kl(&of(arm));
    assert!(gap("through") < 0.05, "{}", gap("through"));
    let page = fs::read_to_string(place.path("runs/report.html")).unwrap();
    for text in [
        "off-policy",
        "on-policy",
        "through",
        "KL(teacher‖student) of the GGUF file",
    ] {
        assert!(page.contains(text), "{text}");
    }
    // A second call has nothing to do.
    succeeded(&opd(&place, "runs", &[&EVAL[..], &more].concat()));
}

#[test]
fn answers_are_drawn_from_the_gguf_file_and_adapters_go_through_it() {
    let place = convertible();
    let more = [
        "--method",
        "lora",
        "--through",
        "Q8_0",
        "--rollouts",
        "gguf",
        "--max-steps",
        "8",
        "--num-generations",
        "2",
        "--steps-per-generation",
        "4",
        "--on-policy-fraction",
        "1",
        "--logging-steps",
        "1",
        "--learning-rate",
        "1e-2",
    ];
    let again = [&EVAL[..], &more].concat();
    // llama.cpp's threads wait by spinning: on a machine that has other work too, one is faster than several.
    let on_one_thread = |run: &str| {
        let mut command = place.command(&args(run, &again));
        succeeded(&command.env("RAYON_NUM_THREADS", "1").output().unwrap());
    };
    on_one_thread("run");
    let found = summary(&place, "run");
    let gap = (found["gguf"]["forward_kl"].as_f64().unwrap() - kl(&found)).abs() / kl(&found);
    assert!(gap < 0.05, "{gap}");
    assert!(
        metrics(&place, "run")
            .iter()
            .any(|line| line["answer_tokens"].as_f64() > Some(0.0))
    );
    on_one_thread("run-again");
    let adapter = |run: &str| fs::read(place.path(run).join("adapter_model.safetensors")).unwrap();
    assert!(adapter("run") == adapter("run-again"));
    failed(
        1,
        "--through cannot be used with --use-dora",
        &opd(&place, "refused", &[&again[..], &["--use-dora"]].concat()),
    );
}
