//! A student that computes through quantised weights computes what its GGUF file does, and learns as a merged matrix would.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Tensor, Var};
use pipit_convert::adapter::PeftAdapter;
use pipit_convert::merge::ScaledAdapter;
use pipit_convert::model::{Plan, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::{FileType, Recipe};
use pipit_distill::adapter::{Adapter, InitLoraWeights, LoraOptions, lora};
use pipit_distill::batch::Batch;
use pipit_distill::model::{Mode, Model};
use pipit_distill::opd::Through;
use pipit_distill::random::Random;
use support::{difference, floats, largest_difference};

const TRAIN: Mode = Mode {
    gradient: true,
    ..Mode::INFERENCE
};
/// Mixes that give tensors different types, and types without one.
const TYPES: [&str; 5] = ["Q4_0", "Q4_K_M", "Q5_1", "Q8_0", "IQ4_NL"];

/// A tiny llama that becomes a GGUF file.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../convert/tests/fixtures/tied")
}

fn batch() -> Batch {
    let ids: Vec<u32> = (0..24).map(|i| 40 + 7 * i % 200).collect();
    let labels: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    Batch::new([(&ids[..9], &labels[..9]), (&ids[9..], &labels[9..])])
}

fn logits(model: &Model) -> Vec<f32> {
    let hidden = model.hidden(&batch(), Mode::INFERENCE).unwrap();
    floats(&model.logits(&hidden).unwrap())
}

fn numbers(model: &Model) -> HashMap<String, Vec<f32>> {
    let weights = model.weights();
    let numbers = weights.map(|weight| (weight.name.clone(), floats(weight.get(Mode::INFERENCE))));
    numbers.collect()
}

fn recipe(name: &str) -> Recipe {
    Recipe::new(FileType::from_name(name).unwrap())
}

fn convert(folder: &Path, adapters: &[ScaledAdapter], recipe: &Recipe, into: &Path) -> Model {
    let mut source = SourceModel::open(folder).unwrap();
    source.skip_tokenizer_proof();
    Plan::new(&source, adapters, recipe)
        .unwrap()
        .write(into, None, &Silent)
        .unwrap();
    Model::open(into, false).unwrap()
}

#[test]
fn the_blocks_are_those_that_pipit_convert_writes() {
    let scratch = tempfile::tempdir().unwrap();
    for name in TYPES {
        let (mut model, recipe) = (Model::open(&fixture(), true).unwrap(), recipe(name));
        let own = numbers(&model);
        let source = SourceModel::open(&fixture()).unwrap();
        let mut through = Through::new(&mut model, &source, &recipe).unwrap();
        through.put_on().unwrap();
        let rounded = numbers(&model);
        let file = convert(
            &fixture(),
            &[],
            &recipe,
            &scratch.path().join(format!("{name}.gguf")),
        );
        let mut compared = 0;
        for matrix in file.quantized() {
            let [rows, columns] = matrix.dims();
            let mut blocks = vec![0.0; rows * columns];
            matrix.dequantize(0..rows, &mut blocks);
            assert_eq!(rounded[matrix.name()], blocks, "{name}, {}", matrix.name());
            assert_ne!(own[matrix.name()], blocks, "{name}, {}", matrix.name());
            compared += 1;
        }
        assert_eq!(
            compared,
            1 + 2 * 7,
            "the embedding, and seven matrices of two blocks"
        );
        assert!(difference(&logits(&model), &logits(&file)) < 1e-5, "{name}");
        through.put_on().unwrap();
        through.take_off().unwrap();
        assert_eq!(numbers(&model), own, "{name}");
    }
}

/// The fixture under an adapter that does something.
fn adapted() -> (Model, Adapter) {
    let mut model = Model::open(&fixture(), false).unwrap();
    let options = LoraOptions {
        r: 3,
        lora_alpha: 9.0,
        init_lora_weights: InitLoraWeights::False,
        ..LoraOptions::default()
    };
    let base = fixture().display().to_string();
    let config = lora::add(&mut model, &options, &base, &mut Random::new(5, "adapter")).unwrap();
    (model, Adapter::Lora(config))
}

