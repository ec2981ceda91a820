//! Adapters of every form while they are used: trained until rows are known by heart, in generation, merged, refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use pipit_convert::adapter::{Patterns, PeftAdapter, TargetModules};
use pipit_convert::checkpoint::Checkpoint;
use pipit_convert::merge::{Merge, MergeError, ScaledAdapter};
use pipit_distill::adapter::{
    Adapter, InitLoraWeights, LoraOptions, PrefixOptions, PromptOptions, PromptStart, Targets, lora, prefix,
    prompt,
};
use pipit_distill::batch::Batch;
use pipit_distill::model::{Mode, Model};
use pipit_distill::optimizer::{AdamW, AdamWOptions};
use pipit_distill::random::Random;
use pipit_distill::rollout::{Stop, greedy};
use serde_json::{Value, json};
use support::{batch, expected, fixture, floats, rows};

fn random() -> Random {
    Random::new(9, "adapter")
}

fn options(target_modules: TargetModules) -> LoraOptions {
    LoraOptions {
        r: 4,
        targets: Targets {
            target_modules,
            ..Targets::default()
        },
        ..LoraOptions::default()
    }
}

fn all_linear() -> LoraOptions {
    options(TargetModules::Pattern("all-linear".into()))
}

/// Puts a new adapter on a model, by its kind.
fn add(model: &mut Model, kind: &str) -> Adapter {
    let init = PromptStart::SampleVocab;
    let soft = PromptOptions {
        num_virtual_tokens: 16,
        init,
    };
    let hard = |prefix_projection| PrefixOptions {
        num_virtual_tokens: 16,
        prefix_projection,
        encoder_hidden_size: None,
    };
    match kind {
        "prompt" => Adapter::VirtualTokens(prompt::add(model, &soft, "base", &mut random()).unwrap()),
        "prefix" => Adapter::VirtualTokens(prefix::add(model, &hard(false), "base", &mut random()).unwrap()),
        "projection" => {
            Adapter::VirtualTokens(prefix::add(model, &hard(true), "base", &mut random()).unwrap())
        }
        lora => {
            let use_dora = lora == "dora";
            let options = LoraOptions {
                use_dora,
                ..all_linear()
            };
            Adapter::Lora(lora::add(model, &options, "base", &mut random()).unwrap())
        }
    }
}

/// The tiny model with a last norm of larger weights: with those of the fixture no token gets a probability near 1,
/// whatever the hidden states, because the output layer is frozen.
fn sharp_model(dir: &Path) -> Model {
    let file = fixture("tiny-untied").join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let norm = tensors["model.norm.weight"].affine(8.0, 0.0).unwrap();
    tensors.insert("model.norm.weight".into(), norm);
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    std::fs::copy(
        fixture("tiny-untied").join("config.json"),
        dir.join("config.json"),
    )
    .unwrap();
    Model::open(dir, false).unwrap()
}

/// Eight questions of three tokens with an answer of one or two.
fn eight_rows() -> Vec<(Vec<u32>, Vec<i64>)> {
    let row = |i: u32| {
        let ids: Vec<u32> = [31 * i + 5, 11 * i + 90, 200 + i, 17 * i + 40, 13 * i + 60]
            .map(|id| 3 + id % 250)
            .to_vec();
        let ids = ids[..4 + i as usize % 2].to_vec();
        let labels = ids
            .iter()
            .enumerate()
            .map(|(at, id)| if at < 3 { -100 } else { i64::from(*id) });
        (ids.clone(), labels.collect())
    };
    (0..8).map(row).collect()
}

