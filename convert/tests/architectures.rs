//! Every architecture, on tiny checkpoints that transformers wrote: our GGUF files against convert_hf_to_gguf.py's,
//! their logits in llama.cpp against transformers', and the way back. Made by tests/references/make_architectures.py.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use pipit_convert::arch;
use pipit_convert::checkpoint::TensorFiles;
use pipit_convert::gguf::{Array, Gguf, TensorType, Value};
use pipit_convert::import::import;
use pipit_convert::model::{ModelError, Plan, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::{FileType, QuantizeError, Recipe, dequantize};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use support::architectures::{checkpoint, convert, names};
use support::llama_cpp::logits;
use support::synthetic::{self, SMALL, Shape, Weights};
use support::{fixture, floats};

/// Logits of the order of 1 differ by no more than this from transformers'.
const TOLERANCE: f32 = 1e-4;
/// Where llama.cpp rounds the activation to f16.
const F16_GELU: f32 = 5e-3;

/// Keys that we write and convert_hf_to_gguf.py does not, with the reason.
const ONLY_OURS: &[(&str, &str)] = &[(
    "gemma2.rope.freq_base",
    "10000, which is llama.cpp's default; a checkpoint with another base needs it",
)];

/// What a published model says of itself.
const CARD: &str = r#"---
license: other
license_name: "own: licence"
language: [en, "no"]
pipeline_tag: text-generation
tags: [smart-home]
base_model: [HuggingFaceTB/SmolLM2-135M, {name: Own, version: v2}]
datasets: https://example.org/data
author: Någon
description: "two\nlines"
---
# A model
"#;
const GENERATION: &str = r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05,
    "repetition_penalty": 1.1, "eos_token_id": 2}"#;

