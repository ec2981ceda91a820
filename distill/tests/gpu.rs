//! The models on a GPU against torch's numbers and the CPU's, for a machine that has one:
//! `cargo test -p pipit-distill --features cuda --test gpu -- --ignored` (`PIPIT_TEST_DEVICE=metal` on a Mac).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use candle_core::Tensor;
use pipit_distill::adapter::{InitLoraWeights, LoraOptions, PrefixOptions, lora, prefix};
use pipit_distill::batch::Batch;
use pipit_distill::device::{Place, Precision};
use pipit_distill::loss::{Loss, Objective};
use pipit_distill::model::{Keep, Mode, Model};
use pipit_distill::optimizer::{AdamWOptions, Optim};
use pipit_distill::random::Random;
use pipit_distill::rollout::{Stop, greedy};
use pipit_distill::teacher::{Asked, CheckpointTeacher, Teacher};
use pipit_distill::trainer::{Learner, LearnerOptions};
use support::{batch, difference, expected, fixture, floats, largest_difference, rows};

const MODELS: [&str; 4] = ["tiny-tied", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3"];
const TRAIN: Mode = Mode {
    gradient: true,
    ..Mode::INFERENCE
};

fn gpu(precision: Precision) -> Place {
    let name = std::env::var("PIPIT_TEST_DEVICE").unwrap_or_else(|_| "cuda".into());
    Place::open(&name, precision).unwrap()
}

fn learner(model: &Model) -> Learner<'_> {
    let adamw = AdamWOptions {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.1,
    };
    let options = LearnerOptions {
        optim: Optim::AdamwTorch,
        adamw,
        max_grad_norm: 1.0,
        gradient_checkpointing: false,
    };
    Learner::new(model, options)
}

#[test]
#[ignore = "needs a GPU"]
fn loss_gradients_and_twenty_steps_are_torchs() {
    for name in MODELS {
        let expected = expected(name);
        let model = Model::open_on(&fixture(name), Keep::Trained, &gpu(Precision::Fp32)).unwrap();
        let batch = batch(&rows(&expected));
        let mut learner = learner(&model);
        for (step, norm) in floats(&expected["grad_norms"]).into_iter().enumerate() {
            let loss = learner
                .accumulate(&batch, TRAIN, |hidden| {
                    model.loss_of_hidden(hidden, &batch, TRAIN, 64)
                })
                .unwrap();
            let gradients = learner.gradients(batch.trained_tokens()).unwrap();
            assert!(
                (gradients.norm - f64::from(norm)).abs() < 1e-3 * f64::from(norm),
                "{name}"
            );
            if step == 0 {
                let mean = loss / batch.trained_tokens() as f64;
                assert!(
                    (mean - f64::from(floats(&expected["loss"])[0])).abs() < 1e-4,
                    "{name}"
                );
                for ((tensor, _), gradient) in learner.trained().iter().zip(gradients.tensors()) {
                    let ours = (gradient / batch.trained_tokens() as f64).unwrap();
                    let worst = difference(&floats(&ours), &floats(&expected[&format!("grad.{tensor}")]));
                    assert!(worst < 1e-3, "{name}, {tensor}: {worst}");
                }
            }
            learner.update(&gradients, 1e-3).unwrap();
        }
        for (tensor, var) in learner.trained() {
            let worst = largest_difference(&floats(var), &floats(&expected[&format!("after.{tensor}")]));
            assert!(
                worst < 1e-4,
                "{name}, {tensor}: after 20 steps it differs by {worst}"
            );
        }
    }
}

fn adapted(name: &str, keep: Keep, with_prefix: bool, place: &Place) -> Model {
    let mut model = Model::open_on(&fixture(name), keep, place).unwrap();
    let mut random = Random::new(3, "adapter");
    if with_prefix {
        let options = PrefixOptions {
            num_virtual_tokens: 3,
            prefix_projection: true,
            encoder_hidden_size: Some(20),
        };
        prefix::add(&mut model, &options, name, &mut random).unwrap();
    } else {
        let options = LoraOptions {
            lora_dropout: 0.2,
            use_dora: true,
            init_lora_weights: InitLoraWeights::False,
            ..LoraOptions::default()
        };
        lora::add(&mut model, &options, name, &mut random).unwrap();
    }
    model
}

