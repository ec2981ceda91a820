//! What every architecture refuses: tensors that are missing or unknown, configurations that llama.cpp does not follow,
//! and keys of a GGUF file that mean another model.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use pipit_convert::gguf::{Array, Gguf, Header, TensorPlan, TensorType, Value, Writer};
use pipit_convert::import::import;
use pipit_convert::progress::Silent;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};
use support::architectures::{checkpoint, convert, names};

/// What converting a changed copy of a fixture says.
fn refused(name: &str, change: impl FnOnce(&Path)) -> String {
    let scratch = tempfile::tempdir().unwrap();
    let folder = checkpoint(name, scratch.path());
    change(&folder);
    let out = scratch.path().join("out.gguf");
    let error = convert(&folder, TensorType::F32, &out)
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
        (
            "lfm2",
            json!({"block_ffn_dim_multiplier": i64::MAX}),
            ["block_ffn_dim_multiplier", "in multiples of"],
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

/// The GGUF file of a fixture with another value for a key.
fn with_key(name: &str, key: &str, value: Value, scratch: &Path) -> Gguf {
    let whole = checkpoint(name, scratch);
    let gguf = convert(&whole, TensorType::F32, &scratch.join("a.gguf")).unwrap();
    std::fs::remove_dir_all(&whole).unwrap();
    let others = gguf.metadata().iter().filter(|(old, _)| old != key);
    let mut metadata: Vec<_> = others.cloned().collect();
    metadata.push((key.into(), value));
    let tensors = gguf.tensors().iter().map(|tensor| TensorPlan {
        name: tensor.name.clone(),
        dimensions: tensor.dimensions.clone(),
        kind: tensor.kind,
    });
    let header = Header {
        metadata,
        tensors: tensors.collect(),
    };
    let changed = scratch.join("changed.gguf");
    let mut writer = Writer::new(std::fs::File::create(&changed).unwrap(), &header).unwrap();
    for tensor in gguf.tensors() {
        writer.append(&tensor.name, gguf.data(tensor)).unwrap();
    }
    writer.finish().unwrap();
    Gguf::open(&changed).unwrap()
}

#[test]
fn keys_of_a_gguf_file_that_mean_another_model_are_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, key, value, parts) in [
        (
            "mistral",
            "llama.attention.causal",
            Value::Bool(false),
            ["llama.attention.causal", "may change"],
        ),
        (
            "granite",
            "granite.rope.scaling.finetuned",
            Value::Bool(false),
            ["granite.rope.scaling.finetuned", "may change"],
        ),
        (
            "mistral",
            "llama.attention.scale",
            Value::F32(0.5),
            ["llama.attention.scale", "may change"],
        ),
        (
            "mistral",
            "llama.vocab_size",
            Value::U32(5),
            ["llama.vocab_size", "means U32(280)"],
        ),
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
        let changed = with_key(name, key, value, scratch.path());
        let out = scratch.path().join("imported");
        let error = import(&changed, &out, TensorType::F32, &Silent);
        let error = error.expect_err(key).to_string();
        for part in parts {
            assert!(
                error.contains(part),
                "{name} with {key}: {part} is not in {error}"
            );
        }
        assert!(!out.exists());
    }
}

#[test]
fn keys_that_change_nothing_are_no_obstacle() {
    let scratch = tempfile::tempdir().unwrap();
    for (key, value) in [
        ("attention.key_length", Value::U32(8)),
        ("rope.dimension_count", Value::U32(8)),
        ("vocab_size", Value::U32(280)),
        ("attention.causal", Value::Bool(true)),
        ("rope.scaling.type", "none".into()),
        ("rope.scaling.factor", Value::F32(1.0)),
        ("rope.scaling.finetuned", Value::Bool(false)),
        ("expert_count", Value::U32(0)),
        ("attention.head_count_kv", Value::Array(Array::I32(vec![2, 2]))),
        ("tensor_data_layout", "something for people".into()),
    ] {
        let file = with_key("qwen2", &format!("qwen2.{key}"), value, scratch.path());
        let out = scratch.path().join("imported");
        import(&file, &out, TensorType::F32, &Silent).expect(key);
        std::fs::remove_dir_all(&out).unwrap();
    }
}
