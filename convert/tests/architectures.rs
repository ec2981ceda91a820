//! Every architecture, on tiny checkpoints that transformers wrote: our GGUF files against convert_hf_to_gguf.py's,
//! their logits in llama.cpp against transformers', and the way back. Made by tests/references/make_architectures.py.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pipit_convert::arch;
use pipit_convert::checkpoint::TensorFiles;
use pipit_convert::gguf::{Array, Gguf, Header, TensorPlan, TensorType, Value, Writer};
use pipit_convert::import::import;
use pipit_convert::progress::Silent;
use pipit_convert::quantize::dequantize;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use support::llama_cpp::logits;
use support::{convert, fixture, floats};

/// Logits of the order of 1 differ by no more than this from transformers'.
const TOLERANCE: f32 = 1e-4;
/// Where llama.cpp rounds the activation to f16.
const F16_GELU: f32 = 5e-3;

/// Keys that we write and convert_hf_to_gguf.py does not, with the reason.
const ONLY_OURS: &[(&str, &str)] = &[(
    "gemma2.rope.freq_base",
    "10000, which is llama.cpp's default; a checkpoint with another base needs it",
)];

fn names() -> impl Iterator<Item = &'static str> {
    arch::ALL.iter().flat_map(|arch| arch.fixtures).copied()
}

