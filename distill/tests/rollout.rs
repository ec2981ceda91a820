//! Answers that are drawn together are those that would be drawn alone, with the probabilities that the model gives them,
//! by our own model and by llama.cpp.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};

use llama_cpp_2::model::params::LlamaModelParams;
use pipit_convert::llama_cpp::load;
use pipit_convert::model::{Plan, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::{FileType, Recipe};
use pipit_distill::batch::Batch;
use pipit_distill::model::{Mode, Model};
use pipit_distill::random::Random;
use pipit_distill::rollout::{Decode, Draw, LlamaCpp, Rollout, RolloutOptions, Stop, Student, rollouts};
use support::floats;

const PROMPTS: [&[u32]; 4] = [&[41, 52, 63], &[77], &[90, 91, 92, 93, 94], &[41, 52]];
const COPIES: usize = 3;
const TEMPERATURE: f64 = 0.7;

/// A tiny llama that becomes a GGUF file.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../convert/tests/fixtures/tied")
}

fn stream(answer: usize) -> Random {
    Random::new(11, &format!("answer {answer}"))
}

fn draw<D: Decode<Error: std::fmt::Debug>>(
    decoder: &mut D,
    prompts: &[&[u32]],
    copies: usize,
    streams: &mut [Random],
) -> Vec<Rollout> {
    let options = RolloutOptions {
        draw: Draw {
            temperature: TEMPERATURE,
            top_k: 0,
            top_p: 1.0,
        },
        num_generations: copies,
        width: 2 * COPIES,
    };
    // Two end tokens that are likely enough to come.
    let stop = Stop {
        eos: &[2, 100],
        max_new_tokens: 12,
    };
    rollouts(decoder, prompts, &options, &stop, streams).unwrap()
}

fn together<D: Decode<Error: std::fmt::Debug>>(decoder: &mut D) -> Vec<Rollout> {
    let mut streams: Vec<Random> = (0..PROMPTS.len() * COPIES).map(stream).collect();
    draw(decoder, &PROMPTS, COPIES, &mut streams)
}

/// The same tokens with about the same probabilities.
fn assert_alike(ours: &[Rollout], theirs: &[Rollout]) {
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(ours.ids, theirs.ids);
        for (a, b) in ours.logprobs.iter().zip(&theirs.logprobs) {
            assert!((a - b).abs() < 1e-3, "{a} {b}");
        }
    }
}

/// The probabilities that were told with the tokens are those that the model gives them, within some nats.
fn assert_probabilities(model: &Model, answers: &[Rollout], nats: f64) {
    let vocabulary = model.config().vocab_size;
    for (answer, rollout) in answers.iter().enumerate() {
        let prompt = PROMPTS[answer / COPIES];
        let ids = [prompt, &rollout.ids].concat();
        let hidden = model
            .hidden(&Batch::unlabelled([ids.as_slice()]), Mode::INFERENCE)
            .unwrap();
        let logits = floats(&model.logits(&hidden).unwrap());
        for (i, (token, logprob)) in rollout.ids.iter().zip(&rollout.logprobs).enumerate() {
            let row = &logits[(prompt.len() - 1 + i) * vocabulary..][..vocabulary];
            let scaled = |x: f32| f64::from(x) / TEMPERATURE;
            let sum: f64 = row.iter().map(|x| scaled(*x).exp()).sum();
            let expected = scaled(row[*token as usize]) - sum.ln();
            assert!(
                (f64::from(*logprob) - expected).abs() < nats,
                "{logprob} {expected}"
            );
        }
    }
}

#[test]
fn together_as_alone_with_the_models_probabilities() {
    let model = Model::open(&fixture(), false).unwrap();
    let answers = together(&mut Student::new(&model).unwrap());
    let alone: Vec<Rollout> = (0..answers.len())
        .flat_map(|answer| {
            let prompt = [PROMPTS[answer / COPIES]];
            draw(
                &mut Student::new(&model).unwrap(),
                &prompt,
                1,
                &mut [stream(answer)],
            )
        })
        .collect();
    assert_alike(&answers, &alone);
    let copies = |prompt: usize| &answers[prompt * COPIES..(prompt + 1) * COPIES];
    assert!(
        (0..4).any(|prompt| copies(prompt)[0].ids != copies(prompt)[1].ids),
        "chance does something"
    );

    assert_probabilities(&model, &answers, 1e-4);
}

#[test]
fn llama_cpp_draws_with_the_models_probabilities() {
    let model = Model::open(&fixture(), false).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("f32.gguf");
    let recipe = Recipe::new(FileType::from_name("F32").unwrap());
    let mut source = SourceModel::open(&fixture()).unwrap();
    source.skip_tokenizer_proof();
    Plan::new(&source, &[], &recipe)
        .unwrap()
        .write(&path, None, &Silent)
        .unwrap();
    let file = load(&path, &LlamaModelParams::default().with_n_gpu_layers(0)).unwrap();
    let mut decoder = LlamaCpp::new(&file, 20, 2 * COPIES).unwrap();
    let theirs = together(&mut decoder);
    // Its keys and values are halves of 16 bits, so that a token on an edge may be another one now and then.
    assert_probabilities(&model, &theirs, 0.05);
    let ours = together(&mut Student::new(&model).unwrap());
    let same = ours
        .iter()
        .zip(&theirs)
        .filter(|(ours, theirs)| ours.ids[0] == theirs.ids[0])
        .count();
    assert!(same + 1 >= ours.len(), "{same} of {} begin alike", ours.len());
    // Nothing is left of them.
    assert_alike(&together(&mut decoder), &theirs);
}
