//! Every form of adapter against PEFT: fixtures made by references/peft_adapters.py.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use pipit_convert::adapter::{Patterns, PeftAdapter, TargetModules};
use pipit_distill::adapter::{
    Adapter, Bias, InitLoraWeights, LoraOptions, PrefixOptions, PromptOptions, PromptStart, Targets, lora,
    prefix, prompt,
};
use pipit_distill::model::{Mode, Model};
use pipit_distill::random::Random;
use serde_json::{Map, Value};
use support::{batch, difference, expected, fixture, floats, rows};

const TRAIN: Mode = Mode {
    gradient: true,
    dropout_seed: None,
};

/// The fixtures with the base of each.
const CASES: [(&str, &str); 19] = [
    ("regex-rslora", "tiny-untied"),
    ("all-linear", "tiny-untied"),
    ("patterns", "tiny-tied"),
    ("layers", "tiny-tied"),
    ("dora", "tiny-tied"),
    ("lora-bias", "tiny-tied"),
    ("modules-to-save", "tiny-untied"),
    ("modules-to-save-tied", "tiny-tied"),
    ("embeddings", "tiny-tied"),
    ("embeddings-dora", "tiny-untied"),
    ("bias-all", "tiny-qwen2"),
    ("bias-lora-only", "tiny-qwen2"),
    ("gemma3-embeddings", "tiny-gemma3"),
    ("gemma3-norms", "tiny-gemma3"),
    ("gemma3-prompt", "tiny-gemma3"),
    ("gemma3-prefix", "tiny-gemma3"),
    ("prompt", "tiny-tied"),
    ("prefix", "tiny-untied"),
    ("prefix-projection", "tiny-tied"),
];

fn folder(case: &str) -> PathBuf {
    fixture("adapters").join(case)
}

fn open(base: &str) -> Model {
    Model::open(&fixture(base), false).unwrap()
}

fn loaded(case: &str, base: &str) -> (Model, Adapter) {
    let mut model = open(base);
    let adapter = Adapter::load(&mut model, &folder(case)).unwrap();
    (model, adapter)
}

/// The logits of the base's batch, row by row.
fn logits(model: &Model, base: &str) -> Vec<f32> {
    let hidden = model
        .hidden(&batch(&rows(&expected(base))), Mode::INFERENCE)
        .unwrap();
    floats(&model.logits(&hidden).unwrap())
}

/// The largest difference, absolute.
fn apart(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter()
        .zip(theirs)
        .fold(0.0, |max, (a, b)| max.max((a - b).abs()))
}

/// PEFT's gradient of one of our trained tensors, in our layout: an embedding's A is the other way round, and a prefix
/// is one tensor a block.
fn pefts_gradient(name: &str, grads: &BTreeMap<String, Tensor>, kv: usize) -> Tensor {
    let whole = |name: &str| grads[name].clone();
    if name.ends_with(".lora_embedding_A") {
        return whole(name).t().unwrap().contiguous().unwrap();
    }
    let Some((tensor, block)) = name
        .split_once(".layers.")
        .filter(|(start, _)| start.contains("prompt"))
    else {
        return match name.strip_suffix(".bias") {
            // PEFT puts a layer with an adapter around the layer that has the bias.
            Some(module) if !grads.contains_key(name) => whole(&format!("{module}.base_layer.bias")),
            _ if name == "prompt_embeddings" => whole("prompt_encoder.embedding.weight"),
            _ => whole(name),
        };
    };
    let start = block.parse::<usize>().unwrap() * 2 * kv;
    match tensor {
        "prompt_embeddings" => whole("prompt_encoder.embedding.weight")
            .narrow(1, start, 2 * kv)
            .unwrap(),
        projected => whole(projected).narrow(0, start, 2 * kv).unwrap(),
    }
}