fn expected(name: &str) -> Json {
    let path = fixture("architectures").join(name).join("expected.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn strings(json: &Json) -> BTreeMap<String, String> {
    serde_json::from_value(json.clone()).unwrap()
}

fn spelled_tensors(gguf: &Gguf) -> BTreeMap<String, String> {
    let tensors = gguf.tensors().iter();
    tensors
        .map(|tensor| {
            let sum: String = Sha256::digest(gguf.data(tensor))
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            let dimensions: Vec<_> = tensor.dimensions.iter().map(u64::to_string).collect();
            let dimensions = dimensions.join(", ");
            (
                tensor.name.clone(),
                format!("{} [{dimensions}] {}", tensor.kind, &sum[..16]),
            )
        })
        .collect()
}

/// Type and value, but for the tokenizer's and our own keys.
fn spelled_keys(gguf: &Gguf) -> BTreeMap<String, String> {
    let own = |key: &str| key.starts_with("tokenizer.") || key.starts_with("pipit.");
    let keys = gguf.metadata().iter().filter(|(key, _)| !own(key));
    keys.map(|(key, value)| {
        let text = match value {
            Value::U32(v) => format!("UINT32 {v}"),
            Value::I32(v) => format!("INT32 {v}"),
            Value::F32(v) => format!("FLOAT32 {}", json!(f64::from(*v))),
            Value::String(v) => format!("STRING {}", json!(v)),
            Value::Array(Array::I32(v)) => format!("INT32[] {v:?}"),
            Value::Array(Array::String(v)) => format!("STRING[] {v:?}"),
            other => format!("{other:?}"),
        };
        (key.clone(), text)
    })
    .collect()
}

/// Python and Rust spell some floats differently.
fn rust_spelling(text: &str) -> String {
    match text.split_once(' ').unwrap() {
        ("FLOAT32", value) => format!("FLOAT32 {}", json!(value.parse::<f64>().unwrap())),
        _ => text.to_owned(),
    }
}

#[test]
fn every_fixture_belongs_to_an_architecture() {
    let mut known: Vec<_> = names().collect();
    known.push("tokenizer");
    known.sort_unstable();
    assert_eq!(support::names(&fixture("architectures")), known);
}

#[test]
fn tensors_and_keys_are_those_of_convert_hf_to_gguf() {
    let scratch = tempfile::tempdir().unwrap();
    for name in names() {
        let folder = checkpoint(name, scratch.path());
        let expected = expected(name);
        for (kind, theirs) in [
            (TensorType::F32, "f32"),
            (TensorType::F16, "f16"),
            (TensorType::BF16, "bf16"),
            (TensorType::Q8_0, "q8_0"),
        ] {
            // F16 and Q8_0 for a few only.
            if expected["tensors"][theirs].is_null() {
                assert!(theirs == "f16" || theirs == "q8_0");
                continue;
            }
            let gguf = convert(&folder, kind, &scratch.path().join("gguf")).unwrap();
            assert_eq!(
                spelled_tensors(&gguf),
                strings(&expected["tensors"][theirs]),
                "{name} as {kind}"
            );
            if kind == TensorType::BF16 {
                let mut ours = spelled_keys(&gguf);
                let theirs: BTreeMap<_, _> = strings(&expected["keys"])
                    .into_iter()
                    .map(|(key, text)| (key, rust_spelling(&text)))
                    .collect();
                ours.retain(|key, _| {
                    theirs.contains_key(key) || !ONLY_OURS.iter().any(|(known, _)| known == key)
                });
                assert_eq!(ours, theirs, "{name}");
            }
        }
    }
}

#[test]
fn logits_in_llama_cpp_are_those_of_transformers() {
    let scratch = tempfile::tempdir().unwrap();
    for name in names() {
        let folder = checkpoint(name, scratch.path());
        let path = scratch.path().join("f32.gguf");
        convert(&folder, TensorType::F32, &path).unwrap();
        let reference = fixture("architectures").join(name).join("logits.safetensors");
        let reference = TensorFiles::open(&reference).unwrap();
        let prompt: Vec<i32> = reference
            .tensor("prompt")
            .unwrap()
            .bytes
            .chunks_exact(4)
            .map(|bytes| i32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        let ours = logits(&path, &prompt);
        let difference = |theirs: &str| {
            let theirs = reference.tensor(theirs).unwrap().to_f32().unwrap();
            let columns = theirs.len() / prompt.len();
            let vocabulary = ours.len() / prompt.len();
            let step = vocabulary / columns;
            let rows = ours.chunks_exact(vocabulary).zip(theirs.chunks_exact(columns));
            rows.flat_map(|(ours, theirs)| {
                theirs
                    .iter()
                    .enumerate()
                    .map(|(at, b)| (ours[at * step] - b).abs())
            })
            .fold(0.0, f32::max)
        };
        let largest = difference("logits");
        println!("{name}: {largest:.1e}");
        if reference.contains("logits_f16_gelu") {
            // llama.cpp reads GELU from a table of f16. With the same rounding transformers comes closer: what is
            // left are sums that fall on the other side of a rounding.
            let rounded = difference("logits_f16_gelu");
            println!("{name}: {rounded:.1e} with GELU rounded as in llama.cpp");
            assert!(
                largest < F16_GELU && rounded < F16_GELU / 5.0,
                "{name}: {largest} {rounded}"
            );
        } else {
            assert!(largest < TOLERANCE, "{name}: {largest}");
        }
    }
}

/// A GGUF file becomes a checkpoint, and that the same GGUF file again.
#[test]
fn imported_and_converted_again_nothing_changes() {
    let scratch = tempfile::tempdir().unwrap();
    for name in names() {
        let folder = checkpoint(name, scratch.path());
        std::fs::write(folder.join("README.md"), CARD).unwrap();
        std::fs::write(folder.join("generation_config.json"), GENERATION).unwrap();
        for kind in [TensorType::F32, TensorType::BF16, TensorType::Q8_0] {
            let (file, again) = (scratch.path().join("a.gguf"), scratch.path().join("b.gguf"));
            let original = convert(&folder, kind, &file).unwrap();
            let imported = scratch.path().join("imported").join(name);
            std::fs::create_dir_all(imported.parent().unwrap()).unwrap();
            import(&original, &imported, TensorType::F32, &Silent).unwrap();
            let back = convert(&imported, TensorType::F32, &again).unwrap();
            assert_eq!(back.tensors().len(), original.tensors().len(), "{name}");
            for tensor in original.tensors() {
                let mut values = vec![0.0; tensor.elements() as usize];
                let row = tensor.row_elements() as usize;
                dequantize(tensor.kind, original.data(tensor), row, &mut values).unwrap();
                assert!(
                    values == floats(&back, &tensor.name),
                    "{name} as {kind}: {} changed",
                    tensor.name
                );
            }
            let (mut before, mut after) = (spelled_keys(&original), spelled_keys(&back));
            for keys in [&mut before, &mut after] {
                keys.remove("general.file_type");
            }
            assert!(before.contains_key("general.base_model.1.version"), "{before:?}");
            assert!(
                before.contains_key("general.sampling.penalty_repeat"),
                "{before:?}"
            );
            assert_eq!(after, before, "{name} as {kind}");
            // Without the folder between them.
            let direct = convert(&file, TensorType::F32, &scratch.path().join("c.gguf")).unwrap();
            assert_eq!(
                spelled_tensors(&direct),
                spelled_tensors(&back),
                "{name} as {kind}"
            );
            assert_eq!(spelled_keys(&direct), spelled_keys(&back), "{name} as {kind}");
            std::fs::remove_dir_all(&imported).unwrap();
        }
    }
}

/// Before transformers 5, the rotation had other names, and what follows from other keys was not written.
#[test]
fn configurations_of_older_transformers_mean_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, gone, old) in [
        (
            "gemma3-linear",
            &["rope_parameters", "layer_types", "tie_word_embeddings"][..],
            json!({"rope_theta": 1e6, "rope_local_base_freq": 3000.0, "sliding_window_pattern": 6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ),
        (
            "gemma2",
            &["rope_parameters", "layer_types", "tie_word_embeddings"],
            json!({"rope_theta": 10000.0}),
        ),
        (
            "llama-factors",
            &["rope_parameters"],
            json!({"rope_theta": 5000.0, "rope_scaling": {"type": "llama3", "factor": 6.0, "low_freq_factor": 2.0,
                "high_freq_factor": 5.0, "original_max_position_embeddings": 96}}),
        ),
        (
            "llama-linear",
            &["rope_parameters", "head_dim"],
            json!({"rope_scaling": {"type": "linear", "factor": 2.5}}),
        ),
        (
            "mistral",
            &["rope_parameters"],
            json!({"rope_theta": 5000.0, "rope_scaling": null}),
        ),
        (
            "qwen2-yarn",
            &["rope_parameters", "tie_word_embeddings"],
            json!({"rope_theta": 20000.0, "rope_scaling":
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
        ),
        (
            "lfm2",
            &[
                "rope_parameters",
                "layer_types",
                "intermediate_size",
                "tie_word_embeddings",
            ],
            json!({"rope_theta": 5000.0, "block_ff_dim": 60, "full_attn_idxs": [2, 4], "tie_embedding": true}),
        ),
        (
            "smollm3",
            &["rope_parameters", "no_rope_layers", "layer_types"],
            json!({"rope_theta": 5000.0}),
        ),
        (
            "phi-long",
            &["rope_parameters"],
            json!({"rope_theta": 10000.0, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "su",
                "short_factor": [1.0, 1.05, 1.1, 1.15, 1.2, 1.25],
                "long_factor": [1.5, 2.2, 4.3, 7.8, 12.7, 19.0]}}),
        ),
    ] {
        let folder = checkpoint(name, scratch.path());
        let path = folder.join("config.json");
        let new = convert(&folder, TensorType::F32, &scratch.path().join("new")).unwrap();
        let mut config: Json = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let config = config.as_object_mut().unwrap();
        gone.iter().for_each(|key| drop(config.remove(*key)));
        config.extend(old.as_object().unwrap().clone());
        std::fs::write(&path, serde_json::to_string(config).unwrap()).unwrap();
        let old = convert(&folder, TensorType::F32, &scratch.path().join("old")).unwrap();
        assert_eq!(spelled_keys(&old), spelled_keys(&new), "{name}");
        assert_eq!(spelled_tensors(&old), spelled_tensors(&new), "{name}");
    }
}

/// convert_hf_to_gguf.py cuts the rows away and leaves the tokens that it filled up: llama.cpp does not load that file.
#[test]
fn rows_of_the_embeddings_without_a_token_are_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = checkpoint("gemma3", scratch.path());
    let plain = scratch.path().join("plain.gguf");
    convert(&folder, TensorType::F32, &plain).unwrap();
    let config = folder.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(
        &config,
        text.replace("\"vocab_size\": 280", "\"vocab_size\": 296"),
    )
    .unwrap();
    let weights = folder.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: BTreeMap<_, _> = file.tensors().into_iter().collect();
    let name = "model.embed_tokens.weight";
    let embeddings = tensors[name].clone();
    let columns = embeddings.shape()[1];
    let mut rows = embeddings.data().to_vec();
    rows.extend_from_within(..16 * 2 * columns);
    let padded = TensorView::new(embeddings.dtype(), vec![296, columns], &rows).unwrap();
    tensors.insert(name.into(), padded);
    std::fs::write(&weights, safetensors::serialize(&tensors, None).unwrap()).unwrap();
    let padded = scratch.path().join("padded.gguf");
    let gguf = convert(&folder, TensorType::F32, &padded).unwrap();
    assert_eq!(gguf.tensor("token_embd.weight").unwrap().rows(), 296);
    assert_eq!(gguf.strings("tokenizer.ggml.tokens").unwrap().len(), 296);
    let prompt = [5, 6, 7, 200];
    let (plain, padded) = (logits(&plain, &prompt), logits(&padded, &prompt));
    for (plain, padded) in plain.chunks_exact(280).zip(padded.chunks_exact(296)) {
        assert_eq!(plain, &padded[..280]);
        assert_eq!(plain[..16], padded[280..]);
    }
}

/// Of every type that needs no importance matrix.
#[test]
fn a_file_of_any_type_is_imported_as_llama_cpp_reads_it() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("synthetic");
    std::fs::create_dir(&folder).unwrap();
    let shape = Shape {
        hidden: 256,
        feed_forward: 256,
        head_dim: 128,
        layers: 1,
        ..SMALL
    };
    synthetic::checkpoint(&folder, &shape, Weights::Trained);
    let mut model = SourceModel::open(&folder).unwrap();
    model.skip_tokenizer_proof();
    let mut seen = BTreeSet::new();
    for file in FileType::ALL {
        let path = scratch.path().join("quantised.gguf");
        let recipe = Recipe::new(*file);
        match Plan::new(&model, &[], &recipe) {
            Ok(plan) => drop(plan.write(&path, None, &Silent).unwrap()),
            Err(ModelError::Quantize {
                source: QuantizeError::NeedsImatrix { .. },
                ..
            }) => continue,
            Err(other) => panic!("{}: {other}", file.name()),
        }
        let original = Gguf::open(&path).unwrap();
        let imported = scratch.path().join("imported");
        import(&original, &imported, TensorType::F32, &Silent).unwrap();
        let weights = TensorFiles::open(&imported.join("model.safetensors")).unwrap();
        for rule in (arch::llama::LLAMA.tensors)(model.config()).unwrap() {
            let tensor = original.tensor(&rule.gguf).unwrap();
            seen.insert(tensor.kind.name());
            let (rows, columns) = rule.rows_and_columns();
            let mut values = vec![0.0; rows * columns];
            dequantize(tensor.kind, original.data(tensor), columns, &mut values).unwrap();
            let ours = weights.tensor(&rule.hf).unwrap().to_f32().unwrap();
            for (row, values) in values.chunks_exact(columns).enumerate() {
                let at = rule.rows.to_hf(row) * columns;
                assert_eq!(ours[at..at + columns], *values, "{}: {}", file.name(), rule.hf);
            }
        }
        std::fs::remove_dir_all(&imported).unwrap();
    }
    for kind in [
        "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    ] {
        assert!(seen.contains(kind), "{kind} is not among {seen:?}");
    }
    println!("{seen:?}");
}

/// Configurations of published models (without what does not concern the weights), and the number of parameters that
/// each is known to have. Both were written down from memory: a slip in either would have to fit the other.
#[test]
fn published_models_have_as_many_parameters_as_their_table() {
    let models: Vec<Json> =
        serde_json::from_str(&std::fs::read_to_string(fixture("published.json")).unwrap()).unwrap();
    let mut seen = BTreeSet::new();
    for model in &models {
        let config = model["config"].as_object().unwrap();
        let arch = arch::of_config(config).unwrap();
        let rules = (arch.tensors)(config).unwrap();
        let parameters: usize = rules
            .iter()
            .map(|rule| rule.shape.iter().product::<usize>())
            .sum();
        assert_eq!(model["parameters"], parameters, "{}", model["name"]);
        assert!((arch.metadata)(config).unwrap().len() >= 8, "{}", model["name"]);
        seen.insert(arch.name);
    }
    assert_eq!(seen.len(), arch::ALL.len());
}
