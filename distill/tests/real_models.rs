//! SmolLM2-135M and Gemma 3 270M, out of the files that a device runs: our log-probabilities on real sentences beside
//! llama.cpp's, on the same weights, which it gets as F32. It keeps keys and values in f16 unless told otherwise; here
//! it is told, so that what is left are the ways to add and, in Gemma, its GELU out of a table of f16.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::num::NonZeroU32;
use std::path::Path;
use std::process::Command;

use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use pipit_convert::gguf::{Gguf, TensorType};
use pipit_convert::import::import;
use pipit_convert::llama_cpp;
use pipit_convert::model::{Plan, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::{FileType, Recipe};
use pipit_distill::batch::Batch;
use pipit_distill::model::{Mode, Model};
use support::cached;

/// The longest text, in tokens.
const CONTEXT: u32 = 1024;

const SENTENCES: [&str; 4] = [
    "The capital of the Netherlands is Amsterdam, but the government sits in The Hague.",
    "Schalte das Licht in der Küche ein und stelle die Heizung auf 21 Grad.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Zet de lamp in de woonkamer uit, alsjeblieft.",
];

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    logits.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
}

/// How far our log-probabilities are from llama.cpp's.
#[derive(Debug, Default)]
struct Difference {
    /// Over the tokens that at least one of a thousand would be: the rest has no say in anything.
    largest: f64,
    /// KL(llama.cpp‖ours) in nats, of the token where it is largest.
    divergence: f64,
    /// Places where the most probable token is another.
    other_first: usize,
    tokens: usize,
}

/// llama.cpp's logits after each of the last tokens, one row after another.
fn llama_cpps(model: &LlamaModel, tokens: &[LlamaToken], last: usize) -> Vec<f32> {
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(CONTEXT))
        .with_n_batch(CONTEXT)
        .with_n_ubatch(CONTEXT)
        .with_type_k(KvCacheType::F32)
        .with_type_v(KvCacheType::F32)
        // Its threads wait for each other without sleep, which takes minutes where other tests have the cores.
        .with_n_threads_batch(1)
        // LLAMA_FLASH_ATTN_TYPE_DISABLED: it computes in f16.
        .with_flash_attention_policy(0);
    let mut context = model.new_context(llama_cpp::backend().unwrap(), params).unwrap();
    let mut batch = LlamaBatch::new(tokens.len(), 1);
    let wanted = tokens.len() - last..tokens.len();
    for (position, token) in tokens.iter().enumerate() {
        let position_32 = i32::try_from(position).unwrap();
        batch
            .add(*token, position_32, &[0], wanted.contains(&position))
            .unwrap();
    }
    context.decode(&mut batch).unwrap();
    wanted
        .flat_map(|at| context.get_logits_ith(i32::try_from(at).unwrap()).to_vec())
        .collect()
}

