//! Checkpoints as teachers, and the loss against them over whole models.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use candle_core::Tensor;
use pipit_distill::adapter::{Adapter, InitLoraWeights, lora};
use pipit_distill::device::Place;
use pipit_distill::loss::{Loss, Measures, Objective};
use pipit_distill::model::{Keep, Mode, Model};
use pipit_distill::optimizer::{AdamWOptions, Optim};
use pipit_distill::random::{Random, mix};
use pipit_distill::teacher::{Asked, BaseTeacher, CheckpointTeacher, Scores, Teacher, TeacherError};
use pipit_distill::trainer::{Learner, LearnerOptions};
use support::{batch, fixture, floats, largest_difference, logits as over_logits, rank_four};

const TRAIN: Mode = Mode {
    gradient: true,
    ..Mode::INFERENCE
};
const JSD: Loss = Loss::Jsd {
    beta: 0.5,
    rescaled: false,
};

fn objective(loss: Loss) -> Objective {
    Objective {
        chunk: 7,
        ..over_logits::objective(loss)
    }
}

/// Sequences of 2 to 12 tokens whose second half is asked about, the first of them not at all.
fn sequences() -> Vec<(Vec<u32>, Vec<i64>)> {
    (0..8)
        .map(|i| {
            let length = 2 + mix(i) % 11;
            let ids: Vec<u32> = (0..length).map(|k| (mix(i * 100 + k) % 256) as u32).collect();
            let labels = ids.iter().enumerate().map(|(k, id)| {
                let asked = i > 0 && k as u64 >= length / 2;
                if asked { i64::from(*id) } else { -100 }
            });
            (ids.clone(), labels.collect())
        })
        .collect()
}

type Sequences = [(Vec<u32>, Vec<i64>)];

fn scores(teacher: &mut dyn Teacher, sequences: &Sequences) -> Scores {
    let asked: Vec<Asked<'_>> = sequences
        .iter()
        .map(|(ids, labels)| Asked {
            ids,
            labels,
            route: None,
        })
        .collect();
    teacher.score(&asked).unwrap()
}

/// All logits that a teacher tells.
fn logits(teacher: &mut dyn Teacher, sequences: &Sequences) -> Vec<f32> {
    let Scores::Full(rows) = scores(teacher, sequences) else {
        panic!("not all logits")
    };
    assert_eq!(
        (rows.rows(), rows.vocab_size()),
        (batch(sequences).trained_tokens(), 256)
    );
    let mut all = vec![f32::NAN; rows.rows() * 256];
    // In parts that fit no chunk.
    for first in (0..rows.rows()).step_by(5) {
        let last = (first + 5).min(rows.rows());
        rows.read(first..last, &mut all[first * 256..last * 256]).unwrap();
    }
    all
}

/// The logits of a model's rows that are asked about.
fn logits_of(model: &Model, sequences: &Sequences, mode: Mode) -> Vec<f32> {
    let batch = batch(sequences);
    let logits = model.logits(&model.hidden(&batch, mode).unwrap()).unwrap();
    let logits = floats(&logits);
    let rows = batch.targets();
    rows.iter()
        .flat_map(|(row, _)| logits[row * 256..][..256].to_vec())
        .collect()
}