/// Trains until the loss is below `goal`; how many steps it took, and the loss.
fn train(model: &Model, rate: f64, steps: usize, goal: f64) -> (usize, f64) {
    let batch = batch(&eight_rows());
    let adamw = AdamWOptions {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.0,
    };
    let trained = model.trained();
    let mut optimizer = AdamW::new(trained.iter().map(|(_, var)| (*var).clone()), adamw);
    let mode = Mode {
        gradient: true,
        dropout_seed: None,
    };
    let mut last = f64::NAN;
    for step in 0..steps {
        let loss = (model.loss_sum(&batch, mode, 64).unwrap() / batch.trained_tokens() as f64).unwrap();
        last = f64::from(loss.to_scalar::<f32>().unwrap());
        if last < goal {
            return (step, last);
        }
        let grads = loss.backward().unwrap();
        let gradients: Vec<Tensor> = trained
            .iter()
            .map(|(_, var)| grads.get(var).unwrap().clone())
            .collect();
        optimizer.step(&gradients, rate, 1.0).unwrap();
    }
    (steps, last)
}

#[test]
fn eight_rows_are_learnt_by_heart() {
    for (kind, rate) in [
        ("lora", 1e-2),
        ("dora", 1e-2),
        ("prompt", 3e-2),
        ("prefix", 3e-2),
        ("projection", 1e-2),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut model = sharp_model(dir.path());
        let adapter = add(&mut model, kind);
        let (steps, loss) = train(&model, rate, 600, 0.05);
        assert!(loss < 0.05, "{kind}: {loss} after {steps} steps");

        // What is stored knows them too, and goes on from there.
        let stored = tempfile::tempdir().unwrap();
        adapter.save(&model, stored.path()).unwrap();
        let mut again = Model::open(dir.path(), false).unwrap();
        Adapter::load(&mut again, stored.path()).unwrap();
        let (steps, loss) = train(&again, rate, 1, 0.06);
        assert_eq!(steps, 0, "{kind}: {loss} after loading");
        for (ids, labels) in eight_rows() {
            let answer = greedy(
                &again,
                &[&ids[..3]],
                &Stop {
                    eos: &[],
                    max_new_tokens: ids.len() - 3,
                },
            )
            .unwrap();
            let wanted: Vec<u32> = labels[3..].iter().map(|label| *label as u32).collect();
            assert_eq!(answer[0], wanted, "{kind}");
        }
    }
}

#[test]
fn answers_with_a_cache_are_those_without_under_every_adapter() {
    let prompts: [&[u32]; 3] = [&[7, 20, 33, 46, 59], &[8], &[100, 3, 200]];
    for (case, base) in [
        ("prompt", "tiny-tied"),
        ("prefix", "tiny-untied"),
        ("dora", "tiny-tied"),
        ("embeddings-dora", "tiny-untied"),
        ("lora-bias", "tiny-tied"),
        ("bias-lora-only", "tiny-qwen2"),
        ("gemma3-prompt", "tiny-gemma3"),
        ("gemma3-prefix", "tiny-gemma3"),
        ("gemma3-embeddings", "tiny-gemma3"),
    ] {
        let mut model = Model::open(&fixture(base), false).unwrap();
        Adapter::load(&mut model, &fixture("adapters").join(case)).unwrap();
        let stop = Stop {
            eos: &[],
            max_new_tokens: 9,
        };
        let answers = greedy(&model, &prompts, &stop).unwrap();
        for (prompt, answer) in prompts.iter().zip(answers) {
            let mut ids = prompt.to_vec();
            for _ in 0..9 {
                let hidden = model
                    .hidden(&Batch::unlabelled([ids.as_slice()]), Mode::INFERENCE)
                    .unwrap();
                let last = hidden.narrow(0, ids.len() - 1, 1).unwrap().contiguous().unwrap();
                let logits = floats(&model.logits(&last).unwrap());
                let best = |a: &u32, b: &u32| logits[*a as usize].total_cmp(&logits[*b as usize]);
                ids.push((0..256u32).max_by(best).unwrap());
            }
            assert_eq!(answer, ids[prompt.len()..], "{case}");
        }
    }
}

