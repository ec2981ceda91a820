//! A run that is stopped, killed, or out of disk goes on as if nothing had been; the best checkpoint, early stop, and
//! memory that does not grow.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod workplace;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use workplace::{Workplace, succeeded};

/// Settings under which every part of the state matters: dropout, an order that is shuffled, moments, a schedule,
/// packing, evaluations.
const SETTINGS: [(&str, &str); 15] = [
    ("--learning-rate", "1e-2"),
    ("--max-steps", "300"),
    ("--r", "4"),
    ("--lora-dropout", "0.2"),
    ("--per-device-train-batch-size", "2"),
    ("--gradient-accumulation-steps", "2"),
    ("--packing", "true"),
    ("--max-length", "20"),
    ("--lr-scheduler-type", "cosine"),
    ("--warmup-steps", "5"),
    ("--weight-decay", "0.1"),
    ("--logging-steps", "3"),
    ("--eval-data", "train.jsonl"),
    ("--eval-steps", "50"),
    ("--seed", "7"),
];

/// A run with these settings, where `more` does not say otherwise.
fn args<'a>(run: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["sft", "--model", "model", "--data", "train.jsonl", "-o", run];
    let settings = SETTINGS.iter().filter(|(flag, _)| !more.contains(flag));
    args.extend(settings.flat_map(|(flag, value)| [*flag, *value]));
    args.extend(more);
    args
}

fn start(place: &Workplace, args: &[&str]) -> Child {
    place.command(args).stderr(Stdio::piped()).spawn().unwrap()
}

/// Sends a signal when the program has said a line that begins so; returns what it says then, and its exit code.
fn signal_at(mut child: Child, line: &str, signal: &str) -> (String, Option<i32>) {
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(
        lines.any(|said| said.unwrap().starts_with(line)),
        "it never said {line}"
    );
    kill(&child, signal);
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    (rest.join("\n"), child.wait().unwrap().code())
}

fn kill(child: &Child, signal: &str) {
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args([signal, &id])
            .status()
            .unwrap()
            .success()
    );
}

fn checkpoints(place: &Workplace, run: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(place.path(run))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("checkpoint-"))
        .collect();
    names.sort();
    names
}

/// The adapter's bytes, and the figures of every step without the times.
fn result(place: &Workplace, run: &str) -> (Vec<u8>, Vec<Value>) {
    let weights = fs::read(place.path(run).join("adapter_model.safetensors")).unwrap();
    let metrics = fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        for time in ["tokens_per_second", "seconds"] {
            line.as_object_mut().unwrap().remove(time);
        }
        line
    });
    (weights, lines.collect())
}

#[test]
fn a_run_that_was_interrupted_ends_with_the_bits_of_one_that_was_not() {
    let place = Workplace::new();
    succeeded(&place.run(&args("run-whole", &[])));
    let (said, code) = signal_at(start(&place, &args("run", &[])), "step 9/", "-TERM");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("interrupted after")
            && said.contains("hint: pipit-distill sft --resume-from-checkpoint run"),
        "{said}"
    );
    assert_eq!(checkpoints(&place, "run").len(), 1);
    assert!(!place.path("run/summary.json").exists());
    // Nobody begins another run over it.
    let again = place.run(&args("run", &[]));
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("is a run that was stopped"));

    succeeded(&place.run(&["sft", "--resume-from-checkpoint", "run"]));
    assert!(place.path("run/summary.json").exists());
    let (whole, resumed) = (result(&place, "run-whole"), result(&place, "run"));
    assert_eq!(resumed.1, whole.1, "the figures");
    assert!(resumed.0 == whole.0, "the weights differ");
    let done = place.run(&["sft", "--resume-from-checkpoint", "run"]);
    assert!(String::from_utf8_lossy(&done.stderr).contains("went through"));
}

#[test]
fn full_training_goes_on_too_with_activations_recomputed() {
    goes_on("adamw_torch");
}

#[test]
fn moments_in_eight_bits_are_kept() {
    let place = goes_on("adamw_8bit");
    let saved = fs::read(place.path("run-whole/checkpoint-10/trainer.safetensors")).unwrap();
    assert!(
        String::from_utf8_lossy(&saved).contains(".exp_avg_sq.absmax"),
        "no tensor is large enough"
    );
}

