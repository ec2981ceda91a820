//! One step of the trainer on the tiny models: recomputed activations, accumulation, and sequences that do not see
//! each other.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use pipit_distill::adapter::{Adapter, InitLoraWeights, LoraOptions, lora};
use pipit_distill::batch::{Batch, IGNORED};
use pipit_distill::model::{Mode, Model};
use pipit_distill::optimizer::{AdamWOptions, Optim};
use pipit_distill::random::{Random, mix};
use pipit_distill::trainer::{Learner, LearnerOptions};
use support::{fixture, rank_four};

const OPTIONS: LearnerOptions = LearnerOptions {
    optim: Optim::AdamwTorch,
    adamw: AdamWOptions {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
    },
    max_grad_norm: 1.0,
    gradient_checkpointing: false,
};

fn open(name: &str, train: bool) -> Model {
    Model::open(&fixture(name), train).unwrap()
}

/// With adapters, whose B is not zero, on some layers.
fn adapted(name: &str, target_modules: &str, dropout: f64) -> Model {
    let mut model = open(name, false);
    let options = LoraOptions {
        lora_dropout: dropout,
        use_dora: dropout > 0.0,
        ..rank_four(target_modules, InitLoraWeights::False)
    };
    lora::add(&mut model, &options, name, &mut Random::new(3, "adapter")).unwrap();
    model
}

/// Sequences of 2 to 12 tokens whose second half is trained on.
fn sequences(count: u64) -> Vec<(Vec<u32>, Vec<i64>)> {
    (0..count)
        .map(|i| {
            let length = 2 + mix(i) % 11;
            let ids: Vec<u32> = (0..length).map(|k| (mix(i * 100 + k) % 256) as u32).collect();
            let label = |(k, id): (usize, &u32)| {
                if k as u64 >= length / 2 {
                    i64::from(*id)
                } else {
                    IGNORED
                }
            };
            let labels = ids.iter().enumerate().map(label).collect();
            (ids, labels)
        })
        .collect()
}

fn batch(sequences: &[(Vec<u32>, Vec<i64>)]) -> Batch {
    Batch::new(
        sequences
            .iter()
            .map(|(ids, labels)| (ids.as_slice(), labels.as_slice())),
    )
}

/// The loss and every gradient of a step whose forward passes are these.
fn step(model: &Model, passes: &[&[(Vec<u32>, Vec<i64>)]], recompute: bool) -> (f64, Vec<Vec<f32>>) {
    let options = LearnerOptions {
        gradient_checkpointing: recompute,
        ..OPTIONS
    };
    let mut learner = Learner::new(model, options);
    let (mut loss, mut tokens) = (0.0, 0);
    for pass in passes {
        let batch = batch(pass);
        let mode = Mode {
            gradient: true,
            dropout_seed: Some(11),
            ..Mode::INFERENCE
        };
        loss += learner
            .accumulate(&batch, mode, |hidden| {
                model.loss_of_hidden(hidden, &batch, mode, 7)
            })
            .unwrap();
        tokens += batch.trained_tokens();
    }
    let gradients = learner.gradients(tokens).unwrap();
    let values = gradients
        .tensors()
        .iter()
        .map(|gradient| gradient.flatten_all().unwrap().to_vec1().unwrap());
    (loss, values.collect())
}

