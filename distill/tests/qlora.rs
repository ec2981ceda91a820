//! Training over quantised bases: NF4 and the blocks of GGUF files, on tiny models that fit in their blocks.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use pipit_convert::gguf::{Gguf, TensorType};
use pipit_convert::import::import;
use pipit_convert::model::{Plan, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::{FileType, Recipe};
use pipit_distill::adapter::{LoraOptions, lora};
use pipit_distill::batch::Batch;
use pipit_distill::model::{Keep, Mode, Model, ModelError};
use pipit_distill::optimizer::{AdamW, AdamWOptions};
use pipit_distill::random::Random;
use safetensors::tensor::{Dtype, TensorView};

const TRAIN: Mode = Mode {
    gradient: true,
    dropout_seed: None,
};
const NF4: Keep = Keep::Nf4 { double_quant: true };
const VOCABULARY: usize = 280;
const WIDTH: usize = 256;

/// A random llama whose rows are whole k-quant blocks, with the tokenizer of convert's fixtures, in bf16.
fn checkpoint(scratch: &Path) -> PathBuf {
    let folder = scratch.join("base");
    std::fs::create_dir(&folder).unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "rope_theta": 10000.0,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tokenizer =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../convert/tests/fixtures/architectures/tokenizer");
    for entry in std::fs::read_dir(tokenizer).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let mut random = Random::new(3, "tiny llama");
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, WIDTH])];
    for layer in 0..2 {
        for (part, shape) in [
            ("input_layernorm", vec![WIDTH]),
            ("self_attn.q_proj", vec![WIDTH, WIDTH]),
            ("self_attn.k_proj", vec![WIDTH / 2, WIDTH]),
            ("self_attn.v_proj", vec![WIDTH / 2, WIDTH]),
            ("self_attn.o_proj", vec![WIDTH, WIDTH]),
            ("post_attention_layernorm", vec![WIDTH]),
            ("mlp.gate_proj", vec![512, WIDTH]),
            ("mlp.up_proj", vec![512, WIDTH]),
            ("mlp.down_proj", vec![WIDTH, 512]),
        ] {
            tensors.push((format!("model.layers.{layer}.{part}.weight"), shape));
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![WIDTH]));
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape)| {
            let norm = shape.len() == 1;
            let bytes = (0..shape.iter().product())
                .flat_map(|_| {
                    let x = (random.uniform() - 0.5) * 0.2 + if norm { 1.0 } else { 0.0 };
                    // The upper half of an f32 is a bf16.
                    ((x as f32).to_bits() >> 16).to_le_bytes()[..2].to_vec()
                })
                .collect();
            (name, shape, bytes)
        })
        .collect();
    let views = data
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
    folder
}

/// The checkpoint as a GGUF file of this type, and that file as a checkpoint of f32.
fn quantized(folder: &Path, kind: &str, scratch: &Path) -> (PathBuf, PathBuf) {
    let (file, back) = (scratch.join(format!("{kind}.gguf")), scratch.join(kind));
    let mut model = SourceModel::open(folder).unwrap();
    model.skip_tokenizer_proof();
    let recipe = Recipe::new(FileType::from_name(kind).unwrap());
    let plan = Plan::new(&model, &[], &recipe).unwrap();
    plan.write(&file, None, &Silent).unwrap();
    import(&Gguf::open(&file).unwrap(), &back, TensorType::F32, &Silent).unwrap();
    (file, back)
}

/// Puts an adapter on every linear layer; `random` fills B too, so that A has a gradient at once.
fn with_adapter(mut model: Model, r: usize, fill: bool) -> Model {
    let options = LoraOptions {
        r,
        lora_alpha: 2.0 * r as f64,
        ..LoraOptions::default()
    };
    lora::add(&mut model, &options, "base", &mut Random::new(0, "adapter")).unwrap();
    let mut random = Random::new(1, "B");
    for (name, var) in model.trained() {
        if fill && name.ends_with("lora_B.weight") {
            let values: Vec<f32> = (0..var.elem_count())
                .map(|_| (random.uniform() - 0.5) as f32 * 0.1)
                .collect();
            var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu).unwrap())
                .unwrap();
        }
    }
    model
}

/// Eight sequences of random tokens, all of them trained on.
fn batch() -> Batch {
    let mut random = Random::new(5, "samples");
    let samples: Vec<(Vec<u32>, Vec<i64>)> = (0..8)
        .map(|sample| {
            // The first token tells the samples apart.
            let mut ids = vec![3 + sample];
            ids.extend((0..9).map(|_| 3 + random.below(VOCABULARY - 3) as u32));
            let labels = ids.iter().map(|id| i64::from(*id)).collect();
            (ids, labels)
        })
        .collect();
    Batch::new(
        samples
            .iter()
            .map(|(ids, labels)| (ids.as_slice(), labels.as_slice())),
    )
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, relative to the largest entry.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    assert!(largest > 0.0);
    a.iter().zip(b).fold(0.0f32, |max, (a, b)| max.max((a - b).abs())) / largest
}