/// Trains all weights, and goes on from a checkpoint in the middle to the same bits.
fn goes_on(optim: &str) -> Workplace {
    let place = Workplace::new();
    let more = [
        "--method",
        "full",
        "--max-steps",
        "12",
        "--save-steps",
        "5",
        "--learning-rate",
        "1e-3",
        "--optim",
        optim,
    ];
    let run = |run: &str, more: &[&str]| {
        let mut all = vec!["sft", "--model", "model", "--data", "train.jsonl", "-o", run];
        all.extend(more);
        succeeded(&place.run(&all));
        fs::read(place.path(run).join("model.safetensors")).unwrap()
    };
    let whole = run("run-whole", &more);
    assert_eq!(
        run(
            "run-recomputed",
            &[&more[..], &["--gradient-checkpointing"]].concat()
        ),
        whole
    );
    // As if the power had failed after step 10.
    fs::remove_file(place.path("run-whole/summary.json")).unwrap();
    fs::remove_file(place.path("run-whole/model.safetensors")).unwrap();
    succeeded(&place.run(&[
        "sft",
        "--resume-from-checkpoint",
        "run-whole/checkpoint-5",
        "--gradient-checkpointing",
    ]));
    assert_eq!(
        fs::read(place.path("run-whole/model.safetensors")).unwrap(),
        whole
    );
    assert_eq!(
        checkpoints(&place, "run-whole"),
        ["checkpoint-10", "checkpoint-5"]
    );
    place
}

#[test]
fn a_run_that_is_killed_while_it_saves_goes_on() {
    let place = Workplace::new();
    let settings = args(
        "run",
        &["--max-steps", "24", "--save-steps", "1", "--eval-steps", "0"],
    );
    let being_saved = |name: &String| name.starts_with('.') && name.ends_with(".part");
    // A later one than the first, so that there is something to go on from.
    let in_a_save = |names: &[String]| names.iter().any(being_saved) && !names.iter().all(being_saved);
    let mut killed_in_a_save = false;
    for _ in 0..100 {
        if place.path("run/summary.json").exists() {
            fs::remove_dir_all(place.path("run")).unwrap();
        }
        let has_one =
            place.path("run").exists() && checkpoints(&place, "run").iter().any(|name| !being_saved(name));
        let resume = ["sft", "--resume-from-checkpoint", "run"];
        let mut child = start(&place, if has_one { &resume } else { &settings });
        while child.try_wait().unwrap().is_none() {
            if place.path("run").exists() && in_a_save(&checkpoints(&place, "run")) {
                child.kill().unwrap();
                break;
            }
        }
        child.wait().unwrap();
        killed_in_a_save = in_a_save(&checkpoints(&place, "run"));
        if killed_in_a_save {
            break;
        }
    }
    assert!(killed_in_a_save, "no kill hit a save");
    succeeded(&place.run(&["sft", "--resume-from-checkpoint", "run"]));
    assert!(
        !checkpoints(&place, "run").iter().any(being_saved),
        "something is left behind"
    );
    let whole = args("run-whole", &["--max-steps", "24", "--eval-steps", "0"]);
    succeeded(&place.run(&whole));
    assert!(result(&place, "run") == result(&place, "run-whole"));
}