/// Every adapter of PEFT that is a fixture, on its base.
fn stored_adapters() -> Vec<(String, Model)> {
    let dir = fixture("adapters");
    let folders = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut models = Vec::new();
    for folder in folders.filter(|path| path.is_dir()) {
        let config = std::fs::read(folder.join("adapter_config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let mut model = open(config["base_model_name_or_path"].as_str().unwrap(), false);
        Adapter::load(&mut model, &folder).unwrap();
        models.push((folder.file_name().unwrap().to_str().unwrap().to_owned(), model));
    }
    assert!(models.len() >= 16, "{} adapters", models.len());
    models
}

#[test]
fn recomputed_activations_give_the_same_bits() {
    let sequences = sequences(6);
    let (first, second) = sequences.split_at(2);
    let mut models = stored_adapters();
    let more = [
        ("all weights, tied", open("tiny-tied", true)),
        ("all weights, untied", open("tiny-untied", true)),
        (
            "all weights, windows, an embedding that is scaled",
            open("tiny-gemma3", true),
        ),
        ("adapters", adapted("tiny-tied", "all-linear", 0.0)),
        ("DoRA with dropout", adapted("tiny-untied", "all-linear", 0.3)),
        // Nothing is trained below the second block: no gradient is computed there.
        (
            "adapters on the second block",
            adapted("tiny-tied", r".*layers\.1\..*", 0.3),
        ),
    ];
    models.extend(more.map(|(what, model)| (what.to_owned(), model)));
    for (what, model) in models {
        let (loss, gradients) = step(&model, &[first, second], false);
        let (other_loss, others) = step(&model, &[first, second], true);
        assert_eq!(loss.to_bits(), other_loss.to_bits(), "{what}");
        for ((name, _), (gradient, other)) in model.trained().iter().zip(gradients.iter().zip(&others)) {
            assert!(
                gradient.iter().any(|x| *x != 0.0),
                "{what}: {name} has a gradient of zero"
            );
            assert!(gradient == other, "{what}: the gradient of {name} differs");
        }
    }
}

/// Three steps without clipping: losses, norms, and the weights they lead to.
fn steps(model: &Model, recompute: bool, at_once: bool) -> (Vec<[u64; 2]>, Vec<Vec<f32>>) {
    let options = LearnerOptions {
        gradient_checkpointing: recompute,
        max_grad_norm: 0.0,
        ..OPTIONS
    };
    let mut learner = Learner::new(model, options);
    assert!(learner.moves_at_once(1) && !learner.moves_at_once(2));
    let batch = batch(&sequences(5));
    let mode = Mode {
        gradient: true,
        dropout_seed: Some(11),
        ..Mode::INFERENCE
    };
    let count = batch.trained_tokens();
    let figures = (0..3).map(|_| {
        let loss_of = |hidden: &_| model.loss_of_hidden(hidden, &batch, mode, 7);
        let (loss, norm) = if at_once {
            let stepped = learner.step(&batch, mode, count, 1e-2, loss_of).unwrap();
            (stepped.loss, stepped.norm)
        } else {
            let loss = learner.accumulate(&batch, mode, loss_of).unwrap();
            let gradients = learner.gradients(count).unwrap();
            learner.update(&gradients, 1e-2).unwrap();
            (loss, gradients.norm)
        };
        [loss.to_bits(), norm.to_bits()]
    });
    let figures = figures.collect();
    let weights = model.trained().into_iter().map(|(_, var)| {
        let values = var.as_detached_tensor().flatten_all().unwrap();
        values.to_vec1().unwrap()
    });
    (figures, weights.collect())
}

#[test]
fn weights_that_move_at_once_move_by_the_same_bits() {
    let adapters = |names: &[&str]| {
        let mut kept = stored_adapters();
        kept.retain(|(name, _)| names.contains(&name.as_str()));
        kept
    };
    let models = || {
        let mut models = adapters(&[
            "modules-to-save",
            "prefix-projection",
            "prompt",
            "embeddings-dora",
        ]);
        for name in ["tiny-tied", "tiny-untied", "tiny-gemma3", "tiny-qwen2"] {
            models.push((name.to_owned(), open(name, true)));
        }
        models.push((
            "DoRA with dropout".into(),
            adapted("tiny-untied", "all-linear", 0.3),
        ));
        models
    };
    let plain: Vec<_> = models()
        .iter()
        .map(|(_, model)| steps(model, false, false))
        .collect();
    for recompute in [false, true] {
        for ((name, model), plain) in models().iter().zip(&plain) {
            let ours = steps(model, recompute, true);
            assert_eq!(ours.0, plain.0, "{name}");
            assert!(ours.1 == plain.1, "{name}: the weights differ");
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_moves_nothing() {
    let model = open("tiny-tied", true);
    let options = LearnerOptions {
        max_grad_norm: 0.0,
        ..OPTIONS
    };
    let batch = batch(&sequences(2));
    let mode = Mode {
        gradient: true,
        ..Mode::INFERENCE
    };
    let mut learner = Learner::new(&model, options);
    let loss_of = |hidden: &_| model.loss_of_hidden(hidden, &batch, mode, 7)? * f64::NAN;
    let stepped = learner.step(&batch, mode, 3, 1e-2, loss_of).unwrap();
    assert!(stepped.loss.is_nan() && stepped.norm.is_nan());
    assert_eq!(learner.not_finite().unwrap(), None);
}

#[test]
fn accumulation_equals_the_large_batch_however_it_is_cut() {
    let all = sequences(8);
    for model in [open("tiny-tied", true), adapted("tiny-untied", "all-linear", 0.0)] {
        let (loss, gradients) = step(&model, &[&all], false);
        for passes in [
            all.chunks(2).collect::<Vec<_>>(),
            all.chunks(1).collect(),
            vec![&all[..3], &all[3..4], &all[4..]],
        ] {
            let (other_loss, others) = step(&model, &passes, false);
            assert!((loss - other_loss).abs() < 1e-6 * loss, "{loss} and {other_loss}");
            for ((name, _), (gradient, other)) in model.trained().iter().zip(gradients.iter().zip(&others)) {
                let largest = gradient.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                let worst = gradient
                    .iter()
                    .zip(other)
                    .fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
                assert!(
                    worst < 1e-6 * largest,
                    "{name} in {} passes: {worst} of {largest}",
                    passes.len()
                );
            }
        }
    }
}

#[test]
fn no_sequence_of_a_batch_sees_another() {
    let model = adapted("tiny-tied", "all-linear", 0.0);
    let original = sequences(5);
    // The third sequence has no labels, so that the loss and the gradients are those of the others.
    let with_third = |ids: &dyn Fn(usize) -> u32| {
        let mut changed = original.clone();
        let length = changed[2].0.len();
        changed[2] = ((0..length).map(ids).collect(), vec![IGNORED; length]);
        changed
    };
    let (one, other) = (with_third(&|_| 9), with_third(&|i| 200 + i as u32));
    let (loss, gradients) = step(&model, &[&one], false);
    let (other_loss, others) = step(&model, &[&other], false);
    assert_eq!(loss.to_bits(), other_loss.to_bits());
    assert!(gradients == others, "the gradients differ");

    let hidden = |rows: &[(Vec<u32>, Vec<i64>)]| -> Vec<Vec<f32>> {
        model
            .hidden(&batch(rows), Mode::INFERENCE)
            .unwrap()
            .to_vec2()
            .unwrap()
    };
    let (a, b) = (hidden(&one), hidden(&other));
    let start: usize = one[..2].iter().map(|(ids, _)| ids.len()).sum();
    let third = start..start + one[2].0.len();
    for (row, (a, b)) in a.iter().zip(&b).enumerate() {
        assert_eq!(a == b, !third.contains(&row), "row {row}");
    }
}
