//! Train and serve on the same bytes: an adapter trained over the blocks of a real GGUF file, put on that very file
//! by llama.cpp, unmerged. What differs is that llama.cpp rounds activations to eight bits before it multiplies with
//! blocks; on the same numbers in f32 it does not, and agrees with us.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use pipit_convert::adapter::{GgufAdapter, PeftAdapter};
use pipit_convert::gguf::TensorType;
use pipit_convert::llama_cpp::backend;
use pipit_convert::merge::ScaledAdapter;
use pipit_convert::model::{Plan, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::{FileType, Recipe};
use pipit_distill::adapter::{Adapter, LoraOptions, lora};
use pipit_distill::batch::Batch;
use pipit_distill::data::Encoder;
use pipit_distill::model::{Mode, Model};
use pipit_distill::optimizer::{AdamW, AdamWOptions};
use pipit_distill::random::Random;
use pipit_distill::rollout::{Stop, greedy};
use pipit_distill::trainer::with_deep_stack;
use support::cached;

const TRAIN: Mode = Mode {
    gradient: true,
    dropout_seed: None,
    ..Mode::INFERENCE
};
/// What the adapter learns: answers that the base does not give.
const TAUGHT: [&str; 3] = [
    "Turn on the kitchen light -> {\"service\": \"light.turn_on\", \"target\": \"kitchen\"}",
    "Turn off the bedroom light -> {\"service\": \"light.turn_off\", \"target\": \"bedroom\"}",
    "Turn on the garden light -> {\"service\": \"light.turn_on\", \"target\": \"garden\"}",
];
const PROMPTS: [&str; 3] = [
    "Turn on the bathroom light -> {\"service\": \"light.",
    "Turn off the kitchen light -> {\"service\": \"",
    "The capital of France is",
];

fn ids(encoder: &Encoder, text: &str) -> Vec<u32> {
    encoder.ids(text, true).unwrap()
}

/// A few steps of LoRA on three sentences.
fn train(model: &Model, encoder: &Encoder) {
    let samples: Vec<(Vec<u32>, Vec<i64>)> = TAUGHT
        .iter()
        .map(|text| {
            let ids = ids(encoder, text);
            let labels = ids.iter().map(|id| i64::from(*id)).collect();
            (ids, labels)
        })
        .collect();
    let batch = Batch::new(
        samples
            .iter()
            .map(|(ids, labels)| (ids.as_slice(), labels.as_slice())),
    );
    let options = AdamWOptions {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.0,
    };
    let trained = model.trained();
    let mut optimizer = AdamW::new(trained.iter().map(|(_, var)| (*var).clone()), options);
    let count = batch.trained_tokens() as f64;
    for _ in 0..6 {
        let grads = model.loss_sum(&batch, TRAIN, 64).unwrap().backward().unwrap();
        let gradients: Vec<Tensor> = trained
            .iter()
            .map(|(_, var)| grads.get(var).unwrap().clone())
            .collect();
        optimizer.step(&gradients, 2e-3, 1.0 / count).unwrap();
    }
}

/// Our logits after every token.
fn ours(model: &Model, ids: &[u32]) -> Vec<f32> {
    let hidden = model.hidden(&Batch::unlabelled([ids]), Mode::INFERENCE).unwrap();
    model
        .logits(&hidden)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// llama.cpp with the adapter on: the model is loaded once.
struct Server {
    model: LlamaModel,
    adapter: PathBuf,
}

impl Server {
    fn open(file: &Path, adapter: &Path) -> Self {
        let params = LlamaModelParams::default();
        Self {
            model: LlamaModel::load_from_file(backend().unwrap(), file, &params).unwrap(),
            adapter: adapter.to_path_buf(),
        }
    }

    /// Logits after every token; the cache is f32 and flash attention is off, so that nothing is rounded that need
    /// not be.
    fn logits(&mut self, ids: &[u32]) -> Vec<f32> {
        let mut adapter = self.model.lora_adapter_init(&self.adapter).unwrap();
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(256))
            .with_n_batch(256)
            .with_n_ubatch(256)
            .with_n_threads(2)
            .with_n_threads_batch(2)
            .with_type_k(KvCacheType::F32)
            .with_type_v(KvCacheType::F32)
            .with_flash_attention_policy(llama_cpp_sys_2::LLAMA_FLASH_ATTN_TYPE_DISABLED);
        let mut context = self.model.new_context(backend().unwrap(), params).unwrap();
        context.lora_adapter_set(&mut adapter, 1.0).unwrap();
        let mut batch = LlamaBatch::new(ids.len(), 1);
        let tokens: Vec<_> = ids.iter().map(|id| LlamaToken(*id as i32)).collect();
        batch.add_sequence(&tokens, 0, true).unwrap();
        context.decode(&mut batch).unwrap();
        (0..ids.len())
            .flat_map(|at| context.get_logits_ith(at as i32).to_vec())
            .collect()
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    logits.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
}

/// KL(theirs‖ours) in nats, the mean over the rows.
fn mean_kl(theirs: &[f32], ours: &[f32], vocabulary: usize) -> f64 {
    assert_eq!(theirs.len(), ours.len());
    let rows = theirs.chunks_exact(vocabulary).zip(ours.chunks_exact(vocabulary));
    let kl = rows.map(|(p, q)| {
        let (p, q) = (log_softmax(p), log_softmax(q));
        p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    });
    kl.sum::<f64>() / (theirs.len() / vocabulary) as f64
}

/// The most probable token of every row, and its lead over the next.
fn best(logits: &[f32], vocabulary: usize) -> Vec<(usize, f32)> {
    let rows = logits.chunks_exact(vocabulary);
    rows.map(|row| {
        let mut order: Vec<usize> = (0..vocabulary).collect();
        order.select_nth_unstable_by(1, |a, b| row[*b].total_cmp(&row[*a]));
        (order[0], row[order[0]] - row[order[1]])
    })
    .collect()
}

/// The numbers of a file's blocks as a GGUF file of f32: with it, llama.cpp does not round activations.
fn unrounded(file: &Path, scratch: &Path) -> PathBuf {
    let path = scratch.join("f32.gguf");
    let recipe = Recipe::new(FileType::from_name("F32").unwrap());
    let source = SourceModel::open(file).unwrap();
    Plan::new(&source, &[], &recipe)
        .unwrap()
        .write(&path, None, &Silent)
        .unwrap();
    path
}

/// Trains over `file`, serves from it, and compares.
fn same_when_served(file: &Path) {
    let mut model = Model::open(file, false).unwrap();
    let vocabulary = model.config().vocab_size;
    let encoder = Encoder::open(file, vocabulary).unwrap();
    let options = LoraOptions {
        r: 8,
        lora_alpha: 16.0,
        ..LoraOptions::default()
    };
    let base = file.to_string_lossy();
    let config = lora::add(&mut model, &options, &base, &mut Random::new(0, "adapter")).unwrap();
    let untrained = ours(&model, &ids(&encoder, TAUGHT[0]));
    train(&model, &encoder);

    let scratch = tempfile::tempdir().unwrap();
    Adapter::Lora(config).save(&model, scratch.path()).unwrap();
    let scaled = ScaledAdapter {
        adapter: PeftAdapter::open(scratch.path()).unwrap(),
        scale: 1.0,
    };
    let adapter = scratch.path().join("adapter.gguf");
    let source = SourceModel::open(file).unwrap();
    GgufAdapter::new(&scaled, &source, TensorType::F32)
        .unwrap()
        .write(&adapter)
        .unwrap();
    let mut served = Server::open(file, &adapter);
    let mut exact = Server::open(&unrounded(file, scratch.path()), &adapter);

    let (mut tokens, mut compared) = (0.0, 0);
    let (mut to_exact, mut to_served, mut of_rounding) = (0.0, 0.0, 0.0);
    for prompt in PROMPTS {
        let mut ids = ids(&encoder, prompt);
        let asked = ids.len();
        let stop = Stop {
            eos: &[],
            max_new_tokens: 8,
        };
        let answers = greedy(&model, &[ids.as_slice()], &stop).unwrap();
        ids.extend(&answers[0]);
        println!("{prompt}{}", encoder.decode(&answers[0]).unwrap());
        let (ours, exact, served) = (ours(&model, &ids), exact.logits(&ids), served.logits(&ids));
        let weight = ids.len() as f64;
        tokens += weight;
        to_exact += mean_kl(&exact, &ours, vocabulary) * weight;
        to_served += mean_kl(&served, &ours, vocabulary) * weight;
        of_rounding += mean_kl(&served, &exact, vocabulary) * weight;
        // llama.cpp, asked for the tokens one after the other, gives our answer, until one leads by a hair only.
        for theirs in [&exact, &served] {
            let places = best(theirs, vocabulary).into_iter().skip(asked - 1);
            for (token, (theirs, lead)) in answers[0].iter().zip(places) {
                if lead <= 0.05 {
                    break;
                }
                assert_eq!(*token as usize, theirs, "{prompt}");
                compared += 1;
            }
        }
    }
    assert!(
        compared >= 5 * PROMPTS.len(),
        "only {compared} tokens were certain enough"
    );
    let (to_exact, to_served, of_rounding) = (to_exact / tokens, to_served / tokens, of_rounding / tokens);
    println!(
        "{}, {tokens} tokens, mean KL in nats: {to_exact:.2e} from llama.cpp on the blocks' numbers to ours, \
         {to_served:.2e} on the blocks, {of_rounding:.2e} from llama.cpp on the blocks to itself on their numbers",
        file.display()
    );
    // The adapter counts: without it the distributions are far apart.
    let moved = mean_kl(&served.logits(&ids(&encoder, TAUGHT[0])), &untrained, vocabulary);
    assert!(moved > 0.05, "the adapter moves the model by {moved} nats only");
    assert!(to_exact < 1e-5, "mean KL {to_exact}");
    // What is left is llama.cpp's rounding of activations, and nothing of ours.
    assert!(
        to_served < 1.05 * of_rounding + 1e-5,
        "mean KL {to_served}, of which rounding is {of_rounding}"
    );
}

#[test]
fn an_adapter_over_the_blocks_of_smollm2_is_the_same_in_llama_cpp() {
    with_deep_stack(|| same_when_served(&cached("PIPIT_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf")))
        .unwrap();
}

#[test]
fn an_adapter_over_the_blocks_of_gemma_3_is_the_same_in_llama_cpp() {
    with_deep_stack(|| same_when_served(&cached("PIPIT_TEST_GEMMA", "gemma-3-270m-q4_k_m.gguf"))).unwrap();
}