#[test]
fn what_cannot_be_gone_on_from_is_refused_by_name() {
    let place = Workplace::new();
    // Stopped by hand: summary.json is what says that a run is whole.
    succeeded(&place.run(&args(
        "run",
        &["--max-steps", "9", "--save-steps", "3", "--save-total-limit", "0"],
    )));
    fs::remove_file(place.path("run/summary.json")).unwrap();
    assert_eq!(
        checkpoints(&place, "run"),
        ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    );
    let refused = |code: i32, texts: &[&str], more: &[&str]| {
        let output = place.run(&[&["sft", "--resume-from-checkpoint"], more].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{error}");
        for text in texts {
            assert!(error.contains(text), "{text:?} is not in: {error}");
        }
    };
    refused(1, &["nowhere: there is no such folder"], &["nowhere"]);
    refused(
        1,
        &["model has no checkpoint", "hint: name the folder of a run"],
        &["model"],
    );
    refused(2, &["--r is 8, but the run began with 4"], &["run", "--r", "8"]);
    refused(2, &["the run goes on in its own folder"], &["run", "-o", "other"]);

    let data = fs::read_to_string(place.path("train.jsonl")).unwrap();
    fs::write(place.path("train.jsonl"), data.replacen("w5", "w6", 1)).unwrap();
    refused(1, &["is of a run on other data"], &["run"]);
    fs::write(place.path("train.jsonl"), &data).unwrap();

    // A file that is cut short, at every place where that can be told from a whole one.
    for file in ["trainer.safetensors", "trainer_state.json"] {
        let path = place.path("run/checkpoint-9").join(file);
        let whole = fs::read(&path).unwrap();
        for length in [0, 5, whole.len() / 2, whole.len() - 3] {
            fs::write(&path, &whole[..length]).unwrap();
            let hint = "hint: --resume-from-checkpoint run/checkpoint-6";
            refused(
                1,
                &["run/checkpoint-9 cannot be gone on from", file, hint],
                &["run"],
            );
        }
        fs::write(&path, &whole).unwrap();
    }
    // Tensors of an adapter on other layers, with the run's settings changed by hand to hide it.
    let config = place.path("run/config.resolved.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"all-linear\"", "[\"q_proj\"]")).unwrap();
    refused(1, &["is of another run: it trains model.layers."], &["run"]);
    fs::write(&config, &text).unwrap();

    // A change that is allowed is said.
    let output = place.run(&[
        "sft",
        "--resume-from-checkpoint",
        "run/checkpoint-6",
        "--learning-rate",
        "1e-3",
    ]);
    succeeded(&output);
    assert!(String::from_utf8_lossy(&output.stderr).contains("--learning-rate is 0.001 now, 0.01 before"));
}

#[test]
fn a_disk_that_fills_leaves_the_last_good_checkpoint() {
    let place = Workplace::new();
    let (said, _) = signal_at(start(&place, &args("run", &[])), "step 3/", "-TERM");
    let last = checkpoints(&place, "run");
    assert_eq!(last.len(), 1, "{said}");
    // No file may become longer than 16 KiB (sh) or 32 KiB (bash): the system then says EFBIG as it says ENOSPC when a
    // disk is full.
    let program = env!("CARGO_BIN_EXE_pipit-distill");
    // A checkpoint is the first file that is too long: the report would be one too.
    let settings = "--save-steps 1 --logging-steps 1000 --eval-steps 0";
    let script =
        format!("trap '' XFSZ; ulimit -f 32; exec {program} sft --resume-from-checkpoint run {settings}");
    let output = Command::new("sh")
        .args(["-c", &script])
        .current_dir(place.dir.path())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("cannot save run/checkpoint-") && error.contains("File too large"),
        "{error}"
    );
    assert!(error.contains(&format!("run/{} is whole", last[0])), "{error}");
    assert_eq!(
        checkpoints(&place, "run"),
        last,
        "the good one stays, and nothing else"
    );
    succeeded(&place.run(&["sft", "--resume-from-checkpoint", "run"]));
}

#[test]
fn an_interrupt_before_the_first_step_leaves_nothing() {
    let place = Workplace::new();
    // Rows that come through a pipe: the signal is there before the last of them.
    let pipe = place.path("rows");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let child = start(
        &place,
        &[
            "sft",
            "--model",
            "model",
            "--data",
            "rows",
            "-o",
            "run",
            "--max-steps",
            "9",
        ],
    );
    let mut rows = fs::File::options().write(true).open(&pipe).unwrap();
    kill(&child, "-TERM");
    std::io::copy(&mut fs::File::open(place.path("train.jsonl")).unwrap(), &mut rows).unwrap();
    drop(rows);
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("interrupted after 0 steps"), "{error}");
    assert!(!place.path("run").exists());
}

/// dev.jsonl: other answers to the same questions. Whoever learns the rows by heart gets worse on these.
fn write_other_answers(place: &Workplace) {
    let rows: Vec<Value> = fs::read_to_string(place.path("train.jsonl"))
        .unwrap()
        .lines()
        .map(|line| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            row["messages"][1]["content"] = json!("w200 w201");
            row
        })
        .collect();
    place.write("dev.jsonl", &rows);
}