/// The loss and all gradients of a step, with dropout.
fn step(model: &Model, name: &str) -> (f64, Vec<f32>) {
    let batch = batch(&rows(&expected(name)));
    let mode = Mode {
        gradient: true,
        dropout_seed: Some(7),
        ..Mode::INFERENCE
    };
    loss_and_gradients(model, &batch, mode, |hidden| {
        model.loss_of_hidden(hidden, &batch, mode, 64)
    })
}

/// A loss, and all its gradients as one vector of length 1: those of a scaled loss are scaled too.
fn loss_and_gradients(
    model: &Model,
    batch: &Batch,
    mode: Mode,
    loss_of: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
) -> (f64, Vec<f32>) {
    let mut learner = learner(model);
    let loss = learner.accumulate(batch, mode, loss_of).unwrap();
    let gradients = learner.gradients(1).unwrap();
    let unit = |gradient: &Tensor| floats(&(gradient / gradients.norm).unwrap());
    (loss, gradients.tensors().iter().flat_map(unit).collect())
}

#[test]
#[ignore = "needs a GPU"]
fn adapters_and_four_bits_are_the_cpus_in_every_type() {
    let nf4 = Keep::Nf4 { double_quant: true };
    for name in MODELS {
        for (keep, with_prefix) in [(Keep::Frozen, false), (nf4, false), (Keep::Frozen, true)] {
            let open = |place: &Place| adapted(name, keep, with_prefix, place);
            let on_cpu = open(&Place::default());
            let (loss, gradients) = step(&on_cpu, name);
            for (precision, bound) in [
                (Precision::Fp32, 1e-4),
                (Precision::Fp16, 1e-2),
                (Precision::Bf16, 5e-2),
            ] {
                let (ours, other) = step(&open(&gpu(precision)), name);
                assert!(
                    (ours - loss).abs() < bound * loss,
                    "{name} in {precision}: {ours} and {loss}"
                );
                let dot = |a: &[f32], b: &[f32]| -> f64 {
                    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                };
                let alike =
                    dot(&gradients, &other) / (dot(&gradients, &gradients) * dot(&other, &other)).sqrt();
                assert!(alike > 1.0 - bound, "{name} in {precision}: {alike}");
            }
            let stop = Stop {
                eos: &[],
                max_new_tokens: 12,
            };
            let prompts: [&[u32]; 3] = [&[7, 20, 33, 46, 59], &[8], &[100, 3, 200]];
            let answers = greedy(&on_cpu, &prompts, &stop).unwrap();
            assert_eq!(
                greedy(&open(&gpu(Precision::Fp32)), &prompts, &stop).unwrap(),
                answers
            );
        }
    }
}

/// Of a student with an adapter against its base: the loss and all gradients.
fn distilled(name: &str, loss: Loss, place: &Place) -> (f64, Vec<f32>) {
    let student = adapted(name, Keep::Frozen, false, place);
    let mut teacher = CheckpointTeacher::open(&fixture(name), None, place).unwrap();
    let sequences = rows(&expected(name));
    let asked = sequences.iter().map(|(ids, labels)| Asked {
        ids,
        labels,
        route: None,
    });
    let taught = teacher.score(&asked.collect::<Vec<_>>()).unwrap().into();
    let objective = Objective {
        loss,
        temperature: 1.5,
        t_squared: false,
        top_k: None,
        ce_weight: 0.1,
        chunk: 5,
    };
    let batch = batch(&sequences);
    loss_and_gradients(&student, &batch, TRAIN, |hidden| {
        let (loss, _) = student.distillation_loss(hidden, &batch, taught, &objective, TRAIN)?;
        Ok(loss)
    })
}

#[test]
#[ignore = "needs a GPU"]
fn a_loss_against_a_teacher_is_the_cpus() {
    let jsd = Loss::Jsd {
        beta: 0.3,
        rescaled: false,
    };
    for name in MODELS {
        for loss in [Loss::ForwardKl, Loss::ReverseKl, jsd] {
            let (on_cpu, gradients) = distilled(name, loss, &Place::default());
            for (precision, bound) in [(Precision::Fp32, 1e-4), (Precision::Bf16, 5e-2)] {
                let (ours, other) = distilled(name, loss, &gpu(precision));
                assert!(
                    (ours - on_cpu).abs() < bound * on_cpu,
                    "{name}, {loss:?} in {precision}: {ours} and {on_cpu}"
                );
                let worst = difference(&gradients, &other);
                assert!(
                    f64::from(worst) < bound,
                    "{name}, {loss:?} in {precision}: {worst}"
                );
            }
        }
    }
}