/// Logits, loss, and the gradient of every trained tensor, which are the ones that PEFT trains.
fn check(case: &str, base: &str, model: &Model) {
    let (stored, batch) = (
        expected(&format!("adapters/{case}")),
        batch(&rows(&expected(base))),
    );
    let worst = apart(&logits(model, base), &floats(&stored["logits"]));
    assert!(worst < 1e-4, "{case}: logits differ by {worst}");
    let loss = (model.loss_sum(&batch, TRAIN, 7).unwrap() / batch.trained_tokens() as f64).unwrap();
    let (ours, theirs) = (loss.to_scalar::<f32>().unwrap(), floats(&stored["loss"])[0]);
    assert!((ours - theirs).abs() < 1e-5, "{case}: loss {ours}, PEFT {theirs}");
    let evaluated = model
        .loss_sum(&batch, Mode::INFERENCE, 64)
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    assert!(
        (evaluated / batch.trained_tokens() as f32 - theirs).abs() < 1e-5,
        "{case}: evaluation"
    );

    let grads = stored
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("grad.")?.to_owned(), tensor.clone())));
    let grads: BTreeMap<String, Tensor> = grads.collect();
    let store = loss.backward().unwrap();
    let kv = model.config().heads(0).kv_width();
    let (mut elements, trained) = (0, model.trained());
    for (name, var) in &trained {
        let ours = store
            .get(var)
            .unwrap_or_else(|| panic!("{case}: {name} gets no gradient"));
        let theirs = pefts_gradient(name, &grads, kv);
        assert_eq!(ours.dims(), theirs.dims(), "{case}: {name}");
        let off = difference(&floats(ours), &floats(&theirs));
        assert!(off < 1e-3, "{case}: the gradient of {name} is off by {off}");
        elements += theirs.elem_count();
    }
    let theirs: usize = grads.values().map(Tensor::elem_count).sum();
    assert_eq!(elements, theirs, "{case}: trained elements");
}

#[test]
fn an_adapter_of_peft_gives_pefts_logits_and_gradients() {
    for (case, base) in CASES.into_iter().filter(|(case, _)| *case != "prefix-projection") {
        check(case, base, &loaded(case, base).0);
    }
}

/// PEFT stores what a projection gives, and that is what is loaded; while it is trained its own tensors count.
#[test]
fn a_projected_prefix_is_trained_as_pefts_is() {
    let (case, base) = ("prefix-projection", "tiny-tied");
    let stored = expected(&format!("adapters/{case}"));
    let worst = apart(&logits(&loaded(case, base).0, base), &floats(&stored["logits"]));
    assert!(worst < 1e-4, "loaded: {worst}");

    let mut model = open(base);
    let options = PrefixOptions {
        num_virtual_tokens: 3,
        prefix_projection: true,
        encoder_hidden_size: Some(12),
    };
    let config = prefix::add(&mut model, &options, base, &mut Random::new(1, "adapter")).unwrap();
    let starts = stored
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("start.")?.to_owned(), tensor.clone())));
    let starts: BTreeMap<String, Tensor> = starts.collect();
    let kv = model.config().heads(0).kv_width();
    for (name, var) in model.trained() {
        var.set(&pefts_gradient(name, &starts, kv).contiguous().unwrap())
            .unwrap();
    }
    check(case, base, &model);
    let dir = tempfile::tempdir().unwrap();
    Adapter::VirtualTokens(config).save(&model, dir.path()).unwrap();
    let (ours, theirs) = (tensors(dir.path()), tensors(&folder(case)));
    assert!(
        apart(
            &floats(&ours["prompt_embeddings"]),
            &floats(&theirs["prompt_embeddings"])
        ) < 1e-5
    );
}

fn tensors(dir: &Path) -> BTreeMap<String, Tensor> {
    let tensors = candle_core::safetensors::load(PeftAdapter::weights_path(dir), &Device::Cpu).unwrap();
    tensors.into_iter().collect()
}

fn config(dir: &Path) -> Map<String, Value> {
    serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
}

