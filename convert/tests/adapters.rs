//! Adapters of every kind: merged as PEFT's merge_and_unload in f32 does it, and as GGUF adapters that llama.cpp applies.
//! The fixtures are made by tests/references/make_adapters.py.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use pipit_convert::adapter::{GgufAdapter, PeftAdapter};
use pipit_convert::checkpoint::{Checkpoint, TensorFiles};
use pipit_convert::gguf::{Gguf, TensorType};
use pipit_convert::import::import;
use pipit_convert::merge::ScaledAdapter;
use pipit_convert::model::SourceModel;
use pipit_convert::progress::Silent;
use support::architectures::checkpoint as assembled;
use support::llama_cpp::{logits, logits_with};
use support::{convert, fixture};

/// PEFT's and our merge differ by rounding only.
const TOLERANCE: f32 = 1e-6;

fn folder(name: &str) -> PathBuf {
    fixture("adapters").join(name)
}

fn open(name: &str, scale: f32) -> ScaledAdapter {
    let adapter = PeftAdapter::open(&folder(name)).unwrap();
    ScaledAdapter { adapter, scale }
}

/// The checkpoint that an adapter was made for.
fn base(name: &str, scratch: &Path) -> PathBuf {
    let base = std::fs::read_to_string(folder(name).join("base.txt")).unwrap();
    match base.trim().strip_prefix("architectures/") {
        Some(architecture) => assembled(architecture, scratch),
        None => fixture(base.trim()),
    }
}

/// The checkpoint with the adapters merged, as a folder again: in the checkpoint's own names, order and space.
fn merged(base: &Path, adapters: &[ScaledAdapter], scratch: &Path) -> Checkpoint {
    let (file, folder) = (scratch.join("merged.gguf"), scratch.join("merged"));
    let gguf = convert(base, adapters, TensorType::F32, &file).unwrap();
    import(&gguf, &folder, TensorType::F32, &Silent).unwrap();
    Checkpoint::open(&folder).unwrap()
}

fn close(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (at, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        let close = (ours - theirs).abs() <= TOLERANCE * theirs.abs().max(1.0);
        assert!(close, "{what}[{at}]: {ours}, and PEFT has {theirs}");
    }
}

/// Every tensor is PEFT's; those that PEFT leaves alone are the base's.
fn check(name: &str) -> Checkpoint {
    let scratch = tempfile::tempdir().unwrap();
    let base = base(name, scratch.path());
    let ours = merged(&base, &[open(name, 1.0)], scratch.path());
    let theirs = TensorFiles::open(&folder(name).join("merged.safetensors")).unwrap();
    let base = Checkpoint::open(&base).unwrap();
    let left: BTreeSet<_> = theirs.names().filter(|tensor| !ours.contains(tensor)).collect();
    assert!(left.is_empty(), "{name}: {left:?}");
    for tensor in ours.names() {
        let before = if tensor == "lm_head.weight" && !base.contains(tensor) {
            "model.embed_tokens.weight"
        } else {
            tensor
        };
        let wanted = theirs
            .tensor(tensor)
            .unwrap_or_else(|| base.tensor(before).unwrap());
        close(
            &ours.tensor(tensor).unwrap().to_f32().unwrap(),
            &wanted.to_f32().unwrap(),
            &format!("{name}: {tensor}"),
        );
    }
    ours
}

fn tied(checkpoint: &Checkpoint) -> bool {
    !checkpoint.contains("lm_head.weight")
}

#[test]
fn lora_is_merged_as_peft_merges_it() {
    for name in ["plain", "rslora", "regex", "layers", "fan-in", "fused", "ends"] {
        check(name);
    }
}

#[test]
fn dora_is_merged_as_peft_merges_it() {
    check("dora");
    check("embeddings-dora");
}

#[test]
fn biases_are_merged_as_peft_merges_them() {
    for name in ["bias-all", "bias-lora-only", "lora-bias"] {
        check(name);
    }
}

#[test]
fn tensors_that_are_saved_whole_replace_the_bases() {
    check("saved-norms");
    assert!(!tied(&check("saved-embeddings")));
    assert!(!tied(&check("saved-head")));
}

#[test]
fn an_adapter_of_one_of_embeddings_and_output_unties_them() {
    assert!(!tied(&check("head")));
    assert!(!tied(&check("embeddings")));
}

