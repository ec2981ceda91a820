//! What the tests against torch and PEFT share: fixtures and comparisons.

#![allow(dead_code, reason = "every test file uses its part")]

pub(crate) mod logits;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use pipit_convert::adapter::TargetModules;
use pipit_distill::adapter::{InitLoraWeights, LoraOptions, Targets};
use pipit_distill::batch::Batch;

/// The file that the variable names, else the one of this name in the cache that `scripts/fetch-model` fills.
pub(crate) fn cached(variable: &str, name: &str) -> PathBuf {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let path = set(variable).unwrap_or_else(|| {
        let cache = || set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        let pipit = set("PIPIT_CACHE").or_else(|| cache().map(|cache| cache.join("pipit")));
        pipit.unwrap_or_default().join(name)
    });
    assert!(
        path.is_file(),
        "the test model is not at {}; ./check fetches it, {variable} names another",
        path.display()
    );
    path
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

pub(crate) fn expected(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture(&format!("{name}.expected.safetensors")), &Device::Cpu).unwrap()
}

/// LoRA of rank 4 on the modules of a pattern.
pub(crate) fn rank_four(target_modules: &str, init_lora_weights: InitLoraWeights) -> LoraOptions {
    LoraOptions {
        r: 4,
        lora_alpha: 8.0,
        init_lora_weights,
        targets: Targets {
            target_modules: TargetModules::Pattern(target_modules.into()),
            ..Targets::default()
        },
        ..LoraOptions::default()
    }
}

pub(crate) fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The fixture's rows without their padding: (ids, labels), optionally one only.
pub(crate) fn rows(expected: &HashMap<String, Tensor>) -> Vec<(Vec<u32>, Vec<i64>)> {
    let matrix = |name: &str| expected[name].to_vec2::<i64>().unwrap();
    let (ids, mask, labels) = (matrix("input_ids"), matrix("attention_mask"), matrix("labels"));
    let real = |row: &[i64], mask: &[i64]| -> Vec<i64> {
        row.iter()
            .zip(mask)
            .filter(|(_, mask)| **mask == 1)
            .map(|(x, _)| *x)
            .collect()
    };
    (0..ids.len())
        .map(|i| {
            (
                real(&ids[i], &mask[i]).iter().map(|id| *id as u32).collect(),
                real(&labels[i], &mask[i]),
            )
        })
        .collect()
}

pub(crate) fn batch(rows: &[(Vec<u32>, Vec<i64>)]) -> Batch {
    Batch::new(
        rows.iter()
            .map(|(ids, labels)| (ids.as_slice(), labels.as_slice())),
    )
}

pub(crate) fn largest_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let differences = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    // Not f32::max, which passes over NaN.
    differences.fold(0.0, |max, x| if x <= max { max } else { x })
}

/// The largest difference, relative to the largest expected entry.
pub(crate) fn difference(ours: &[f32], theirs: &[f32]) -> f32 {
    let largest = theirs.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    assert!(largest > 0.0, "the reference is zero");
    largest_difference(ours, theirs) / largest
}