#[test]
fn the_run_ends_with_the_best_evaluation_and_stops_when_it_gets_no_better() {
    let place = Workplace::new();
    write_other_answers(&place);
    let more = [
        "--max-steps",
        "400",
        "--eval-data",
        "dev.jsonl",
        "--eval-steps",
        "4",
        "--early-stopping-patience",
        "3",
        "--load-best-model-at-end",
        "--save-strategy",
        "no",
        "--lr-scheduler-type",
        "constant",
        "--json",
    ];
    let summary: Value = serde_json::from_str(&succeeded(&place.sft("run", &more))).unwrap();
    assert_eq!(summary["stopped_early"], true);
    let (steps, best) = (
        summary["steps"].as_u64().unwrap(),
        summary["best_step"].as_u64().unwrap(),
    );
    assert_eq!(steps, best + 12, "{summary}");
    assert!(checkpoints(&place, "run").contains(&format!("checkpoint-{best}")));
    let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let smallest = lines
        .iter()
        .filter_map(|line| line["eval_loss"].as_f64())
        .fold(f64::INFINITY, f64::min);
    assert_eq!(summary["eval_loss"].as_f64(), Some(smallest));
    // The adapter is that of the best step.
    let eval = [
        "eval",
        "--model",
        "model",
        "--adapter",
        "run",
        "--data",
        "dev.jsonl",
        "--no-generate",
        "--json",
    ];
    let eval: Value = serde_json::from_str(&succeeded(&place.run(&eval))).unwrap();
    assert!((eval["loss"].as_f64().unwrap() - smallest).abs() < 1e-5, "{eval}");

    let usage = place.sft("run-2", &["--early-stopping-patience", "3"]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("needs evaluations while training"));
}

#[test]
fn old_checkpoints_go_and_the_best_stays() {
    let place = Workplace::new();
    let more = ["--max-steps", "30", "--save-steps", "5", "--logging-steps", "1"];
    succeeded(&place.run(&args("run", &more)));
    assert_eq!(checkpoints(&place, "run"), ["checkpoint-25", "checkpoint-30"]);
    write_other_answers(&place);
    let more = [
        "--max-steps",
        "60",
        "--eval-data",
        "dev.jsonl",
        "--eval-steps",
        "1",
        "--save-steps",
        "2",
        "--save-total-limit",
        "1",
        "--load-best-model-at-end",
        "--json",
    ];
    let summary: Value = serde_json::from_str(&succeeded(&place.sft("run-2", &more))).unwrap();
    let best = format!("checkpoint-{}", summary["best_step"]);
    assert_ne!(
        best, "checkpoint-60",
        "the rows were not learnt by heart: {summary}"
    );
    let mut expected = vec!["checkpoint-60".to_owned(), best];
    expected.sort();
    assert_eq!(checkpoints(&place, "run-2"), expected);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let place = Workplace::new();
    let run = |threads: &str| -> Vec<u8> {
        let name = format!("run-{threads}");
        let settings = args(
            &name,
            &[
                "--max-steps",
                "8",
                "--packing",
                "false",
                "--per-device-train-batch-size",
                "8",
            ],
        );
        let output = place
            .command(&settings)
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap();
        succeeded(&output);
        fs::read(place.path(&name).join("adapter_model.safetensors")).unwrap()
    };
    let one = run("1");
    for threads in ["2", "3", "7"] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

/// Resident memory of a process in KiB.
fn resident(child: &Child) -> u64 {
    let status = fs::read_to_string(PathBuf::from(format!("/proc/{}/status", child.id()))).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn memory_does_not_grow_from_step_10_to_step_200() {
    let place = Workplace::new();
    for method in ["lora", "full"] {
        let settings = [
            "sft",
            "--model",
            "model",
            "--data",
            "train.jsonl",
            "-o",
            method,
            "--method",
            method,
            "--max-steps",
            "1000000",
            "--logging-steps",
            "1",
        ];
        let mut child = start(&place, &settings);
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut at = |step: &str| {
            assert!(lines.any(|line| line.unwrap().starts_with(step)), "{step}");
            resident(&child)
        };
        let (early, late) = (at("step 10/"), at("step 200/"));
        kill(&child, "-KILL");
        let _ = child.wait().unwrap();
        // One step's gradients of all 90,000 weights are 350 KiB: were they kept, it would be 65 MiB more.
        assert!(
            late < early + 8 * 1024,
            "{method}: {early} KiB at step 10, {late} KiB at step 200"
        );
    }
}
