//! Checkpoints that are quantised already: read exactly as llama.cpp's converter reads them, or refused by name.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use pipit_convert::checkpoint::Checkpoint;
use pipit_convert::gguf::Gguf;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{Copy, fixture};

/// The tied checkpoint with the weights and the configuration of a variant.
fn variant(name: &str) -> Copy {
    let copy = Copy::new();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("quantized").join(name).join(file), copy.file(file)).unwrap();
    }
    copy
}

fn sha256(gguf: &Gguf, name: &str) -> String {
    let sum = Sha256::digest(gguf.data(gguf.tensor(name).unwrap()));
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn eight_bits_with_scales_become_the_numbers_that_llama_cpp_reads() {
    for name in ["fp8-block", "fp8-tensor", "channel", "int8"] {
        let gguf = variant(name).accepted();
        let text = std::fs::read_to_string(fixture("quantized").join(name).join("expected.json")).unwrap();
        let expected: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
        assert_eq!(gguf.tensors().len(), expected.len(), "{name}");
        for (tensor, expected) in expected {
            assert_eq!(sha256(&gguf, &tensor), expected["sha256"], "{name}: {tensor}");
        }
    }
}

#[test]
fn eight_bits_without_scales_are_numbers_as_they_stand() {
    let copy = variant("fp8-tensor");
    let config = |copy: &Copy, edit: fn(&mut Value)| copy.edit("config.json", edit);
    config(&copy, |config| {
        config.as_object_mut().unwrap().remove("quantization_config");
    });
    copy.refused(&["quantised by FP8 in blocks", "_scale_inv", "does not say how"]);
    let bytes = std::fs::read(copy.file("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let plain = tensors
        .tensors()
        .into_iter()
        .filter(|(name, _)| name.ends_with(".weight"));
    let bytes = safetensors::serialize(plain.collect::<Vec<_>>(), None).unwrap();
    std::fs::write(copy.file("model.safetensors"), bytes).unwrap();
    let checkpoint = Checkpoint::open(&copy.dir()).unwrap();
    let weight = checkpoint
        .tensor("model.layers.0.mlp.up_proj.weight")
        .unwrap()
        .to_f32()
        .unwrap();
    assert_eq!(
        weight.iter().fold(0.0f32, |max, value| max.max(value.abs())),
        57344.0
    );
    copy.accepted();
}

#[test]
fn scales_that_are_missing_or_do_not_fit_are_named() {
    let copy = variant("fp8-block");
    copy.edit("config.json", |config| {
        config["quantization_config"]["weight_block_size"] = json!([16, 20]);
    });
    copy.refused(&["_proj.weight_scale_inv", "its shape is", "needs"]);
    let copy = variant("channel");
    copy.edit("config.json", |config| {
        config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": null});
    });
    copy.refused(&["_proj.weight_scale_inv", "is missing", "F8_E4M3"]);
    let copy = variant("int8");
    let mut bytes = std::fs::read(copy.file("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor("model.layers.1.mlp.up_proj.weight_scale").unwrap();
    let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[at..at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(copy.file("model.safetensors"), bytes).unwrap();
    copy.refused(&["model.layers.1.mlp.up_proj.weight_scale", "element 0 is inf"]);
}

#[test]
fn other_quantisations_are_refused_by_name() {
    let tensors =
        json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128});
    for (says, how) in [
        (json!({"quant_method": "gptq", "bits": 4}), "quantised by gptq"),
        (json!({"quant_method": "awq", "bits": 4}), "quantised by awq"),
        (
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
            "quantised by bitsandbytes",
        ),
        (json!({"quant_method": "mxfp4"}), "quantised by mxfp4"),
        (
            json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}),
            "modelopt to NVFP4",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": tensors}}}),
            "format pack-quantized",
        ),
        (json!({"bits": 4}), "a method that is not named"),
    ] {
        let copy = Copy::new();
        copy.edit("config.json", |config| config["quantization_config"] = says);
        copy.refused(&[how, "hint: convert the checkpoint that it was quantised from"]);
    }
    let copy = Copy::new();
    copy.edit("config.json", |config| {
        config["compression_config"] = json!({"quant_method": "awq"});
    });
    copy.refused(&["quantised by awq"]);
}

#[test]
fn a_quantisation_that_no_configuration_mentions_is_told_by_its_tensors() {
    for (tensor, method) in [
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.SCB", "LLM.int8"),
        (
            "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4",
            "bitsandbytes, 4 bits",
        ),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "MXFP4"),
    ] {
        let copy = Copy::new();
        let bytes = std::fs::read(copy.file("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let extra = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![2], &[1, 2]).unwrap();
        let views = tensors.tensors().into_iter().chain([(tensor.to_owned(), extra)]);
        let bytes = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
        std::fs::write(copy.file("model.safetensors"), bytes).unwrap();
        copy.refused(&[method, tensor, "does not say how"]);
    }
}