/// Ours.
fn ours(model: &Model, tokens: &[LlamaToken], last: usize) -> Vec<f32> {
    let ids: Vec<u32> = tokens.iter().map(|id| u32::try_from(id.0).unwrap()).collect();
    let hidden = model
        .hidden(&Batch::unlabelled([ids.as_slice()]), Mode::INFERENCE)
        .unwrap();
    let rows = hidden.narrow(0, ids.len() - last, last).unwrap();
    let logits = model.logits(&rows.contiguous().unwrap()).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// Both on the weights of this file, dequantised: every token of the sentences, and the last ones of a text that is
/// longer than Gemma's windows of 512.
fn compare(gguf: &Path) -> Difference {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("checkpoint");
    import(&Gguf::open(gguf).unwrap(), &folder, TensorType::F32, &Silent).unwrap();
    let file = scratch.path().join("f32.gguf");
    let mut source = SourceModel::open(&folder).unwrap();
    source.skip_tokenizer_proof(); // convert's tests have it
    let recipe = Recipe::new(FileType::from_name("F32").unwrap());
    let plan = Plan::new(&source, &[], &recipe).unwrap();
    plan.write(&file, None, &Silent).unwrap();

    let theirs = llama_cpp::load(&file, &LlamaModelParams::default()).unwrap();
    let model = Model::open(&folder, false).unwrap();
    let tokens =
        |text: &str| -> Vec<LlamaToken> { theirs.vocab().tokenize(text.as_bytes(), true, false).to_vec() };
    let mut texts: Vec<(Vec<LlamaToken>, usize)> = SENTENCES
        .iter()
        .map(|text| {
            let tokens = tokens(text);
            let all = tokens.len();
            (tokens, all)
        })
        .collect();
    let long = tokens(&SENTENCES.join(" ").repeat(7));
    assert!(
        (550..CONTEXT as usize).contains(&long.len()),
        "{} tokens",
        long.len()
    );
    texts.push((long, 16));

    let width = model.config().vocab_size;
    let mut difference = Difference::default();
    for (tokens, last) in texts {
        let (ours, theirs) = (ours(&model, &tokens, last), llama_cpps(&theirs, &tokens, last));
        for (ours, theirs) in ours.chunks_exact(width).zip(theirs.chunks_exact(width)) {
            difference.add(&log_softmax(ours), &log_softmax(theirs));
        }
    }
    println!("{}: {difference:?}", gguf.display());
    difference
}

impl Difference {
    fn add(&mut self, ours: &[f64], theirs: &[f64]) {
        assert_eq!(ours.len(), theirs.len());
        let likely = |(a, b): (&f64, &f64)| (a.max(*b) > 1e-3f64.ln()).then(|| (a - b).abs());
        let largest = ours.iter().zip(theirs).filter_map(likely).fold(0.0, f64::max);
        let divergence: f64 = ours.iter().zip(theirs).map(|(a, b)| b.exp() * (b - a)).sum();
        let first = |row: &[f64]| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]));
        self.largest = self.largest.max(largest);
        self.divergence = self.divergence.max(divergence);
        self.other_first += usize::from(first(ours) != first(theirs));
        self.tokens += 1;
    }
}

/// The program itself: a run over the blocks of a GGUF file, with all that a run leaves behind.
#[test]
fn a_run_over_a_gguf_file_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let rows: String = SENTENCES
        .iter()
        .map(|text| format!("{}\n", serde_json::json!({ "text": text })))
        .collect();
    std::fs::write(folder.path().join("rows.jsonl"), rows).unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_pipit-distill"))
        .args([
            "sft",
            "--method",
            "qlora",
            "--data",
            "rows.jsonl",
            "--max-steps",
            "1",
        ])
        .args(["--per-device-train-batch-size", "1", "-o", "run", "--model"])
        .arg(cached("PIPIT_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf"))
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let said = |name: &str| std::fs::read_to_string(folder.path().join("run").join(name)).unwrap();
    assert!(
        said("README.md").contains("license: \"apache-2.0\""),
        "{}",
        said("README.md")
    );
    assert!(said("summary.json").contains("\"steps\": 1") || said("summary.json").contains("\"steps\":1"));
    assert!(folder.path().join("run/adapter_model.safetensors").is_file());
}

#[test]
fn smollm2_is_llama_cpps() {
    let difference = compare(&cached("PIPIT_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf"));
    // Seen: 4.2e-5, and 1.4e-10 nats.
    assert!(difference.largest < 1e-3, "{difference:?}");
    assert!(difference.divergence < 1e-7, "{difference:?}");
}

#[test]
fn gemma_3_is_llama_cpps() {
    let difference = compare(&cached("PIPIT_TEST_GEMMA", "gemma-3-270m-q4_k_m.gguf"));
    // Seen: 1.3e-2, and 4.2e-6 nats. It is llama.cpp's GELU: docs/train/architectures.md.
    assert!(difference.largest < 5e-2, "{difference:?}");
    assert!(difference.divergence < 5e-5, "{difference:?}");
    assert_eq!(difference.other_first, 0, "{difference:?}");
}