/// DoRA under dropout is PEFT's formula: the dropped inputs go through the product that the magnitudes multiply, the
/// others through the base alone; and another seed drops others.
#[test]
fn dropout_under_dora_drops_and_without_a_seed_does_not() {
    let base = "tiny-tied";
    let mut model = Model::open(&fixture(base), false).unwrap();
    let with = LoraOptions {
        use_dora: true,
        lora_dropout: 0.3,
        init_lora_weights: InitLoraWeights::False,
        ..all_linear()
    };
    lora::add(&mut model, &with, base, &mut random()).unwrap();
    let batch = batch(&rows(&expected(base)));
    let hidden = |dropout_seed| {
        let mode = Mode {
            gradient: false,
            dropout_seed,
        };
        floats(&model.hidden(&batch, mode).unwrap())
    };
    assert_eq!(hidden(Some(1)), hidden(Some(1)));
    assert_ne!(hidden(Some(1)), hidden(Some(2)));
    let mut without = Model::open(&fixture(base), false).unwrap();
    lora::add(
        &mut without,
        &LoraOptions {
            lora_dropout: 0.0,
            ..with
        },
        base,
        &mut random(),
    )
    .unwrap();
    assert_eq!(
        hidden(None),
        floats(&without.hidden(&batch, Mode::INFERENCE).unwrap())
    );
    let mode = Mode {
        gradient: true,
        dropout_seed: Some(1),
    };
    let grads = model.loss_sum(&batch, mode, 64).unwrap().backward().unwrap();
    for (name, var) in model.trained() {
        let gradient = floats(grads.get(var).unwrap());
        assert!(
            gradient.iter().all(|g| g.is_finite()) && gradient.iter().any(|g| *g != 0.0),
            "{name}"
        );
    }
}

/// The checkpoint with an adapter merged by pipit-convert.
fn merged(base: &str, adapter: &Path, dir: &Path) -> Result<Model, MergeError> {
    let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
    let adapters = [ScaledAdapter {
        adapter: PeftAdapter::open(adapter).unwrap(),
        scale: 1.0,
    }];
    let arch = pipit_convert::arch::of_config(checkpoint.config()).unwrap();
    let merge = Merge::new(&adapters, arch, checkpoint.config())?;
    let mut tensors = BTreeMap::new();
    for rule in merge.rules() {
        let (rows, columns) = rule.rows_and_columns();
        let own = if checkpoint.contains(&rule.hf) {
            rule.hf.as_str()
        } else {
            "model.embed_tokens.weight"
        };
        let mut values = checkpoint.tensor(own).unwrap().to_f32().unwrap();
        let before = values.clone();
        merge.prepare::<MergeError>(&rule.hf, (rows, columns), |first, out| {
            out.copy_from_slice(&before[first * columns..][..out.len()]);
            Ok(())
        })?;
        merge.apply(&rule.hf, |row| row, columns, &mut values)?;
        tensors.insert(
            rule.hf.clone(),
            Tensor::from_vec(values, rule.shape.as_slice(), &Device::Cpu).unwrap(),
        );
    }
    let tensors = tensors.into_iter().collect();
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    std::fs::write(
        dir.join("config.json"),
        serde_json::to_string(merge.config()).unwrap(),
    )
    .unwrap();
    Ok(Model::open(dir, false).unwrap())
}

