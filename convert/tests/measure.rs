//! Importance matrices and comparisons: the figures of llama-imatrix and llama-perplexity (references/make_measure.py),
//! and what the program does with them.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use pipit_convert::compare::{CompareError, compare};
use pipit_convert::evaluate::{EvaluateError, Options, Text};
use pipit_convert::gguf::{Gguf, TensorType};
use pipit_convert::imatrix::{Imatrix, ImatrixError, Settings, measure};
use pipit_convert::model::{Plan, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::{FileType, Recipe};
use serde_json::Value as Json;
use support::{convert, fixture, names, pipit_convert, stderr};

const OPTIONS: Options = Options {
    ctx: 64,
    chunks: NonZeroUsize::new(6),
    threads: NonZeroUsize::new(1),
};

fn text() -> Text {
    Text::open(&fixture("measure/text.txt")).unwrap()
}

fn model(dir: &Path, kind: TensorType) -> PathBuf {
    let path = dir.join(format!("{kind}.gguf"));
    convert(&fixture("tied"), &[], kind, &path).unwrap();
    path
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_is_measured_is_what_llama_imatrix_measures() {
    let scratch = tempfile::tempdir().unwrap();
    let settings = Settings {
        text: OPTIONS,
        output: false,
    };
    let model = model(scratch.path(), TensorType::F32);
    let ours = measure(&model, &text(), &settings, &Silent).unwrap();
    let theirs = Imatrix::open(&fixture("measure/imatrix.gguf")).unwrap();
    assert_eq!((ours.chunks, ours.chunk_size), (theirs.chunks, theirs.chunk_size));
    assert_eq!(ours.datasets, theirs.datasets);
    assert!(ours.entries.keys().eq(theirs.entries.keys()));
    assert_eq!(ours.entries.len(), 14);
    for (name, entry) in &ours.entries {
        let other = &theirs.entries[name];
        assert_eq!(entry.counts, other.counts, "{name}");
        for (sum, other) in entry.sums.iter().zip(&other.sums) {
            // Kernels of other processors have another exponential and add in another order: AVX-512 is up to 6e-4 off
            // AVX2, which made these.
            assert!((sum - other).abs() <= 2e-3 * other.abs(), "{name}: {sum} {other}");
        }
    }
}

#[test]
fn both_formats_of_llama_imatrix_give_the_same_weights() {
    let one = Imatrix::open(&fixture("measure/imatrix.gguf"))
        .unwrap()
        .importance("");
    let two = Imatrix::open(&fixture("measure/imatrix.dat"))
        .unwrap()
        .importance("");
    assert_eq!((one.chunks, &one.datasets), (two.chunks, &two.datasets));
    assert!(one.weights.keys().eq(two.weights.keys()));
    for (name, weights) in &one.weights {
        for (weight, other) in weights.iter().zip(&two.weights[name]) {
            assert!(
                (weight - other).abs() <= 1e-5 * weight,
                "{name}: {weight} {other}"
            );
        }
    }
}

#[test]
fn the_figures_are_llama_perplexitys() {
    let scratch = tempfile::tempdir().unwrap();
    let (one, two) = (
        model(scratch.path(), TensorType::F32),
        model(scratch.path(), TensorType::Q4_0),
    );
    let ours = compare(&one, &two, &text(), &OPTIONS, &Silent).unwrap();
    let theirs: Json =
        serde_json::from_slice(&std::fs::read(fixture("measure/figures.json")).unwrap()).unwrap();
    let figure = |name: &str, at: usize| theirs[name][at].as_f64().unwrap_or_else(|| panic!("{name}"));
    let close = |name: &str, at: usize, ours: f64, tolerance: f64| {
        let theirs = figure(name, at);
        assert!((ours - theirs).abs() <= tolerance, "{name}: {ours} {theirs}");
    };
    close("PPL of the reference", 0, ours.reference_perplexity.value, 0.2);
    close("PPL of the reference", 1, ours.reference_perplexity.error, 0.2);
    close("Mean PPL(Q)", 0, ours.perplexity.value, 0.2);
    close("Mean PPL(Q)", 1, ours.perplexity.error, 0.2);
    close("Mean PPL(Q)/PPL(base)", 0, ours.ratio.value, 2e-4);
    close("Mean PPL(Q)/PPL(base)", 1, ours.ratio.error, 2e-4);
    // llama-perplexity keeps the reference in 16 bits.
    close("Mean KLD", 0, ours.divergence.mean.value, 2e-4);
    close("Mean KLD", 1, ours.divergence.mean.error, 2e-4);
    close("Median KLD", 0, ours.divergence.median, 5e-4);
    close("90.0% KLD", 0, ours.divergence.percentile_90, 1e-3);
    close("99.0% KLD", 0, ours.divergence.percentile_99, 1e-3);
    close("Maximum KLD", 0, ours.divergence.max, 1e-3);
    close("Mean Δp", 0, ours.probability.value * 100.0, 2e-3);
    close("RMS Δp", 0, ours.probability_rms.value * 100.0, 2e-3);
    // One token in 186 may be a tie.
    close("Same top p", 0, ours.same_top.value * 100.0, 0.6);
    assert_eq!((ours.tokens, ours.chunks), (6 * 31, 6));
}

#[test]
fn a_model_does_not_differ_from_itself_in_parts_and_without_a_name() {
    let scratch = tempfile::tempdir().unwrap();
    let whole = model(scratch.path(), TensorType::F32);
    let source = SourceModel::open(&fixture("tied")).unwrap();
    let recipe = Recipe::new(FileType::F32);
    let plan = Plan::new(&source, &[], &recipe).unwrap();
    let writer = plan
        .write_unnamed(&scratch.path().join("parts.gguf"), Some(50_000), &Silent)
        .unwrap();
    let parts = writer.unnamed().unwrap();
    assert!(Gguf::open(parts.path()).unwrap().paths().count() > 1);
    let same = compare(&whole, parts.path(), &text(), &OPTIONS, &Silent).unwrap();
    assert_eq!(
        (same.divergence.max, same.same_top.value, same.ratio.value),
        (0.0, 1.0, 1.0)
    );
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let model = model(scratch.path(), TensorType::F32);
    let small = scratch.path().join("small.txt");
    std::fs::write(&small, "too short").unwrap();
    let short = Text::open(&small).unwrap();
    let error = compare(&model, &model, &short, &OPTIONS, &Silent).unwrap_err();
    assert!(
        matches!(error, CompareError::Evaluate(EvaluateError::TooShort { .. })),
        "{error}"
    );
    std::fs::write(&small, b"ab\xff").unwrap();
    let error = Text::open(&small).unwrap_err();
    assert!(matches!(error, EvaluateError::NotUtf8 { byte: 2, .. }), "{error}");
    let matrix = fixture("measure/imatrix.gguf");
    let error = measure(&matrix, &text(), &Settings::default(), &Silent).unwrap_err();
    assert!(
        matches!(error, ImatrixError::Evaluate(EvaluateError::NoModel { .. })),
        "{error}"
    );

    let copy = support::Copy::new();
    // In the vocabulary, and among the added tokens.
    for _ in 0..2 {
        copy.replace("tokenizer.json", "<|im_start|>", "<|im_begin|>");
    }
    let other = scratch.path().join("other.gguf");
    let mut source = SourceModel::open(&copy.dir()).unwrap();
    source.skip_tokenizer_proof();
    let recipe = Recipe::new(FileType::F32);
    Plan::new(&source, &[], &recipe)
        .unwrap()
        .write(&other, None, &Silent)
        .unwrap();
    let error = compare(&model, &other, &text(), &OPTIONS, &Silent).unwrap_err();
    assert!(matches!(error, CompareError::Vocabulary { .. }), "{error}");
    assert!(error.to_string().contains("<|im_begin|>"), "{error}");
}

#[test]
fn a_result_that_is_too_far_gets_no_name_and_one_that_is_near_does() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.gguf");
    let (base, text) = (fixture("tied"), fixture("measure/text.txt"));
    let run = |limit: &str| {
        pipit_convert(&[
            "model",
            path(&base),
            "-t",
            "Q4_0",
            "-o",
            path(&out),
            "--no-card",
            "--verify",
            path(&text),
            "--verify-ctx",
            "64",
            "--verify-chunks",
            "2",
            "--max-kl",
            limit,
            "--json",
        ])
    };
    let far = run("0.0001");
    assert_eq!(far.status.code(), Some(3), "{}", stderr(&far));
    assert!(stderr(&far).contains("nothing was written"), "{}", stderr(&far));
    assert!(names(scratch.path()).is_empty());
    let near = run("2");
    assert!(near.status.success(), "{}", stderr(&near));
    let report: Json = serde_json::from_slice(&near.stdout).unwrap();
    let divergence = report["comparison"]["divergence"]["mean"]["value"]
        .as_f64()
        .unwrap();
    assert!((0.0001..2.0).contains(&divergence), "{divergence}");
    assert_eq!(names(scratch.path()), ["out.gguf"]);
}