fn gradients(model: &Model) -> HashMap<String, Tensor> {
    let loss = model.loss_sum(&batch(), TRAIN, 128).unwrap();
    let store = loss.backward().unwrap();
    let of = |(name, var): (&str, &Var)| (name.to_owned(), store.get(var).unwrap().clone());
    model.trained().into_iter().map(of).collect()
}

#[test]
fn an_adapter_is_merged_before_it_is_rounded_and_learns_as_the_merged_matrix() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["Q4_0", "Q4_K_M"] {
        let (mut model, adapter) = adapted();
        let without = logits(&model);
        let recipe = recipe(name);
        let source = SourceModel::open(&fixture()).unwrap();
        let mut through = Through::new(&mut model, &source, &recipe).unwrap();
        through.put_on().unwrap();

        let folder = scratch.path().join(format!("{name}-adapter"));
        std::fs::create_dir(&folder).unwrap();
        adapter.save(&model, &folder).unwrap();
        let adapters = [ScaledAdapter {
            adapter: PeftAdapter::open(&folder).unwrap(),
            scale: 1.0,
        }];
        let file = convert(
            &fixture(),
            &adapters,
            &recipe,
            &scratch.path().join(format!("{name}.gguf")),
        );
        let (ours, theirs) = (logits(&model), logits(&file));
        assert!(difference(&ours, &theirs) < 1e-5, "{name}");
        assert!(
            largest_difference(&ours, &without) > 1e-3,
            "{name}: rounding does something"
        );

        // A model whose matrices are trained and have the numbers of the blocks: dB = s·dW·Aᵀ, dA = s·Bᵀ·dW.
        let merged = Model::open(&fixture(), true).unwrap();
        for matrix in file.quantized() {
            let [rows, columns] = matrix.dims();
            let mut blocks = vec![0.0; rows * columns];
            matrix.dequantize(0..rows, &mut blocks);
            let trained = merged.trained();
            let (_, var) = trained.iter().find(|(name, _)| *name == matrix.name()).unwrap();
            let blocks = Tensor::from_vec(blocks, (rows, columns), &candle_core::Device::Cpu).unwrap();
            var.set(&blocks).unwrap();
        }
        let (of_adapter, of_merged) = (gradients(&model), gradients(&merged));
        let trained: HashMap<&str, &Var> = model.trained().into_iter().collect();
        let mut compared = 0;
        for (name, d_b) in of_adapter.iter().filter(|(name, _)| name.contains("lora_B")) {
            let module = name.trim_end_matches(".lora_B.weight");
            let d_w = &of_merged[&format!("{module}.weight")];
            let a_name = format!("{module}.lora_A.weight");
            let (a, b) = (trained[a_name.as_str()], trained[name.as_str()]);
            let scaled = |x: Tensor| floats(&(x * 3.0).unwrap());
            let expected = scaled(d_w.matmul(&a.t().unwrap()).unwrap());
            assert!(difference(&floats(d_b), &expected) < 1e-3, "{name}");
            let expected = scaled(b.t().unwrap().matmul(d_w).unwrap());
            assert!(
                difference(&floats(&of_adapter[&a_name]), &expected) < 1e-3,
                "{a_name}"
            );
            compared += 1;
        }
        assert_eq!(compared, 14);
    }
}

#[test]
fn what_cannot_be_rounded_is_refused_by_name() {
    let source = SourceModel::open(&fixture()).unwrap();
    let refused = |options: LoraOptions, text: &str| {
        let mut model = Model::open(&fixture(), false).unwrap();
        lora::add(&mut model, &options, "base", &mut Random::new(5, "adapter")).unwrap();
        let error = Through::new(&mut model, &source, &recipe("Q4_0"))
            .unwrap_err()
            .to_string();
        assert!(error.contains(text), "{error}");
    };
    let dora = LoraOptions {
        use_dora: true,
        ..LoraOptions::default()
    };
    refused(dora, "--use-dora");
    let dropout = LoraOptions {
        lora_dropout: 0.1,
        ..LoraOptions::default()
    };
    refused(dropout, "--lora-dropout");
    let scratch = tempfile::tempdir().unwrap();
    let mut blocks = convert(
        &fixture(),
        &[],
        &recipe("Q8_0"),
        &scratch.path().join("blocks.gguf"),
    );
    let error = Through::new(&mut blocks, &source, &recipe("Q4_0"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("in blocks already"), "{error}");
}