/// The loss, its gradients by everything trained, and its parts.
fn run(
    model: &Model,
    teacher: &mut dyn Teacher,
    sequences: &Sequences,
    objective: &Objective,
) -> (f64, Vec<Vec<f32>>, Measures) {
    let batch = batch(sequences);
    let taught = scores(teacher, sequences).into();
    let hidden = model.hidden(&batch, TRAIN).unwrap();
    let (loss, measures) = model
        .distillation_loss(&hidden, &batch, taught, objective, TRAIN)
        .unwrap();
    let grads = loss.backward().unwrap();
    let gradients = model
        .trained()
        .into_iter()
        .map(|(name, var)| floats(grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"))));
    let loss = f64::from(loss.to_scalar::<f32>().unwrap());
    (loss, gradients.collect(), measures)
}

/// With adapters on these modules; B is zero, or not.
fn adapted(name: &str, keep: Keep, target_modules: &str, init: InitLoraWeights) -> Model {
    let mut model = Model::open_as(&fixture(name), keep).unwrap();
    let options = rank_four(target_modules, init);
    lora::add(&mut model, &options, name, &mut Random::new(3, "adapter")).unwrap();
    model
}

#[test]
fn a_mapped_checkpoint_gives_the_bits_of_one_in_memory() {
    let sequences = sequences();
    for name in [
        "tiny-tied",
        "tiny-untied",
        "tiny-qwen2",
        "tiny-qwen3",
        "tiny-gemma3",
    ] {
        let mut teacher = CheckpointTeacher::open(&fixture(name), None, &Place::default()).unwrap();
        assert!(teacher.model().quantized().count() > 0 && teacher.name().ends_with(name));
        assert_eq!(teacher.vocab_size(), 256);
        let ours = logits(&mut teacher, &sequences);
        let model = Model::open(&fixture(name), false).unwrap();
        assert_eq!(ours, logits_of(&model, &sequences, Mode::INFERENCE), "{name}");
        assert_eq!(ours, logits(&mut teacher, &sequences), "{name}: asked twice");
    }
}

#[test]
fn a_teacher_with_an_adapter_is_the_adapted_model() {
    let sequences = sequences();
    // The last one has an adapter on the output layer too.
    for adapter in [
        "all-linear",
        "dora",
        "embeddings",
        "prompt",
        "prefix",
        "modules-to-save",
    ] {
        let dir = fixture("adapters").join(adapter);
        let config = std::fs::read(dir.join("adapter_config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let base = fixture(config["base_model_name_or_path"].as_str().unwrap());
        let mut teacher = CheckpointTeacher::open(&base, Some(&dir), &Place::default()).unwrap();
        let mut model = Model::open(&base, false).unwrap();
        Adapter::load(&mut model, &dir).unwrap();
        let theirs = logits_of(&model, &sequences, Mode::INFERENCE);
        let worst = largest_difference(&logits(&mut teacher, &sequences), &theirs);
        assert!(worst < 1e-5, "{adapter}: {worst}");
    }
}

#[test]
fn the_base_teaches_with_the_adapter_off() {
    let sequences = sequences();
    let plain = Model::open(&fixture("tiny-untied"), false).unwrap();
    let plain = logits_of(&plain, &sequences, Mode::INFERENCE);
    for targets in ["all-linear", r".*(lm_head|embed_tokens|q_proj)"] {
        let model = adapted("tiny-untied", Keep::Frozen, targets, InitLoraWeights::False);
        let mut base = BaseTeacher::new(&model).unwrap();
        assert_eq!(logits(&mut base, &sequences), plain);
        assert_ne!(logits_of(&model, &sequences, Mode::INFERENCE), plain);
        // With B = 0 the adapted model is its base.
        let fresh = adapted("tiny-untied", Keep::Frozen, targets, InitLoraWeights::True);
        let mut base = BaseTeacher::new(&fresh).unwrap();
        for loss in [Loss::ForwardKl, JSD, Loss::ReverseKl] {
            let (loss, gradients, _) = run(&fresh, &mut base, &sequences, &objective(loss));
            assert_eq!(loss, 0.0);
            assert!(gradients.iter().flatten().all(|g| *g == 0.0));
        }
    }
    for name in ["prompt", "prefix"] {
        let dir = fixture("adapters").join(name);
        let config = std::fs::read(dir.join("adapter_config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let base = fixture(config["base_model_name_or_path"].as_str().unwrap());
        let mut model = Model::open(&base, false).unwrap();
        Adapter::load(&mut model, &dir).unwrap();
        let plain = logits_of(&Model::open(&base, false).unwrap(), &sequences, Mode::INFERENCE);
        assert_eq!(
            logits(&mut BaseTeacher::new(&model).unwrap(), &sequences),
            plain,
            "{name}"
        );
    }
    let trained = Model::open(&fixture("tiny-untied"), true).unwrap();
    let error = BaseTeacher::new(&trained).unwrap_err();
    assert!(
        matches!(&error, TeacherError::BaseIsTrained { tensor } if tensor == "model.embed_tokens.weight")
    );
}

#[test]
fn a_student_that_is_its_teacher_does_not_drift() {
    let sequences = sequences();
    let losses = [
        Loss::ForwardKl,
        Loss::ReverseKl,
        JSD,
        Loss::SkewForwardKl { alpha: 0.1 },
    ];
    for (name, loss) in ["tiny-tied", "tiny-untied", "tiny-gemma3", "tiny-qwen3"]
        .into_iter()
        .zip(losses)
    {
        for max_grad_norm in [0.0, 1.0] {
            let model = Model::open(&fixture(name), true).unwrap();
            let start: Vec<Tensor> = model
                .trained()
                .iter()
                .map(|(_, var)| var.copy().unwrap())
                .collect();
            let mut teacher = CheckpointTeacher::open(&fixture(name), None, &Place::default()).unwrap();
            let options = LearnerOptions {
                optim: Optim::AdamwTorch,
                adamw: AdamWOptions {
                    beta1: 0.9,
                    beta2: 0.999,
                    epsilon: 1e-8,
                    weight_decay: 0.0,
                },
                max_grad_norm,
                gradient_checkpointing: max_grad_norm == 0.0,
            };
            let mut learner = Learner::new(&model, options);
            let batch = batch(&sequences);
            for _ in 0..20 {
                let taught = scores(&mut teacher, &sequences).into();
                let loss_of = |hidden: &_| {
                    let objective = objective(loss);
                    Ok(model
                        .distillation_loss(hidden, &batch, taught, &objective, TRAIN)?
                        .0)
                };
                let count = batch.trained_tokens();
                let (loss, norm) = if learner.moves_at_once(1) {
                    let stepped = learner.step(&batch, TRAIN, count, 1e-3, loss_of).unwrap();
                    (stepped.loss, stepped.norm)
                } else {
                    let loss = learner.accumulate(&batch, TRAIN, loss_of).unwrap();
                    let gradients = learner.gradients(count).unwrap();
                    learner.update(&gradients, 1e-3).unwrap();
                    (loss, gradients.norm)
                };
                assert_eq!((loss, norm), (0.0, 0.0), "{name}");
            }
            for ((tensor, var), start) in model.trained().into_iter().zip(start) {
                assert_eq!(floats(var), floats(&start), "{name}: {tensor} has moved");
            }
        }
    }
}

#[test]
fn a_batch_is_its_sequences_and_one_without_labels_counts_nothing() {
    let sequences = sequences();
    let mut teacher = CheckpointTeacher::open(&fixture("tiny-untied"), None, &Place::default()).unwrap();
    let model = Model::open(&fixture("tiny-tied"), true).unwrap();
    let objective = objective(JSD);
    let (loss, gradients, _) = run(&model, &mut teacher, &sequences, &objective);
    for cut in [vec![1; 8], vec![2; 4], vec![3, 1, 4]] {
        let (mut sum, mut sums) = (0.0, vec![Vec::new(); gradients.len()]);
        let mut rest = &sequences[..];
        for count in cut {
            let (part, others) = rest.split_at(count);
            rest = others;
            let (loss, gradients, _) = run(&model, &mut teacher, part, &objective);
            sum += loss;
            for (sum, gradient) in sums.iter_mut().zip(gradients) {
                sum.resize(gradient.len(), 0.0f32);
                sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
            }
        }
        assert!((sum - loss).abs() < 1e-5 * loss, "{sum} and {loss}");
        for (ours, theirs) in sums.iter().zip(&gradients) {
            let largest = theirs.iter().fold(0.0f32, |max, g| max.max(g.abs()));
            assert!(largest_difference(ours, theirs) < 1e-5 * largest.max(1e-3));
        }
    }
    // The first sequence has no label.
    let (loss, gradients, measures) = run(&model, &mut teacher, &sequences[..1], &objective);
    assert_eq!((loss, measures.loss), (0.0, 0.0));
    assert!(gradients.iter().flatten().all(|g| *g == 0.0));
}

#[test]
fn the_chunk_changes_nothing_whatever_the_output_layer() {
    let sequences = sequences();
    let mut teacher = CheckpointTeacher::open(&fixture("tiny-untied"), None, &Place::default()).unwrap();
    let blocks = Keep::Nf4 { double_quant: true };
    let on_head = r".*(lm_head|q_proj|down_proj)";
    let models = [
        ("trained", Model::open(&fixture("tiny-tied"), true).unwrap()),
        (
            "frozen",
            adapted("tiny-tied", Keep::Frozen, "all-linear", InitLoraWeights::False),
        ),
        (
            "blocks",
            adapted("tiny-tied", blocks, "all-linear", InitLoraWeights::False),
        ),
        (
            "adapted",
            adapted("tiny-tied", Keep::Frozen, on_head, InitLoraWeights::False),
        ),
        (
            "adapted blocks",
            adapted("tiny-tied", blocks, on_head, InitLoraWeights::False),
        ),
    ];
    for (name, model) in &models {
        for loss in [JSD, Loss::ReverseKl] {
            let of = |chunk, teacher: &mut CheckpointTeacher| {
                let objective = Objective {
                    chunk,
                    ce_weight: 0.1,
                    ..objective(loss)
                };
                run(model, teacher, &sequences, &objective)
            };
            let (value, gradients, _) = of(256, &mut teacher);
            assert!(
                value > 0.0 && gradients.iter().all(|g| g.iter().any(|g| *g != 0.0)),
                "{name}"
            );
            for chunk in [1, 7] {
                let (other, others, _) = of(chunk, &mut teacher);
                assert!(
                    (other - value).abs() < 1e-6 * value,
                    "{name}: {other} and {value}"
                );
                for (ours, theirs) in others.iter().zip(&gradients) {
                    let largest = theirs.iter().fold(0.0f32, |max, g| max.max(g.abs()));
                    assert!(largest_difference(ours, theirs) < 1e-5 * largest, "{name}");
                }
            }
            // Measuring computes the same without a graph.
            let batch = batch(&sequences);
            let hidden = model.hidden(&batch, Mode::INFERENCE).unwrap();
            let taught = scores(&mut teacher, &sequences).into();
            let objective = Objective {
                ce_weight: 0.1,
                ..objective(loss)
            };
            let (measured, _) = model
                .distillation_loss(&hidden, &batch, taught, &objective, Mode::INFERENCE)
                .unwrap();
            let measured = f64::from(measured.to_scalar::<f32>().unwrap());
            assert!(
                (measured - value).abs() < 1e-5 * value,
                "{name}: {measured} and {value}"
            );
        }
    }
}

#[test]
fn a_student_comes_to_answer_like_its_teacher() {
    let sequences = sequences();
    let (training, held_out) = sequences.split_at(6);
    let mut teacher = CheckpointTeacher::open(&fixture("tiny-untied"), None, &Place::default()).unwrap();
    let model = Model::open(&fixture("tiny-tied"), true).unwrap();
    let forward = objective(Loss::ForwardKl);
    let before = run(&model, &mut teacher, training, &forward).0;
    let before_held_out = run(&model, &mut teacher, held_out, &forward).0;
    let options = LearnerOptions {
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
    let mut learner = Learner::new(&model, options);
    let batch = batch(training);
    for _ in 0..60 {
        let taught = scores(&mut teacher, training).into();
        learner
            .accumulate(&batch, TRAIN, |hidden| {
                Ok(model
                    .distillation_loss(hidden, &batch, taught, &objective(JSD), TRAIN)?
                    .0)
            })
            .unwrap();
        let gradients = learner.gradients(batch.trained_tokens()).unwrap();
        learner.update(&gradients, 3e-3).unwrap();
    }
    let after = run(&model, &mut teacher, training, &forward).0;
    let after_held_out = run(&model, &mut teacher, held_out, &forward).0;
    assert!(after < 0.1 * before, "{before} to {after}");
    println!("held out: {before_held_out} to {after_held_out}"); // shown when the test fails
    assert!(
        after_held_out < before_held_out,
        "{before_held_out} to {after_held_out}"
    );
}