#[test]
fn embeddings_and_output_that_change_alike_stay_one_tensor() {
    assert!(tied(&check("tying")));
    assert!(tied(&check("tokens")));
}

#[test]
fn new_tokens_come_with_the_adapters_tokenizer() {
    let ours = check("resized");
    assert_eq!(ours.config()["vocab_size"], 342);
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("resized.gguf");
    let gguf = convert(&fixture("tied"), &[open("resized", 1.0)], TensorType::F32, &file).unwrap();
    let tokens = gguf.strings("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.len(), 342);
    assert!(tokens.iter().any(|token| token == "kitchenette"));
}

#[test]
fn the_users_scale_multiplies_what_is_added() {
    let scratch = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(&fixture("tied")).unwrap();
    let theirs = TensorFiles::open(&folder("plain").join("merged.safetensors")).unwrap();
    let ours = merged(&fixture("tied"), &[open("plain", -0.5)], scratch.path());
    for tensor in theirs.names() {
        let before = base.tensor(tensor).unwrap().to_f32().unwrap();
        let after = theirs.tensor(tensor).unwrap().to_f32().unwrap();
        let wanted: Vec<_> = before
            .iter()
            .zip(&after)
            .map(|(b, a)| b - 0.5 * (a - b))
            .collect();
        close(&ours.tensor(tensor).unwrap().to_f32().unwrap(), &wanted, tensor);
    }
}

#[test]
fn several_adapters_add_up() {
    let scratch = tempfile::tempdir().unwrap();
    let (first, second) = (scratch.path().join("both"), scratch.path().join("one"));
    std::fs::create_dir(&first).unwrap();
    std::fs::create_dir(&second).unwrap();
    let all = [open("plain", 1.0), open("rslora", 0.5), open("plain", -1.0)];
    let both = merged(&fixture("tied"), &all, &first);
    let one = merged(&fixture("tied"), &[open("rslora", 0.5)], &second);
    for tensor in one.names() {
        let values = |checkpoint: &Checkpoint| checkpoint.tensor(tensor).unwrap().to_f32().unwrap();
        close(&values(&both), &values(&one), tensor);
    }
}

#[test]
fn whole_tensors_cannot_be_scaled() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.gguf");
    let base = assembled("gemma3", scratch.path());
    let error = convert(&base, &[open("saved-norms", 0.5)], TensorType::F32, &out).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("input_layernorm.weight whole") && error.contains("0.5"),
        "{error}"
    );
    let error = convert(&fixture("tied"), &[open("tokens", 2.0)], TensorType::F32, &out).unwrap_err();
    assert!(error.to_string().contains("embed_tokens whole"), "{error}");
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out.gguf");
    for (base, adapter, part) in [
        (
            fixture("untied"),
            "plain",
            "down_proj.weight is [32, 64] in the adapter and [36, 64]",
        ),
        (
            fixture("tied"),
            "fused",
            "down_proj.weight is [32, 40] in the adapter and [32, 64]",
        ),
        (
            fixture("tied"),
            "lora-bias",
            "k_proj.bias, which this checkpoint does not have",
        ),
        (fixture("untied"), "saved-embeddings", "no tokenizer.json"),
    ] {
        let error = convert(&base, &[open(adapter, 1.0)], TensorType::F32, &out).unwrap_err();
        assert!(error.to_string().contains(part), "{adapter}: {error}");
        assert!(error.to_string().contains("hint:"), "{adapter}: {error}");
    }
    assert!(!out.exists());
}

#[test]
fn a_gguf_base_takes_adapters_too() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("base.gguf");
    convert(&fixture("tied"), &[], TensorType::F32, &file).unwrap();
    for name in ["head", "embeddings-dora", "tokens", "resized"] {
        let direct = scratch.path().join("direct.gguf");
        let direct = convert(&fixture("tied"), &[open(name, 1.0)], TensorType::F32, &direct).unwrap();
        let through = scratch.path().join("through.gguf");
        let through = convert(&file, &[open(name, 1.0)], TensorType::F32, &through).unwrap();
        assert!(same_tensors(&direct, &through), "{name}");
    }
}