#[test]
fn a_merged_adapter_gives_the_logits_of_the_unmerged() {
    for (case, base) in [
        ("regex-rslora", "tiny-untied"),
        ("patterns", "tiny-tied"),
        ("dora", "tiny-tied"),
        ("modules-to-save", "tiny-untied"),
        ("modules-to-save-tied", "tiny-tied"),
        ("embeddings", "tiny-tied"),
        ("embeddings-dora", "tiny-untied"),
        ("bias-all", "tiny-qwen2"),
    ] {
        // What this program writes is what is merged.
        let mut model = Model::open(&fixture(base), false).unwrap();
        let adapter = Adapter::load(&mut model, &fixture("adapters").join(case)).unwrap();
        let stored = tempfile::tempdir().unwrap();
        adapter.save(&model, stored.path()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let merged = merged(base, stored.path(), dir.path()).unwrap();
        let batch = batch(&rows(&expected(base)));
        let logits = |model: &Model| {
            let hidden = model.hidden(&batch, Mode::INFERENCE).unwrap();
            floats(&model.logits(&hidden).unwrap())
        };
        let (merged, unmerged) = (logits(&merged), logits(&model));
        let worst = merged
            .iter()
            .zip(&unmerged)
            .fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(worst < 1e-5, "{case}: {worst}");
        let plain = logits(&Model::open(&fixture(base), false).unwrap());
        assert_ne!(plain, unmerged, "{case}");
    }
    // A bias on a layer that has none, as in PEFT, cannot be merged.
    let (adapter, dir) = (
        fixture("adapters").join("bias-lora-only"),
        tempfile::tempdir().unwrap(),
    );
    let error = merged("tiny-qwen2", &adapter, dir.path())
        .unwrap_err()
        .to_string();
    assert!(error.contains("o_proj.bias"), "{error}");
}

/// A stored adapter with some keys of its configuration changed.
fn changed(case: &str, keys: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(fixture("adapters").join(case).join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in keys.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(path, config.to_string()).unwrap();
    dir
}

#[test]
fn what_cannot_be_trained_is_refused_by_name() {
    let load = |base: &str, dir: &Path| {
        let mut model = Model::open(&fixture(base), false).unwrap();
        Adapter::load(&mut model, dir).unwrap_err().to_string()
    };
    for (case, base, keys, part) in [
        (
            "layers",
            "tiny-tied",
            json!({"init_lora_weights": "pissa"}),
            "init_lora_weights",
        ),
        (
            "layers",
            "tiny-tied",
            json!({"alora_invocation_tokens": [1]}),
            "alora_invocation_tokens",
        ),
        ("layers", "tiny-tied", json!({"use_dora": true}), "use_dora"),
        (
            "layers",
            "tiny-tied",
            json!({"modules_to_save": ["lm_haed"]}),
            "lm_head",
        ),
        (
            "prompt",
            "tiny-tied",
            json!({"num_transformer_submodules": 2}),
            "num_transformer_submodules",
        ),
        (
            "prompt",
            "tiny-tied",
            json!({"num_virtual_tokens": 5}),
            "[5, 64] here, [4, 64]",
        ),
        ("prompt", "tiny-tied", json!({"num_ranks": 5}), "num_ranks"),
        (
            "prefix",
            "tiny-untied",
            json!({"peft_type": "P_TUNING"}),
            "P_TUNING",
        ),
        (
            "embeddings-dora",
            "tiny-untied",
            json!({"lora_dropout": 0.1}),
            "output layer",
        ),
    ] {
        let error = load(base, changed(case, &keys).path());
        assert!(error.contains(part), "{part}: {error}");
    }
    for (case, base) in [("prefix", "tiny-tied"), ("regex-rslora", "tiny-tied")] {
        let error = load(base, &fixture("adapters").join(case));
        assert!(
            error.contains("does not fit this model") && error.contains("tiny-untied"),
            "{error}"
        );
    }
    let new = |options: LoraOptions| {
        let mut model = Model::open(&fixture("tiny-tied"), false).unwrap();
        lora::add(&mut model, &options, "base", &mut random())
            .unwrap_err()
            .to_string()
    };
    let names = |names: &[&str]| TargetModules::Names(names.iter().map(|name| name.to_string()).collect());
    let dora = LoraOptions {
        use_dora: true,
        ..options(names(&["lm_head"]))
    };
    assert!(
        new(LoraOptions {
            lora_dropout: 0.1,
            ..dora.clone()
        })
        .contains("output layer")
    );
    assert!(
        new(LoraOptions {
            lora_bias: true,
            ..dora
        })
        .contains("use_dora")
    );
    assert!(
        new(LoraOptions {
            lora_bias: true,
            ..options(names(&["embed_tokens"]))
        })
        .contains("embedding")
    );
    let rank_pattern = Patterns(vec![("q_porj".to_owned(), 2)]);
    let error = new(LoraOptions {
        rank_pattern,
        ..all_linear()
    });
    assert!(
        error.contains("rank_pattern") && error.contains("q_proj"),
        "{error}"
    );
    let mut saved = all_linear();
    saved.targets.modules_to_save = vec!["lm_haed".into()];
    let error = new(saved);
    assert!(
        error.contains("modules_to_save") && error.contains("lm_head"),
        "{error}"
    );
}