/// 9 and 9.0 are one number to PEFT.
fn in_floats(value: &Value) -> Value {
    match value {
        Value::Number(number) => number.as_f64().into(),
        Value::Array(items) => items.iter().map(in_floats).collect(),
        Value::Object(items) => items
            .iter()
            .map(|(key, value)| (key.clone(), in_floats(value)))
            .collect(),
        other => other.clone(),
    }
}

/// Ours says what PEFT's says; what ours leaves out has PEFT's default there.
fn check_config(case: &str, ours: &Map<String, Value>, theirs: &Map<String, Value>) {
    for (key, value) in theirs {
        let default = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Object(items) => items.is_empty(),
            _ => matches!(
                key.as_str(),
                "peft_version" | "megatron_core" | "qalora_group_size"
            ),
        };
        match ours.get(key) {
            Some(ours) => assert_eq!(in_floats(ours), in_floats(value), "{case}: {key}"),
            None => assert!(default, "{case}: {key} is missing, PEFT has {value}"),
        }
    }
    let unknown: Vec<_> = ours.keys().filter(|key| !theirs.contains_key(*key)).collect();
    assert!(unknown.is_empty(), "{case}: PEFT does not know {unknown:?}");
}

#[test]
fn a_stored_adapter_is_written_again_as_it_was() {
    for (case, base) in CASES {
        let (model, adapter) = loaded(case, base);
        let dir = tempfile::tempdir().unwrap();
        adapter.save(&model, dir.path()).unwrap();
        let (ours, theirs) = (tensors(dir.path()), tensors(&folder(case)));
        let keys = |tensors: &BTreeMap<String, Tensor>| tensors.keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(keys(&ours), keys(&theirs), "{case}");
        for (name, tensor) in &theirs {
            assert_eq!(ours[name].dims(), tensor.dims(), "{case}: {name}");
            assert_eq!(floats(&ours[name]), floats(tensor), "{case}: {name}");
        }
        check_config(case, &config(dir.path()), &config(&folder(case)));
    }
}

