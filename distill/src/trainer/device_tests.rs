//! Whole models through the operations of GPUs, on the CPU: the tiny models give what the CPU's kernels give, from the
//! logits to the weights after some steps; and they learn in 16 bits.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use pipit_convert::adapter::TargetModules;

use super::{Checkpoints, Learner, LearnerOptions, Outcome, Sampling, TrainOptions, When, train};
use crate::adapter::{
    Adapter, Bias, InitLoraWeights, LoraOptions, PrefixOptions, PromptOptions, PromptStart, Targets, lora,
    prefix, prompt,
};
use crate::batch::{Batch, IGNORED};
use crate::data::Sample;
use crate::device::{Place, Precision};
use crate::model::ops::forced;
use crate::model::{Keep, Mode, Model};
use crate::optimizer::{AdamWOptions, Optim, Schedule};
use crate::random::{Random, mix};
use crate::rollout::{Stop, greedy};

const MODELS: [&str; 6] = [
    "tiny-tied",
    "tiny-untied",
    "tiny-qwen2",
    "tiny-qwen2-untied",
    "tiny-qwen3",
    "tiny-gemma3",
];
const LEARNER: LearnerOptions = LearnerOptions {
    optim: Optim::AdamwTorch,
    adamw: AdamWOptions {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-4,
        weight_decay: 0.1,
    },
    max_grad_norm: 1.0,
    gradient_checkpointing: false,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn on_cpu(precision: Precision) -> Place {
    Place {
        device: Device::Cpu,
        precision,
    }
}

/// Sequences of 1 to 24 tokens whose second half is trained on.
fn samples(count: usize) -> Vec<Sample> {
    let sample = |i: usize| {
        let length = 1 + (mix(i as u64) % 24) as usize;
        let ids: Vec<u32> = (0..length)
            .map(|k| (mix((i * 100 + k) as u64) % 256) as u32)
            .collect();
        let label = |k: usize| match k >= length / 2 {
            true => i64::from(ids[k]),
            false => IGNORED,
        };
        let labels = (0..length).map(label).collect();
        Sample {
            line: i + 1,
            ids,
            labels,
        }
    };
    (0..count).map(sample).collect()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// What a model computes: named lists of numbers.
type Numbers = Vec<(String, Vec<f32>)>;

/// Logits, and of three steps the loss, every gradient and every weight.
fn numbers(model: &Model, recompute: bool) -> Numbers {
    let samples = samples(5);
    let batch = Batch::new(samples.iter().map(|s| (s.ids.as_slice(), s.labels.as_slice())));
    let logits = model
        .logits(&model.hidden(&batch, Mode::INFERENCE).unwrap())
        .unwrap();
    let mut all = vec![("logits".to_owned(), floats(&logits))];
    let options = LearnerOptions {
        gradient_checkpointing: recompute,
        ..LEARNER
    };
    let mut learner = Learner::new(model, options);
    for step in 0..3 {
        let mode = Mode {
            gradient: true,
            dropout_seed: Some(step),
            ..Mode::INFERENCE
        };
        let loss = learner
            .accumulate(&batch, mode, |hidden| {
                model.loss_of_hidden(hidden, &batch, mode, 7)
            })
            .unwrap();
        let gradients = learner.gradients(batch.trained_tokens()).unwrap();
        all.push(("loss".to_owned(), vec![loss as f32, gradients.norm as f32]));
        for ((name, _), gradient) in learner.trained().iter().zip(gradients.tensors()) {
            all.push((format!("grad.{name}"), floats(gradient)));
        }
        learner.update(&gradients, 3e-3).unwrap();
    }
    for (i, (name, var)) in learner.trained().iter().enumerate() {
        assert_eq!(var.dtype(), DType::F32, "{name}");
        all.push((format!("after.{name}"), floats(var)));
        let [mean, square] = learner.optimizer().moments(i).unwrap();
        all.extend([(format!("mean.{name}"), mean), (format!("square.{name}"), square)]);
    }
    all
}

/// The largest number of each kind (logits, gradients, weights), which differences are small against.
fn largest(numbers: &Numbers, kind: &str) -> f32 {
    let of_kind = numbers
        .iter()
        .filter(|(name, _)| name.split('.').next() == Some(kind));
    of_kind
        .flat_map(|(_, values)| values)
        .fold(0.0, |max, x| max.max(x.abs()))
}

fn assert_same(what: &str, kernels: &Numbers, composed: &Numbers) {
    assert_eq!(kernels.len(), composed.len());
    for ((name, ours), (other, theirs)) in kernels.iter().zip(composed) {
        assert_eq!((name, ours.len()), (other, theirs.len()));
        let kind = name.split('.').next().unwrap_or("");
        // The moments hold what three steps came to. Sums in another order come to 1.2e-5 with Gemma's norms, by the width of
        // the machine's vectors.
        let share = if matches!(kind, "mean" | "square") {
            1e-4
        } else {
            2e-5
        };
        let bound = share * largest(kernels, kind);
        assert!(bound > 0.0, "{what}: {name}");
        for (a, b) in ours.iter().zip(theirs) {
            assert!((a - b).abs() <= bound, "{what}, {name}: {a} and {b}");
        }
    }
}

/// Both ways, with and without keeping activations.
fn check(what: &str, open: impl Fn() -> Model) {
    let kernels = numbers(&open(), false);
    for recompute in [false, true] {
        assert_same(what, &kernels, &forced(|| numbers(&open(), recompute)));
    }
}

fn with_lora(name: &str, keep: Keep, place: &Place, options: &LoraOptions) -> Model {
    let mut model = Model::open_on(&fixture(name), keep, place).unwrap();
    lora::add(&mut model, options, name, &mut Random::new(3, "adapter")).unwrap();
    model
}

fn lora_options(names: &[&str]) -> LoraOptions {
    LoraOptions {
        r: 4,
        init_lora_weights: InitLoraWeights::False,
        targets: Targets {
            target_modules: TargetModules::Names(names.iter().map(|name| (*name).to_owned()).collect()),
            ..Targets::default()
        },
        ..LoraOptions::default()
    }
}

#[test]
fn all_weights_are_trained_as_by_the_kernels() {
    for name in MODELS {
        check(name, || Model::open(&fixture(name), true).unwrap());
    }
}

#[test]
fn adapters_of_peft_are_trained_as_by_the_kernels() {
    for name in MODELS {
        check(name, || {
            let mut model = Model::open(&fixture(name), false).unwrap();
            Adapter::load(&mut model, &fixture(&format!("{name}-lora"))).unwrap();
            model
        });
    }
}

#[test]
fn every_form_of_lora_is_trained_as_by_the_kernels() {
    let linears = ["q_proj", "v_proj", "down_proj"];
    let around = ["q_proj", "embed_tokens", "lm_head"];
    let forms = [
        (
            "dropout",
            LoraOptions {
                lora_dropout: 0.3,
                ..lora_options(&linears)
            },
        ),
        (
            "biases",
            LoraOptions {
                lora_bias: true,
                bias: Bias::All,
                ..lora_options(&["q_proj", "lm_head"])
            },
        ),
        (
            "DoRA",
            LoraOptions {
                use_dora: true,
                ..lora_options(&around)
            },
        ),
        (
            "DoRA with dropout",
            LoraOptions {
                use_dora: true,
                lora_dropout: 0.3,
                ..lora_options(&linears)
            },
        ),
        ("embeddings", lora_options(&around)),
    ];
    for (what, options) in &forms {
        for name in ["tiny-tied", "tiny-qwen2-untied"] {
            check(what, || with_lora(name, Keep::Frozen, &Place::default(), options));
        }
    }
    let mut saved = lora_options(&["q_proj"]);
    saved.targets.modules_to_save = vec!["lm_head".into(), "norm".into()];
    check("modules_to_save", || {
        with_lora("tiny-tied", Keep::Frozen, &Place::default(), &saved)
    });
}

#[test]
fn four_bits_are_trained_over_as_by_the_kernels() {
    let nf4 = Keep::Nf4 { double_quant: true };
    let dora = LoraOptions {
        use_dora: true,
        ..lora_options(&["q_proj", "up_proj", "embed_tokens", "lm_head"])
    };
    for options in [dora, lora_options(&["q_proj", "down_proj"])] {
        check("NF4", || {
            with_lora("tiny-untied", nf4, &Place::default(), &options)
        });
    }
}

fn with_prompt(place: &Place) -> Model {
    let mut model = Model::open_on(&fixture("tiny-gemma3"), Keep::Frozen, place).unwrap();
    let options = PromptOptions {
        num_virtual_tokens: 3,
        init: PromptStart::SampleVocab,
    };
    prompt::add(&mut model, &options, "base", &mut Random::new(3, "adapter")).unwrap();
    model
}

fn with_prefix(prefix_projection: bool, place: &Place) -> Model {
    let mut model = Model::open_on(&fixture("tiny-qwen3"), Keep::Frozen, place).unwrap();
    let options = PrefixOptions {
        num_virtual_tokens: 3,
        prefix_projection,
        encoder_hidden_size: Some(20),
    };
    prefix::add(&mut model, &options, "base", &mut Random::new(3, "adapter")).unwrap();
    model
}

#[test]
fn virtual_tokens_are_trained_as_by_the_kernels() {
    check("prompt", || with_prompt(&Place::default()));
    check("prefix", || with_prefix(false, &Place::default()));
    check("projected prefix", || with_prefix(true, &Place::default()));
}

#[test]
fn answers_are_those_of_the_kernels_as_sequences_end_one_by_one() {
    let prompts: [&[u32]; 3] = [&[7, 20, 33, 46, 59], &[8], &[100, 3, 200]];
    let answer = |model: &Model, eos: &[u32]| {
        let stop = Stop {
            eos,
            max_new_tokens: 12,
        };
        greedy(model, &prompts, &stop).unwrap()
    };
    let mut models: Vec<Model> = MODELS
        .iter()
        .map(|name| Model::open(&fixture(name), false).unwrap())
        .collect();
    models.extend([
        with_prompt(&Place::default()),
        with_prefix(false, &Place::default()),
    ]);
    for model in &models {
        let whole = answer(model, &[]);
        assert_eq!(forced(|| answer(model, &[])), whole);
        let eos = [whole[1][4], whole[0][7]];
        let cut = answer(model, &eos);
        assert!(cut != whole);
        assert_eq!(forced(|| answer(model, &eos)), cut);
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn sixteen_bits_are_near_f32_and_what_is_trained_stays_f32() {
    let all = lora_options(&["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"]);
    let dora = LoraOptions {
        use_dora: true,
        lora_dropout: 0.2,
        ..lora_options(&["o_proj"])
    };
    type Open<'a> = (&'a str, Box<dyn Fn(&Place) -> Model + 'a>);
    let mut models: Vec<Open<'_>> = vec![
        (
            "LoRA",
            Box::new(|place| with_lora("tiny-untied", Keep::Frozen, place, &all)),
        ),
        (
            "DoRA",
            Box::new(|place| with_lora("tiny-qwen2", Keep::Frozen, place, &dora)),
        ),
        (
            "NF4",
            Box::new(|place| with_lora("tiny-tied", Keep::Nf4 { double_quant: true }, place, &all)),
        ),
        ("prompt", Box::new(with_prompt)),
        ("prefix", Box::new(|place| with_prefix(true, place))),
    ];
    for name in ["tiny-tied", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3"] {
        let open = move |place: &Place| Model::open_on(&fixture(name), Keep::Trained, place).unwrap();
        models.push((name, Box::new(open)));
    }
    for (what, open) in &models {
        let exact = numbers(&open(&on_cpu(Precision::Fp32)), false);
        for (precision, bound) in [(Precision::Bf16, 0.03), (Precision::Fp16, 0.004)] {
            let model = open(&on_cpu(precision));
            let frozen = model.weights().filter(|weight| weight.var().is_none());
            for weight in frozen {
                let tensor = weight.get(Mode::INFERENCE);
                let expected = if tensor.rank() == 2 {
                    precision.dtype()
                } else {
                    DType::F32
                };
                assert_eq!(tensor.dtype(), expected, "{}", weight.name);
            }
            let short = numbers(&model, true);
            for ((name, exact), (_, short)) in exact.iter().zip(&short).take(2) {
                for (a, b) in exact.iter().zip(short) {
                    let scale = exact.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                    assert!(
                        (a - b).abs() <= bound * scale,
                        "{what} in {precision}, {name}: {a} and {b}"
                    );
                }
            }
            let gradients = |numbers: &Numbers| -> Vec<f32> {
                let of_first_step = numbers
                    .iter()
                    .skip(2)
                    .take_while(|(name, _)| name.starts_with("grad."));
                of_first_step.flat_map(|(_, values)| values.clone()).collect()
            };
            let alike = cosine(&gradients(&exact), &gradients(&short));
            assert!(
                alike > 1.0 - f64::from(bound) / 10.0,
                "{what} in {precision}: {alike}"
            );
        }
    }
}

fn train_options(steps: usize) -> TrainOptions {
    TrainOptions {
        sampling: Sampling {
            batch_size: 4,
            packed_tokens: None,
            gradient_accumulation_steps: 2,
            seed: 5,
        },
        learner: LearnerOptions {
            gradient_checkpointing: true,
            ..LEARNER
        },
        learning_rate: 5e-3,
        schedule: Schedule::Linear,
        warmup_steps: 2,
        steps,
        logging_steps: 1,
        eval: When::Steps(4),
        save: When::Steps(4),
        early_stopping_patience: 0,
        early_stopping_threshold: 0.0,
        loss_chunk: 16,
    }
}

/// A run in `dir`, stopped there after `steps` of 12 or from `resume`; its weights too.
fn run(model: &Model, dir: &Path, resume: Option<usize>) -> (Outcome, Vec<Vec<f32>>) {
    let export = |dir: &Path| Ok(std::fs::write(dir.join("exported"), "")?);
    let checkpoints = Checkpoints {
        dir: dir.to_path_buf(),
        export: &export,
        weights_in_export: false,
        save_total_limit: 0,
        load_best_model_at_end: false,
        resume_from: resume.map(|step| dir.join(format!("checkpoint-{step}"))),
    };
    let (rows, options, stop) = (samples(16), train_options(12), AtomicBool::new(false));
    let outcome = train(
        model,
        &rows,
        &rows[..4],
        &options,
        Some(&checkpoints),
        &stop,
        |_| Ok(()),
    )
    .unwrap();
    let weights = model.trained().iter().map(|(_, var)| floats(var)).collect();
    (outcome, weights)
}

#[test]
fn a_run_learns_is_saved_and_goes_on_with_the_same_bits() {
    let options = LoraOptions {
        lora_dropout: 0.1,
        ..lora_options(&["q_proj", "v_proj", "down_proj"])
    };
    let first_loss = |place: &Place| {
        let model = with_lora("tiny-untied", Keep::Frozen, place, &options);
        super::evaluation_loss(&model, &samples(4), 4).unwrap()
    };
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp16] {
        let place = on_cpu(precision);
        let dir = tempfile::tempdir().unwrap();
        let open = || with_lora("tiny-untied", Keep::Frozen, &place, &options);
        let (outcome, weights) = forced(|| run(&open(), dir.path(), None));
        let (before, after) = (forced(|| first_loss(&place)), outcome.eval_loss.unwrap());
        assert!(after < before - 0.05, "{precision}: {before} and {after}");
        // Another start: all comes from the checkpoint.
        let other = || {
            let mut model = Model::open_on(&fixture("tiny-untied"), Keep::Frozen, &place).unwrap();
            lora::add(&mut model, &options, "base", &mut Random::new(99, "adapter")).unwrap();
            model
        };
        let (again, resumed) = forced(|| run(&other(), dir.path(), Some(8)));
        assert!(weights == resumed, "{precision}");
        assert_eq!(again.eval_loss, outcome.eval_loss);
        let state = std::fs::read_to_string(dir.path().join("checkpoint-8/trainer_state.json")).unwrap();
        assert_eq!(state.contains("loss_scale"), precision == Precision::Fp16);
    }
}

#[test]
fn a_gradient_that_overflows_lowers_the_factor_of_the_loss_and_no_step_is_lost() {
    let options = lora_options(&["q_proj", "down_proj"]);
    let open = || with_lora("tiny-untied", Keep::Frozen, &on_cpu(Precision::Fp16), &options);
    let dir = tempfile::tempdir().unwrap();
    let (_, usual) = run(&open(), dir.path(), None);
    // With a factor that is too large for fp16, in the state that the run goes on from.
    let path = dir.path().join("checkpoint-4/trainer_state.json");
    let mut state: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let usual_factor = state["loss_scale"]["factor"].as_f64().unwrap();
    state["loss_scale"]["factor"] = 2f64.powi(24).into();
    std::fs::write(&path, state.to_string()).unwrap();
    let (outcome, lowered) = run(&open(), dir.path(), Some(4));
    assert_eq!(outcome.steps, 12);
    let path = dir.path().join("checkpoint-8/trainer_state.json");
    let state: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let factor = state["loss_scale"]["factor"].as_f64().unwrap();
    assert!(factor < 2f64.powi(24) && factor >= usual_factor, "{factor}");
    for (a, b) in usual.iter().flatten().zip(lowered.iter().flatten()) {
        assert!((a - b).abs() < 2e-3, "{a} and {b}");
    }
}