fn same_tensors(a: &Gguf, b: &Gguf) -> bool {
    let data = |gguf: &Gguf| -> Vec<_> {
        let tensors = gguf.tensors().iter();
        tensors
            .map(|tensor| (tensor.name.clone(), gguf.data(tensor).to_vec()))
            .collect()
    };
    data(a) == data(b)
}

/// The logits that a GGUF adapter on the base gives, those of the merged model, and those of the base alone.
fn through_llama_cpp(name: &str, own_scale: f32, scale: f32) -> [Vec<f32>; 3] {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let base = base(name, scratch.path());
    convert(&base, &[], TensorType::F32, &path("base.gguf")).unwrap();
    let merged = [open(name, own_scale * scale)];
    convert(&base, &merged, TensorType::F32, &path("merged.gguf")).unwrap();
    let model = SourceModel::open(&base).unwrap();
    let file = GgufAdapter::new(&open(name, own_scale), &model, TensorType::F32).unwrap();
    file.write(&path("adapter.gguf")).unwrap();
    let prompt = [5, 3, 270, 41, 1, 7, 200];
    [
        logits_with(&path("base.gguf"), Some((&path("adapter.gguf"), scale)), &prompt),
        logits(&path("merged.gguf"), &prompt),
        logits(&path("base.gguf"), &prompt),
    ]
}

#[test]
fn a_gguf_adapter_gives_the_logits_of_the_merged_model() {
    let cases = [
        ("plain", 1.0, 1.0),
        ("plain", 1.0, 0.5),
        ("rslora", 0.25, 3.0),
        ("ends", 1.0, 1.0),
        ("fused", 1.0, -1.0),
    ];
    for (name, own_scale, scale) in cases {
        let [adapted, merged, base] = through_llama_cpp(name, own_scale, scale);
        let largest = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let (off, moved) = (largest(&adapted, &merged), largest(&base, &merged));
        assert!(off < 1e-4, "{name}: logits differ by {off}");
        assert!(
            moved > 0.05,
            "{name}: the adapter moves the logits by {moved} only"
        );
    }
}

#[test]
fn what_a_gguf_adapter_cannot_hold_is_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, part) in [
        ("dora", "lora_magnitude_vector"),
        ("lora-bias", "lora_B.bias"),
        ("bias-all", "k_proj.bias"),
        ("saved-norms", "input_layernorm.weight"),
        ("tokens", "embed_tokens.token_adapter"),
        ("embeddings", "adapts model.embed_tokens"),
        ("head", "lm_head.weight"),
    ] {
        let dir = scratch.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let model = SourceModel::open(&base(name, &dir)).unwrap();
        let error = GgufAdapter::new(&open(name, 1.0), &model, TensorType::F32).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(part) && error.contains("hint:"), "{name}: {error}");
    }
}

#[test]
fn a_gguf_adapter_says_what_it_is_and_whose() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("adapter.gguf");
    let (adapter, base) = (folder("rslora"), fixture("tied"));
    let (adapter, base, file) = (
        adapter.to_str().unwrap(),
        base.to_str().unwrap(),
        out.to_str().unwrap(),
    );
    let arguments = [
        "adapter", adapter, "--base", base, "-o", file, "-t", "F16", "--json",
    ];
    let done = support::pipit_convert(&arguments);
    assert!(done.status.success(), "{}", support::stderr(&done));
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((&report["tensors"], &report["type"]), (&8.into(), &"F16".into()));
    let gguf = Gguf::open(&out).unwrap();
    assert_eq!(gguf.string("general.type").unwrap(), "adapter");
    assert_eq!(gguf.string("general.architecture").unwrap(), "llama");
    assert_eq!(gguf.float("adapter.lora.alpha").unwrap(), 6.0);
    let base_sum = pipit_convert::checksum::sha256(&fixture("tied").join("model.safetensors")).unwrap();
    assert_eq!(gguf.strings("pipit.base.sha256").unwrap(), [base_sum]);
    let b = gguf.tensor("blk.1.attn_k.weight.lora_b").unwrap();
    assert_eq!(
        (b.dimensions.as_slice(), b.kind),
        ([2, 16].as_slice(), TensorType::F16)
    );
    let again = support::pipit_convert(&arguments);
    assert!(support::stderr(&again).contains("--force"));
}
