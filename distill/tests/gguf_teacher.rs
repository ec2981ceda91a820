//! A GGUF file as a teacher: the logits of the same file in candle, however they are read, and out of a cache.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};

use pipit_distill::data::Encoder;
use pipit_distill::device::Place;
use pipit_distill::teacher::cache::{Binding, Cached, Counts};
use pipit_distill::teacher::gguf::GgufTeacher;
use pipit_distill::teacher::vocabulary::check_tokenizer;
use pipit_distill::teacher::{Asked, CheckpointTeacher, LogitRows, Scores, Teacher, TopK};
use pipit_distill::trainer::with_deep_stack;
use support::cached;

const VOCABULARY: usize = 49_152;
const TEXTS: [&str; 3] = [
    "<|im_start|>user\nTurn on the kitchen light.<|im_end|>\n<|im_start|>assistant\nThe light in the kitchen is on.<|im_end|>",
    "The capital of France is Paris, the capital of Italy is Rome.",
    "{\"service\": \"light.turn_on\", \"target\": \"kitchen\"}",
];

fn smollm2() -> PathBuf {
    cached("PIPIT_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// Ids and labels of the texts; of the first one only the answer is asked about.
fn sequences(model: &Path) -> Vec<(Vec<u32>, Vec<i64>)> {
    let encoder = Encoder::open(model, VOCABULARY).unwrap();
    let labelled = |(i, text): (usize, &&str)| {
        let ids = encoder.ids(text, false).unwrap();
        let prompt = if i == 0 { ids.len() - 9 } else { 1 };
        let labels = ids
            .iter()
            .enumerate()
            .map(|(place, id)| if place < prompt { -100 } else { i64::from(*id) });
        let labels = labels.collect();
        (ids, labels)
    };
    TEXTS.iter().enumerate().map(labelled).collect()
}

fn asked(sequences: &[(Vec<u32>, Vec<i64>)]) -> Vec<Asked<'_>> {
    sequences
        .iter()
        .map(|(ids, labels)| Asked {
            ids,
            labels,
            route: None,
        })
        .collect()
}

fn full(scores: Scores) -> Box<dyn LogitRows> {
    match scores {
        Scores::Full(logits) => logits,
        _ => panic!("no logits"),
    }
}

fn read(logits: &dyn LogitRows, portion: usize) -> Vec<f32> {
    let width = logits.vocab_size();
    let mut all = vec![0.0; logits.rows() * width];
    for first in (0..logits.rows()).step_by(portion) {
        let rows = first..(first + portion).min(logits.rows());
        logits
            .read(rows.clone(), &mut all[rows.start * width..rows.end * width])
            .unwrap();
    }
    all
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    logits.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
}

/// KL(p‖q) in nats, the mean over the rows.
fn mean_kl(p: &[f32], q: &[f32]) -> f64 {
    assert_eq!(p.len(), q.len());
    let rows = p.chunks_exact(VOCABULARY).zip(q.chunks_exact(VOCABULARY));
    let kl = rows.map(|(p, q)| {
        let (p, q) = (log_softmax(p), log_softmax(q));
        p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    });
    kl.sum::<f64>() / (p.len() / VOCABULARY) as f64
}

#[test]
fn llama_cpp_says_what_candle_says_of_the_same_file_however_it_is_read() {
    with_deep_stack(|| {
        let file = smollm2();
        let sequences = sequences(&file);
        let asked = asked(&sequences);
        let mut teacher = GgufTeacher::open(&file, 64).unwrap();
        assert_eq!(teacher.vocab_size(), VOCABULARY);
        let logits = full(teacher.score(&asked).unwrap());
        let labels: usize = sequences
            .iter()
            .map(|(_, labels)| labels.iter().skip(1).filter(|l| **l >= 0).count())
            .sum();
        assert_eq!((logits.rows(), labels > 30), (labels, true));
        let whole = read(logits.as_ref(), labels);
        // The same again, from a second call, while the first one's rows are still there: the same bits.
        let second = full(teacher.score(&asked).unwrap());
        assert_eq!(read(second.as_ref(), labels), whole);
        // In portions that end within texts, then the first rows again: batches of another shape round differently.
        let kl = mean_kl(&whole, &read(logits.as_ref(), 7));
        assert!(kl < 1e-3, "in portions: {kl}");
        let mut first = vec![0.0; 9 * VOCABULARY];
        logits.read(0..9, &mut first).unwrap();
        assert_eq!(first, whole[..first.len()]);
        let own = full(
            CheckpointTeacher::open(&file, None, &Place::default())
                .unwrap()
                .score(&asked)
                .unwrap(),
        );
        let kl = mean_kl(&read(own.as_ref(), labels), &whole);
        println!("mean KL from candle to llama.cpp: {kl:.2e} nats");
        // What is left is llama.cpp's rounding of activations to eight bits.
        assert!(kl < 0.02, "{kl}");

        let long = vec![(vec![1; 65], vec![1; 65])];
        let error = teacher.score(&self::asked(&long)).err().unwrap().to_string();
        assert!(
            error.contains("65 tokens") && error.contains("takes 64"),
            "{error}"
        );
    })
    .unwrap();
}

#[test]
fn a_cache_gives_the_bits_of_the_teachers_top_k() {
    let file = smollm2();
    let sequences = sequences(&file);
    let asked = asked(&sequences);
    let encoder = Encoder::open(&file, VOCABULARY).unwrap();
    let binding = Binding {
        teacher: file.display().to_string(),
        tokenizer_sha256: encoder.tokenizer_sha256().unwrap(),
        template_sha256: encoder.template_sha256(),
        vocab_size: VOCABULARY,
        top_k: 50,
    };
    let dir = tempfile::tempdir().unwrap();
    let open = || {
        let teacher = Box::new(GgufTeacher::open(&file, 64).unwrap());
        Cached::open(dir.path(), teacher, &binding).unwrap()
    };
    let top = |cached: &mut Cached<'_>| -> TopK {
        match cached.score(&asked).unwrap() {
            Scores::Top(top) => top,
            _ => panic!("no top k"),
        }
    };
    let mut fresh = open();
    let first = top(&mut fresh);
    let mut again = open();
    assert_eq!(top(&mut again), first);
    assert_eq!(
        again.counts(),
        Counts {
            found: 3,
            asked: 0,
            damaged: 0
        }
    );
    let places = first.ids.len() / first.k;
    let mut bytes = 0;
    for folder in std::fs::read_dir(dir.path())
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().is_dir())
    {
        bytes += std::fs::read_dir(folder.path())
            .unwrap()
            .flatten()
            .map(|f| f.metadata().unwrap().len())
            .sum::<u64>();
    }
    println!(
        "{places} places of {} tokens: {} bytes a place",
        first.k,
        bytes as usize / places
    );
    assert!((bytes as usize) < places * first.k * 8, "it is compressed");
}

#[test]
fn another_tokenizer_is_refused_with_what_to_do_instead() {
    let smollm2 = Encoder::open(&smollm2(), VOCABULARY).unwrap();
    let gemma = Encoder::open(&cached("PIPIT_TEST_GEMMA", "gemma-3-270m-q4_k_m.gguf"), 262_144).unwrap();
    check_tokenizer((&smollm2, "a"), (&smollm2, "b")).unwrap();
    let error = check_tokenizer((&smollm2, "small"), (&gemma, "gemma"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("gemma has another tokenizer than the student small"),
        "{error}"
    );
    assert!(error.contains("generate") && error.contains("sft"), "{error}");
    assert_eq!(
        smollm2.tokenizer_sha256().unwrap(),
        smollm2.tokenizer_sha256().unwrap()
    );
    assert_ne!(
        smollm2.tokenizer_sha256().unwrap(),
        gemma.tokenizer_sha256().unwrap()
    );
}
