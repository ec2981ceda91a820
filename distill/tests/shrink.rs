//! `shrink` against torch and transformers: what is measured, what goes, and what the smaller model says.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;
mod workplace;

use std::fs;

use pipit_convert::checkpoint::{Checkpoint, Dtype};
use pipit_distill::batch::Batch;
use pipit_distill::data::Sample;
use pipit_distill::model::{Config, Keep, Mode, Model};
use pipit_distill::shrink::{Measured, ShrinkError, Sizes, keep, measure, write};
use serde::Deserialize;
use serde_json::{Value, json};
use support::{difference, fixture, floats};
use workplace::{Workplace, failed, succeeded};

#[derive(Deserialize)]
struct Expected {
    texts: Vec<Vec<u32>>,
    models: std::collections::BTreeMap<String, ExpectedModel>,
}

#[derive(Deserialize)]
struct ExpectedModel {
    layers: Vec<usize>,
    num_key_value_heads: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    influence: Vec<f64>,
    heads: Vec<Vec<f64>>,
    channels: Vec<Vec<f64>>,
    /// After the last token of the last text.
    logits: Vec<f32>,
}

fn torch() -> Expected {
    serde_json::from_slice(&fs::read(fixture("shrink.json")).unwrap()).unwrap()
}

fn measured(name: &str, texts: &[Vec<u32>]) -> Measured {
    let mut model = Model::open(&fixture(name), false).unwrap();
    let sample = |ids: &Vec<u32>| Sample {
        line: 1,
        ids: ids.clone(),
        labels: ids.iter().map(|id| i64::from(*id)).collect(),
    };
    let samples: Vec<Sample> = texts.iter().map(sample).collect();
    measure(&mut model, &samples, |_| Ok::<_, candle_core::Error>(())).unwrap()
}

fn single(numbers: &[f64]) -> Vec<f32> {
    numbers.iter().map(|x| *x as f32).collect()
}

#[test]
fn influence_and_sizes_are_torchs() {
    let torch = torch();
    assert_eq!(torch.models.len(), 5);
    for (name, expected) in &torch.models {
        let ours = measured(name, &torch.texts);
        assert_eq!((ours.tokens, ours.labels), (22, 19));
        let apart = difference(&single(&ours.influence), &single(&expected.influence));
        assert!(apart < 1e-4, "{name}: influence {apart}");
        for (ours, theirs) in [
            (&ours.heads, &expected.heads),
            (&ours.channels, &expected.channels),
        ] {
            assert_eq!(ours.len(), theirs.len());
            for (ours, theirs) in ours.iter().zip(theirs) {
                let apart = difference(&single(ours), &single(theirs));
                assert!(apart < 1e-5, "{name}: sizes {apart}");
            }
        }
    }
}

