//! `generate`: answers of a checkpoint, of a GGUF file and of a server become rows that sft takes, and nothing is lost.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fake_server;
mod workplace;

use std::fs;

use fake_server::start;
use serde_json::{Value, json};
use workplace::{Workplace, failed, succeeded};

fn lines(place: &Workplace, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(place.path(name)).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// A teacher that knows the answers to `train.jsonl`, and the prompts of that file without them.
fn taught() -> Workplace {
    let place = Workplace::new();
    let more = [
        "--method",
        "full",
        "--max-steps",
        "150",
        "--per-device-train-batch-size",
        "4",
    ];
    succeeded(&place.sft("teacher", &more));
    let prompts: Vec<Value> = lines(&place, "train.jsonl")
        .into_iter()
        .map(|mut row| {
            row["messages"].as_array_mut().unwrap().pop();
            row
        })
        .collect();
    place.write("prompts.jsonl", &prompts);
    place
}

#[test]
fn a_checkpoint_answers_and_a_student_learns_from_it() {
    let place = taught();
    let generate = [
        "generate",
        "--teacher",
        "teacher",
        "--prompts",
        "prompts.jsonl",
        "--max-new-tokens",
        "8",
        "--json",
    ];
    let said: Value = serde_json::from_str(&succeeded(
        &place.run(&[&generate[..], &["-o", "answers.jsonl"]].concat()),
    ))
    .unwrap();
    assert_eq!((&said["answers"], &said["rejected"]), (&json!(8), &json!(0)));
    let (answers, right) = (lines(&place, "answers.jsonl"), lines(&place, "train.jsonl"));
    for (i, (answer, right)) in answers.iter().zip(&right).enumerate() {
        assert_eq!(answer["messages"], right["messages"]);
        assert_eq!(answer["language"], right["language"]);
        let from = json!({"teacher": "teacher", "line": i + 1, "generation": 0, "finish_reason": "stop"});
        assert_eq!(answer["generated"], from);
    }
    // A row has its answer already: it is replaced.
    let again = [
        "generate",
        "--teacher",
        "teacher",
        "--prompts",
        "train.jsonl",
        "--max-new-tokens",
        "8",
        "-o",
        "again.jsonl",
    ];
    succeeded(&place.run(&again));
    assert_eq!(lines(&place, "again.jsonl"), answers);
    let sft = [
        "sft",
        "--model",
        "model",
        "--data",
        "answers.jsonl",
        "-o",
        "run",
        "--max-steps",
        "2",
        "-q",
    ];
    succeeded(&place.run(&sft));
    failed(
        1,
        "exists already",
        &place.run(&[&generate[..], &["-o", "answers.jsonl"]].concat()),
    );
}

#[test]
fn what_gives_no_row_is_written_down_with_the_reason() {
    let place = taught();
    let mut rows = lines(&place, "prompts.jsonl");
    rows.truncate(2);
    rows.push(json!({"text": "w5 w6"}));
    rows.push(json!({"prompt": "w7 ".repeat(200)}));
    place.write("mixed.jsonl", &rows);
    let generate = [
        "generate",
        "--teacher",
        "teacher",
        "--prompts",
        "mixed.jsonl",
        "--max-new-tokens",
        "1",
        "-q",
    ];
    let cut = [&generate[..], &["-o", "cut.jsonl", "--json"]].concat();
    let said: Value = serde_json::from_str(&succeeded(&place.run(&cut))).unwrap();
    assert_eq!((&said["answers"], &said["rejected"]), (&json!(0), &json!(4)));
    let rejected = lines(&place, "cut.rejected.jsonl");
    let why = |line: usize| rejected[line - 1]["why"].as_str().unwrap().to_owned();
    assert_eq!(
        rejected
            .iter()
            .map(|row| row["line"].as_u64().unwrap())
            .collect::<Vec<_>>(),
        [1, 2, 3, 4]
    );
    assert!(why(1).contains("cut") && rejected[0]["answer"].is_string());
    assert!(
        why(3).contains("no prompt") && why(4).contains("200 tokens"),
        "{rejected:?}"
    );
    succeeded(&place.run(&[&generate[..], &["-o", "kept.jsonl", "--keep-cut"]].concat()));
    let kept = lines(&place, "kept.jsonl");
    assert_eq!(kept.len(), 2);
    assert_eq!(kept[0]["generated"]["finish_reason"], "length");
}

#[test]
fn drawn_answers_follow_from_the_seed_however_often_the_run_is_stopped() {
    let place = taught();
    let generate = |output: &str, more: &[&str]| {
        let args = [
            "generate",
            "--teacher",
            "model",
            "--prompts",
            "prompts.jsonl",
            "--max-new-tokens",
            "6",
            "--temperature",
            "1.5",
            "--num-generations",
            "3",
            "--keep-cut",
            "-q",
            "-o",
            output,
        ];
        place.run(&[&args[..], more].concat())
    };
    succeeded(&generate("whole.jsonl", &[]));
    let whole = lines(&place, "whole.jsonl");
    assert_eq!(whole.len(), 24);
    let differ = whole
        .chunks(3)
        .filter(|three| three[0]["messages"] != three[1]["messages"])
        .count();
    assert!(differ > 4, "{differ}");
    // What a run leaves that was killed after two prompts, in the middle of a line.
    let settings = json!({"teacher": "model", "adapter": null, "model": null,
        "prompts_sha256": pipit_convert::checksum::sha256(&place.path("prompts.jsonl")).unwrap(), "max_rows": null,
        "temperature": 1.5, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6, "num_generations": 3, "seed": 42,
        "keep_cut": true});
    let mut partial = format!("{settings}\n");
    for row in &whole[..6] {
        let place = &row["generated"];
        let line = json!({"line": place["line"], "generation": place["generation"], "outcome": {"row": row}});
        partial += &format!("{line}\n");
    }
    fs::write(
        place.path("killed.jsonl.partial"),
        partial + "{\"line\":3,\"gener",
    )
    .unwrap();
    failed(
        1,
        "`seed` is 42 there and 7 here",
        &generate("killed.jsonl", &["--seed", "7"]),
    );
    succeeded(&generate("killed.jsonl", &[]));
    assert_eq!(lines(&place, "killed.jsonl"), whole);
    assert!(!place.path("killed.jsonl.partial").exists());
    succeeded(&generate("other.jsonl", &["--seed", "7"]));
    assert_ne!(lines(&place, "other.jsonl"), whole);
}

#[test]
fn a_server_answers_in_its_own_template() {
    let (url, seen) = start(|request| match request.line.as_str() {
        "GET /v1/models" => (
            200,
            "",
            json!({"data": [{"id": "big", "owned_by": "someone"}]}).to_string(),
        ),
        _ => {
            let text = format!(
                "answer to {}",
                request.body["messages"][0]["content"].as_str().unwrap()
            );
            let choice = json!({"message": {"content": text}, "finish_reason": "stop"});
            (200, "", json!({"choices": [choice]}).to_string())
        }
    });
    let place = Workplace::new();
    let generate = [
        "generate",
        "--teacher",
        &url,
        "--prompts",
        "train.jsonl",
        "--max-rows",
        "3",
        "-o",
        "answers.jsonl",
        "-q",
    ];
    succeeded(&place.run(&generate));
    for (answer, row) in lines(&place, "answers.jsonl")
        .iter()
        .zip(lines(&place, "train.jsonl"))
    {
        let asked = row["messages"][0]["content"].as_str().unwrap();
        assert_eq!(answer["messages"][1]["content"], format!("answer to {asked}"));
    }
    // The expected answers are not sent.
    let requests = seen.requests.lock().unwrap();
    let chats: Vec<_> = requests
        .iter()
        .filter(|request| request.line.contains("chat"))
        .collect();
    assert!(
        chats.len() == 3
            && chats
                .iter()
                .all(|request| request.body["messages"].as_array().unwrap().len() == 1)
    );
    drop(requests);
    let refused = [
        "generate",
        "--teacher",
        &url,
        "--teacher-adapter",
        "x",
        "--prompts",
        "train.jsonl",
        "-o",
        "b.jsonl",
    ];
    failed(1, "on a checkpoint only", &place.run(&refused));
    assert!(!place.path("b.jsonl.partial").exists());
}

#[test]
fn a_teacher_that_is_not_there_is_named() {
    let place = Workplace::new();
    for (teacher, text) in [
        (
            "nowhere.gguf",
            "nowhere.gguf: llama.cpp does not load the file: No such file",
        ),
        ("nowhere", "nowhere is no checkpoint: it does not exist"),
    ] {
        let generate = ["generate", "--teacher", teacher, "--prompts", "train.jsonl"];
        let more = ["-o", "answers.jsonl"];
        failed(1, text, &place.run(&[generate.as_slice(), &more].concat()));
    }
}