#[test]
fn a_gguf_file_trains_as_the_checkpoint_of_its_numbers() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = checkpoint(scratch.path());
    let batch = batch();
    for kind in [
        "Q4_0", "Q4_1", "Q8_0", "Q4_K_M", "Q3_K_M", "IQ4_NL", "IQ4_XS", "BF16",
    ] {
        let (file, back) = quantized(&folder, kind, scratch.path());
        let blocks = with_adapter(Model::open(&file, false).unwrap(), 4, true);
        let numbers = with_adapter(Model::open(&back, false).unwrap(), 4, true);
        assert_eq!(blocks.parameters(), numbers.parameters(), "{kind}");
        let hidden = |model: &Model| model.hidden(&batch, Mode::INFERENCE).unwrap();
        let logits = |model: &Model| floats(&model.logits(&hidden(model)).unwrap());
        let worst = difference(&logits(&blocks), &logits(&numbers));
        assert!(worst < 1e-5, "{kind}: logits differ by {worst}");
        let gradients = |model: &Model| {
            let grads = model.loss_sum(&batch, TRAIN, 16).unwrap().backward().unwrap();
            let trained = model.trained();
            let named = trained
                .iter()
                .map(|(name, var)| (name.to_string(), floats(grads.get(var).unwrap())));
            named.collect::<Vec<_>>()
        };
        for ((name, ours), (_, theirs)) in gradients(&blocks).iter().zip(gradients(&numbers)) {
            let worst = difference(ours, &theirs);
            assert!(worst < 1e-4, "{kind}: the gradient of {name} differs by {worst}");
        }
    }
}

/// Eight samples by heart: the loss in nats a token after some steps.
fn overfit(model: &Model) -> f64 {
    let batch = batch();
    let options = AdamWOptions {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.0,
    };
    let trained = model.trained();
    let mut optimizer = AdamW::new(trained.iter().map(|(_, var)| (*var).clone()), options);
    let count = batch.trained_tokens() as f64;
    for _ in 0..120 {
        let grads = model.loss_sum(&batch, TRAIN, 64).unwrap().backward().unwrap();
        let gradients: Vec<Tensor> = trained
            .iter()
            .map(|(_, var)| grads.get(var).unwrap().clone())
            .collect();
        optimizer.step(&gradients, 5e-3, 1.0 / count).unwrap();
    }
    let loss = model.loss_sum(&batch, Mode::INFERENCE, 64).unwrap();
    f64::from(loss.to_scalar::<f32>().unwrap()) / count
}

#[test]
fn eight_samples_are_learnt_by_heart_over_nf4_and_over_a_gguf_file() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = checkpoint(scratch.path());
    let (file, _) = quantized(&folder, "Q4_K_M", scratch.path());
    for (name, model) in [
        ("NF4", Model::open_as(&folder, NF4).unwrap()),
        ("Q4_K_M", Model::open(&file, false).unwrap()),
    ] {
        let loss = overfit(&with_adapter(model, 16, false));
        assert!(loss < 0.05, "{name}: {loss} nats a token");
    }
}

#[test]
fn nf4_keeps_the_model_within_its_rounding_and_in_an_eighth_of_the_room() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = checkpoint(scratch.path());
    let (nf4, f32) = (
        Model::open_as(&folder, NF4).unwrap(),
        Model::open(&folder, false).unwrap(),
    );
    assert_eq!(nf4.parameters(), f32.parameters());
    let bytes: usize = nf4.linears().map(|linear| linear.weight.bytes()).sum();
    let elements: usize = nf4
        .linears()
        .map(|linear| linear.weight.dims().iter().product::<usize>())
        .sum();
    assert!(
        (bytes as f64 * 8.0 / elements as f64 - 4.127).abs() < 0.01,
        "{bytes} bytes for {elements}"
    );
    // Only the linear layers of the blocks are rounded: the embedding and the norms are not.
    let batch = batch();
    let embedded = |model: &Model| {
        floats(
            &model
                .embed(&batch, &model.pass(&batch, &[], Mode::INFERENCE))
                .unwrap(),
        )
    };
    assert_eq!(embedded(&nf4), embedded(&f32));
    let hidden = |model: &Model| floats(&model.hidden(&batch, Mode::INFERENCE).unwrap());
    let worst = difference(&hidden(&nf4), &hidden(&f32));
    assert!((1e-3..0.5).contains(&worst), "hidden states differ by {worst}");
}

#[test]
fn the_blocks_of_a_gguf_file_cannot_all_be_trained() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = checkpoint(scratch.path());
    let (file, _) = quantized(&folder, "Q8_0", scratch.path());
    let error = Model::open(&file, true).unwrap_err();
    assert!(matches!(error, ModelError::Blocks { .. }));
    assert!(error.to_string().contains("pipit-convert import"), "{error}");
}

#[test]
fn numbers_that_are_not_finite_are_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = checkpoint(scratch.path());
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    // The embedding is the last tensor but the norms in the file's order: find both by their offsets.
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let names: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    for tensor in ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"] {
        let at = 8 + header + names[tensor]["data_offsets"][0].as_u64().unwrap() as usize + 100;
        let mut broken = bytes.clone();
        broken[at..at + 2].copy_from_slice(&0x7fc0u16.to_le_bytes());
        std::fs::write(&path, broken).unwrap();
        let error = Model::open_as(&folder, NF4).unwrap_err().to_string();
        assert!(error.contains(tensor) && error.contains("NaN"), "{error}");
    }
}