fn names(names: &[&str]) -> TargetModules {
    TargetModules::Names(names.iter().map(|name| name.to_string()).collect())
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

/// The options of references/peft_adapters.py.
fn lora_options(target_modules: TargetModules) -> LoraOptions {
    LoraOptions {
        r: 3,
        lora_alpha: 9.0,
        targets: Targets {
            target_modules,
            ..Targets::default()
        },
        ..LoraOptions::default()
    }
}

/// The same adapter as the fixture's, newly made.
fn options_of(case: &str) -> Option<LoraOptions> {
    let all = || lora_options(TargetModules::Pattern("all-linear".into()));
    let pattern = |entries: &[(&str, f64)]| {
        entries
            .iter()
            .map(|(key, value)| (key.to_string(), *value))
            .collect()
    };
    let mut options = match case {
        "regex-rslora" => lora_options(TargetModules::Pattern(
            r".*\.1\.(self_attn|mlp)\.(q|down)_proj".into(),
        )),
        "all-linear" | "dora" => all(),
        "patterns" => lora_options(names(&["o_proj", "q_proj", "up_proj", "v_proj"])),
        "layers" => lora_options(names(&["gate_proj", "model.layers.0.mlp.down_proj", "q_proj"])),
        "lora-bias" => lora_options(names(&["q_proj", "up_proj"])),
        "modules-to-save" => lora_options(names(&["lm_head", "v_proj"])),
        "modules-to-save-tied" => lora_options(names(&["o_proj"])),
        "embeddings" => lora_options(names(&["down_proj", "embed_tokens", "lm_head"])),
        "embeddings-dora" => lora_options(names(&["embed_tokens", "k_proj", "lm_head"])),
        "bias-all" => lora_options(names(&["down_proj", "q_proj"])),
        "bias-lora-only" => lora_options(names(&["o_proj", "v_proj"])),
        "gemma3-embeddings" => lora_options(names(&["embed_tokens", "k_proj"])),
        "gemma3-norms" => lora_options(names(&["v_proj"])),
        _ => return None,
    };
    match case {
        "regex-rslora" => options.use_rslora = true,
        "all-linear" => options.targets.exclude_modules = names(&["k_proj", "layers.0.mlp.up_proj"]),
        "dora" | "embeddings-dora" | "gemma3-embeddings" => options.use_dora = true,
        "bias-all" => options.bias = Bias::All,
        "bias-lora-only" => (options.bias, options.lora_bias) = (Bias::LoraOnly, true),
        "gemma3-norms" => options.targets.modules_to_save = strings(&["q_norm", "model.norm"]),
        "patterns" => {
            let ranks = [(r"layers\.1\.mlp\.up_proj", 5), ("up_proj", 1), ("v_proj", 2)];
            options.rank_pattern = Patterns(ranks.map(|(key, r)| (key.to_owned(), r)).to_vec());
            options.alpha_pattern = Patterns(pattern(&[
                (r"^model\.layers\.0\..*", 2.5),
                ("self_attn.q_proj", 5.0),
            ]));
        }
        "layers" => {
            options.targets.layers_to_transform = vec![1];
            options.targets.layers_pattern = strings(&["layers"]);
        }
        "lora-bias" => options.lora_bias = true,
        "modules-to-save" => options.targets.modules_to_save = strings(&["embed_tokens", "lm_head", "norm"]),
        "modules-to-save-tied" => options.targets.modules_to_save = strings(&["lm_head"]),
        _ => {}
    }
    Some(options)
}

/// A new adapter like the fixture's.
fn new(case: &str, base: &str) -> (Model, Adapter) {
    let (mut model, mut random) = (open(base), Random::new(5, "adapter"));
    let (init, prefix_projection) = (PromptStart::Random, case == "prefix-projection");
    let adapter = match case {
        "prompt" | "gemma3-prompt" => {
            let options = PromptOptions {
                num_virtual_tokens: 4,
                init,
            };
            Adapter::VirtualTokens(prompt::add(&mut model, &options, base, &mut random).unwrap())
        }
        "prefix" | "gemma3-prefix" | "prefix-projection" => {
            let options = PrefixOptions {
                num_virtual_tokens: match case {
                    "prefix" => 5,
                    "gemma3-prefix" => 9,
                    _ => 3,
                },
                prefix_projection,
                encoder_hidden_size: prefix_projection.then_some(12),
            };
            Adapter::VirtualTokens(prefix::add(&mut model, &options, base, &mut random).unwrap())
        }
        lora => Adapter::Lora(lora::add(&mut model, &options_of(lora).unwrap(), base, &mut random).unwrap()),
    };
    (model, adapter)
}

#[test]
fn a_new_adapter_has_pefts_keys_shapes_and_configuration() {
    for (case, base) in CASES {
        let (model, adapter) = new(case, base);
        let dir = tempfile::tempdir().unwrap();
        adapter.save(&model, dir.path()).unwrap();
        let shapes = |dir: &Path| -> Vec<(String, Vec<usize>)> {
            tensors(dir)
                .into_iter()
                .map(|(name, tensor)| (name, tensor.dims().to_vec()))
                .collect()
        };
        assert_eq!(shapes(dir.path()), shapes(&folder(case)), "{case}");
        check_config(case, &config(dir.path()), &config(&folder(case)));
    }
}

#[test]
fn a_new_lora_or_dora_changes_no_bit() {
    for (case, base) in CASES.into_iter().filter(|(case, _)| options_of(case).is_some()) {
        let (model, _) = new(case, base);
        assert_eq!(logits(&model, base), logits(&open(base), base), "{case}");
    }
    let random = LoraOptions {
        init_lora_weights: InitLoraWeights::False,
        ..options_of("all-linear").unwrap()
    };
    let mut model = open("tiny-tied");
    lora::add(&mut model, &random, "tiny-tied", &mut Random::new(5, "adapter")).unwrap();
    assert!(
        apart(
            &logits(&model, "tiny-tied"),
            &logits(&open("tiny-tied"), "tiny-tied")
        ) > 1e-2
    );
}