/// The checkpoint with the tokenizer that all share, in a folder of its name.
fn checkpoint(name: &str, scratch: &Path) -> PathBuf {
    let whole = scratch.join(name);
    std::fs::create_dir(&whole).unwrap();
    for from in ["architectures/tokenizer", &format!("architectures/{name}")] {
        for entry in std::fs::read_dir(fixture(from)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, whole.join(path.file_name().unwrap())).unwrap();
        }
    }
    for ours in ["expected.json", "logits.safetensors"] {
        std::fs::remove_file(whole.join(ours)).unwrap();
    }
    whole
}

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
        for (kind, theirs) in [(TensorType::F32, "f32"), (TensorType::BF16, "bf16")] {
            let gguf = convert(&folder, &[], kind, &scratch.path().join("gguf")).unwrap();
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
        convert(&folder, &[], TensorType::F32, &path).unwrap();
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
        for kind in [TensorType::F32, TensorType::BF16, TensorType::Q8_0] {
            let (file, again) = (scratch.path().join("a.gguf"), scratch.path().join("b.gguf"));
            let original = convert(&folder, &[], kind, &file).unwrap();
            let imported = scratch.path().join("imported").join(name);
            std::fs::create_dir_all(imported.parent().unwrap()).unwrap();
            import(&original, &imported, TensorType::F32, &Silent).unwrap();
            let back = convert(&imported, &[], TensorType::F32, &again).unwrap();
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
            assert_eq!(after, before, "{name} as {kind}");
            // Without the folder between them.
            let direct = convert(&file, &[], TensorType::F32, &scratch.path().join("c.gguf")).unwrap();
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

/// What converting a changed copy of a fixture says.
fn refused(name: &str, change: impl FnOnce(&Path)) -> String {
    let scratch = tempfile::tempdir().unwrap();
    let folder = checkpoint(name, scratch.path());
    change(&folder);
    let out = scratch.path().join("out.gguf");
    let error = convert(&folder, &[], TensorType::F32, &out)
        .expect_err(name)
        .to_string();
    assert!(!out.exists());
    error
}

#[test]
fn a_tensor_more_or_less_is_named() {
    for name in names() {
        let rewrite = |edit: fn(&mut BTreeMap<String, TensorView<'_>>)| {
            refused(name, |folder| {
                let path = folder.join("model.safetensors");
                let bytes = std::fs::read(&path).unwrap();
                let file = SafeTensors::deserialize(&bytes).unwrap();
                let mut tensors: BTreeMap<_, _> = file.tensors().into_iter().collect();
                edit(&mut tensors);
                std::fs::write(&path, safetensors::serialize(&tensors, None).unwrap()).unwrap();
            })
        };
        let more = rewrite(|tensors| {
            let copy = tensors["model.embed_tokens.weight"].clone();
            tensors.insert("model.layers.0.extra.weight".into(), copy.clone());
            tensors.insert("model.layers.1.extra.bias".into(), copy);
        });
        for part in [
            "model.layers.0.extra.weight, model.layers.1.extra.bias",
            "does not have",
        ] {
            assert!(more.contains(part), "{name}: {more}");
        }
        let less = rewrite(|tensors| {
            let last: Vec<_> = tensors
                .keys()
                .filter(|key| key.contains(".1."))
                .cloned()
                .collect();
            last.iter().for_each(|key| drop(tensors.remove(key)));
        });
        assert!(less.contains("lacks tensors that"), "{name}: {less}");
        assert!(less.contains("model.layers.1."), "{name}: {less}");
    }
}

#[test]
fn what_llama_cpp_does_not_do_is_refused_by_name() {
    let rope = |own: Json| json!({"rope_parameters": own});
    let yarn = |key: &str, value: Json| {
        let mut own = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
        own[key] = value;
        json!({"rope_parameters": own})
    };
    for (name, change, parts) in [
        ("mistral", json!({"hidden_act": "gelu"}), ["hidden_act", "silu"]),
        ("mistral", json!({"head_dim": 7}), ["head_dim", "even"]),
        (
            "mistral",
            json!({"num_key_value_heads": 3}),
            ["num_key_value_heads", "divide"],
        ),
        (
            "mistral",
            json!({"num_hidden_layers": 1_000_000}),
            ["num_hidden_layers", "4096"],
        ),
        (
            "mistral",
            json!({"partial_rotary_factor": 0.5}),
            ["partial_rotary_factor", "whole heads"],
        ),
        (
            "mistral",
            json!({"text_config": {}}),
            ["text_config", "only text"],
        ),
        (
            "mistral",
            json!({"architectures": ["OlmoeForCausalLM"]}),
            ["OlmoeForCausalLM", "built so far"],
        ),
        (
            "mistral",
            rope(json!({"rope_type": "dynamic", "factor": 2.0})),
            ["dynamic", "linear, yarn, llama3"],
        ),
        (
            "mistral",
            yarn("attention_factor", json!(1.5)),
            ["attention_factor", "llama.cpp takes"],
        ),
        ("mistral", yarn("mscale", json!(1.0)), ["mscale", "not built"]),
        (
            "mistral",
            yarn("truncate", json!(false)),
            ["truncate", "llama.cpp truncates"],
        ),
        (
            "mistral",
            yarn("factor", Json::Null),
            ["yarn", "without a factor"],
        ),
        (
            "qwen2",
            rope(json!({"rope_type": "llama3", "factor": 8.0})),
            ["llama3", "default, linear, yarn"],
        ),
        (
            "qwen2",
            json!({"head_dim": 16}),
            ["head_dim", "hidden_size / num_attention_heads"],
        ),
        (
            "qwen3",
            json!({"attention_bias": true}),
            ["attention_bias", "llama.cpp does not know"],
        ),
        (
            "gemma2",
            json!({"tie_word_embeddings": false}),
            ["tie_word_embeddings", "no output matrix"],
        ),
        (
            "gemma2",
            json!({"attn_logit_softcapping": null}),
            ["attn_logit_softcapping", "always caps"],
        ),
        (
            "gemma2",
            json!({"query_pre_attn_scalar": 144}),
            ["query_pre_attn_scalar", "12"],
        ),
        (
            "gemma2",
            json!({"layer_types": ["full_attention"]}),
            ["layer_types", "order of windows"],
        ),
        (
            "gemma2",
            json!({"hidden_activation": "relu"}),
            ["hidden_activation", "gelu_pytorch_tanh"],
        ),
        (
            "gemma3",
            json!({"attn_logit_softcapping": 50.0}),
            ["attn_logit_softcapping", "does not cap"],
        ),
        (
            "gemma3",
            json!({"_sliding_window_pattern": 4}),
            ["_sliding_window_pattern", "6"],
        ),
        (
            "gemma3",
            json!({"use_bidirectional_attention": true}),
            ["use_bidirectional_attention", "llama.cpp"],
        ),
        (
            "phi-long",
            json!({"num_attention_heads": 1}),
            ["short_factor", "12 are needed"],
        ),
        (
            "smollm3",
            json!({"no_rope_layers": [1, 1, 0, 1, 1]}),
            ["no_rope_layers", "every 4th"],
        ),
        (
            "smollm3",
            json!({"mlp_bias": true}),
            ["mlp_bias", "llama.cpp does not know"],
        ),
        (
            "granite",
            json!({"residual_multiplier": 0.0}),
            ["residual_multiplier", "is 0"],
        ),
        (
            "olmo2",
            json!({"tie_word_embeddings": true}),
            ["tie_word_embeddings", "needs an output matrix"],
        ),
        (
            "lfm2",
            json!({"conv_bias": true}),
            ["conv_bias", "llama.cpp does not know"],
        ),
        ("lfm2", json!({"layer_types": ["moe"]}), ["layer_types", "moe"]),
        (
            "lfm2",
            json!({"block_ffn_dim_multiplier": -1.0}),
            ["block_ffn_dim_multiplier", "length 0"],
        ),
    ] {
        let error = refused(name, |folder| {
            let path = folder.join("config.json");
            let mut config: Json = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            for (key, value) in change.as_object().unwrap() {
                config[key] = value.clone();
            }
            std::fs::write(&path, config.to_string()).unwrap();
        });
        for part in parts {
            assert!(
                error.contains(part),
                "{name} with {change}: {part} is not in {error}"
            );
        }
    }
}

#[test]
fn keys_of_a_gguf_file_that_mean_another_model_are_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, key, value, parts) in [
        (
            "mistral",
            "llama.expert_count",
            Value::U32(8),
            ["mixture of experts", "not built"],
        ),
        (
            "mistral",
            "llama.rope.scaling.type",
            "longrope".into(),
            ["llama.rope.scaling.type", "longrope"],
        ),
        (
            "mistral",
            "llama.rope.dimension_count",
            Value::U32(6),
            ["llama.rope.dimension_count", "differs"],
        ),
        (
            "mistral",
            "llama.attention.value_length",
            Value::U32(6),
            ["value_length", "differs"],
        ),
        (
            "mistral",
            "llama.attention.head_count",
            Value::U32(0),
            ["head_count", "is 0"],
        ),
        (
            "mistral",
            "llama.block_count",
            Value::U32(3),
            ["has no tensor", "blk.2."],
        ),
        (
            "mistral",
            "llama.block_count",
            Value::U32(1),
            ["does not have", "blk.1."],
        ),
        (
            "llama-factors",
            "llama.rope.freq_base",
            Value::F32(1.0),
            ["rope_freqs.weight", "no constants"],
        ),
        (
            "olmo2",
            "olmo2.attention.sliding_window",
            Value::U32(8),
            ["sliding_window", "OLMo 3"],
        ),
        (
            "lfm2",
            "lfm2.attention.head_count_kv",
            Value::Array(Array::I32(vec![0, 2])),
            ["head_count_kv", "every layer"],
        ),
        (
            "lfm2",
            "lfm2.attention.head_count_kv",
            Value::Array(Array::I32(vec![-1; 5])),
            ["head_count_kv", "negative"],
        ),
    ] {
        let whole = checkpoint(name, scratch.path());
        let gguf = convert(&whole, &[], TensorType::F32, &scratch.path().join("a.gguf")).unwrap();
        let changed = scratch.path().join("changed.gguf");
        let mut metadata: Vec<_> = gguf
            .metadata()
            .iter()
            .filter(|(old, _)| old != key)
            .cloned()
            .collect();
        metadata.push((key.into(), value));
        let tensors = gguf.tensors().iter();
        let header = Header {
            metadata,
            tensors: tensors
                .map(|tensor| TensorPlan {
                    name: tensor.name.clone(),
                    dimensions: tensor.dimensions.clone(),
                    kind: tensor.kind,
                })
                .collect(),
        };
        let mut writer = Writer::new(std::fs::File::create(&changed).unwrap(), &header).unwrap();
        for tensor in gguf.tensors() {
            writer.append(&tensor.name, gguf.data(tensor)).unwrap();
        }
        writer.finish().unwrap();
        let out = scratch.path().join("imported");
        let error = import(&Gguf::open(&changed).unwrap(), &out, TensorType::F32, &Silent);
        let error = error.expect_err(key).to_string();
        for part in parts {
            assert!(
                error.contains(part),
                "{name} with {key}: {part} is not in {error}"
            );
        }
        assert!(!out.exists());
        std::fs::remove_dir_all(&whole).unwrap();
    }
}