#[test]
fn the_smaller_model_says_what_torch_says_without_what_goes() {
    let torch = torch();
    for (name, expected) in &torch.models {
        let measured = measured(name, &torch.texts);
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let config = Config::read(&checkpoint).unwrap();
        let sizes = Sizes {
            intermediate_size: Some(expected.intermediate_size),
            num_attention_heads: Some(expected.num_attention_heads),
            num_key_value_heads: Some(expected.num_key_value_heads),
        };
        let kept = keep(&config, &expected.layers, sizes, Some(&measured)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        write(&checkpoint, &kept, dir.path()).unwrap();

        let student = Model::open_as(dir.path(), Keep::Frozen).unwrap();
        let config = student.config();
        assert_eq!(
            (
                config.num_hidden_layers,
                config.intermediate_size,
                config.num_attention_heads
            ),
            (
                expected.layers.len(),
                expected.intermediate_size,
                expected.num_attention_heads
            ),
        );
        let batch = Batch::unlabelled([torch.texts[2].as_slice()]);
        let hidden = student.hidden(&batch, Mode::INFERENCE).unwrap();
        let logits = floats(&student.logits(&hidden).unwrap());
        let last = &logits[logits.len() - config.vocab_size..];
        let apart = difference(last, &expected.logits);
        assert!(apart < 1e-5, "{name}: the logits differ by {apart}");
    }
}

#[test]
fn without_sizes_the_numbers_keep_their_bits_and_their_type() {
    let place = Workplace::new();
    // The same numbers in f16, as a checkpoint has them that is not ours.
    let dir = place.path("half");
    fs::create_dir(&dir).unwrap();
    let whole = fixture("tiny-gemma3");
    fs::copy(whole.join("config.json"), dir.join("config.json")).unwrap();
    let tensors =
        candle_core::safetensors::load(whole.join("model.safetensors"), &candle_core::Device::Cpu).unwrap();
    let half: std::collections::HashMap<_, _> = tensors
        .into_iter()
        .map(|(name, tensor)| (name, tensor.to_dtype(candle_core::DType::F16).unwrap()))
        .collect();
    candle_core::safetensors::save(&half, dir.join("model.safetensors")).unwrap();
    succeeded(&place.run(&[
        "shrink",
        "--model",
        "half",
        "--keep-layers",
        "1,2",
        "-o",
        "student",
        "-q",
    ]));
    let (before, after) = (
        Checkpoint::open(&dir).unwrap(),
        Checkpoint::open(&place.path("student")).unwrap(),
    );
    let mut seen = 0;
    for name in after.names() {
        let old = match name.strip_prefix("model.layers.") {
            Some(rest) => {
                let (layer, module) = rest.split_once('.').unwrap();
                format!("model.layers.{}.{module}", layer.parse::<usize>().unwrap() + 1)
            }
            None => name.to_owned(),
        };
        let (old, new) = (before.tensor(&old).unwrap(), after.tensor(name).unwrap());
        assert_eq!((new.dtype, new.bytes), (Dtype::F16, old.bytes), "{name}");
        seen += 1;
    }
    assert_eq!(seen, 2 + 2 * 13);
    // What sees a window goes with its block.
    let config = after.config();
    assert_eq!(
        config["layer_types"],
        json!(["sliding_attention", "full_attention"])
    );
}

#[test]
fn the_program_chooses_blocks_says_so_and_its_result_trains() {
    let place = Workplace::new();
    let shrink = [
        "shrink",
        "--model",
        "model",
        "--data",
        "train.jsonl",
        "--layers",
        "1",
        "-o",
        "student",
        "--json",
    ];
    let done: Value = serde_json::from_str(&succeeded(&place.run(&shrink))).unwrap();
    let influence: Vec<f64> = serde_json::from_value(done["measured"]["influence"].clone()).unwrap();
    let best = usize::from(influence[1] > influence[0]);
    assert_eq!(done["layers"], json!([best]));
    assert!(done["parameters"].as_u64().unwrap() < done["parameters_before"].as_u64().unwrap());
    let stored: Value =
        serde_json::from_slice(&fs::read(place.path("student/shrink.json")).unwrap()).unwrap();
    assert_eq!(stored, done);
    let eval = [
        "eval",
        "--model",
        "student",
        "--data",
        "train.jsonl",
        "--no-generate",
        "--json",
    ];
    let eval: Value = serde_json::from_str(&succeeded(&place.run(&eval))).unwrap();
    let (loss, said) = (
        eval["loss"].as_f64().unwrap(),
        done["measured"]["loss"].as_f64().unwrap(),
    );
    assert!((loss - said).abs() < 1e-5, "{loss} {said}");
    let sft = [
        "sft",
        "--model",
        "student",
        "--data",
        "train.jsonl",
        "-o",
        "run",
        "--method",
        "full",
        "--max-steps",
        "2",
    ];
    succeeded(&place.run(&sft));

    failed(1, "exists already", &place.run(&shrink));
    for (code, text, more) in [
        (2, "nothing is to go", &[][..]),
        (1, "there is no block 2", &["--keep-layers", "0,2"]),
        (1, "3 of them", &["--layers", "3", "--data", "train.jsonl"]),
        (
            1,
            "num_attention_heads 3",
            &["--num-attention-heads", "3", "--data", "train.jsonl"],
        ),
        (
            1,
            "it can be 1 to 96",
            &["--intermediate-size", "97", "--data", "train.jsonl"],
        ),
    ] {
        let output = place.run(&[&["shrink", "--model", "model", "-o", "run-2"], more].concat());
        place_is_clean(&place, code, text, &output);
    }
}

fn place_is_clean(place: &Workplace, code: i32, text: &str, output: &std::process::Output) {
    failed(code, text, output);
    assert!(!place.path("run-2").exists());
}

#[test]
fn sizes_without_a_measurement_are_refused() {
    let checkpoint = Checkpoint::open(&fixture("tiny-tied")).unwrap();
    let config = Config::read(&checkpoint).unwrap();
    let sizes = Sizes {
        intermediate_size: Some(9),
        ..Sizes::default()
    };
    let refused = keep(&config, &[0], sizes, None).unwrap_err();
    assert!(matches!(refused, ShrinkError::Unmeasured), "{refused}");
}
