//! AdamW against torch and bitsandbytes, and the schedules against transformers: fixtures made by references/optimizer.py.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::{DType, Device, Tensor, Var};
use pipit_distill::optimizer::{AdamW, AdamWOptions, Schedule};
use serde_json::Value;

fn fixture() -> Value {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/optimizer.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap() as f32)
        .collect()
}

fn options(golden: &Value) -> AdamWOptions {
    AdamWOptions {
        beta1: golden["betas"][0].as_f64().unwrap(),
        beta2: golden["betas"][1].as_f64().unwrap(),
        epsilon: golden["eps"].as_f64().unwrap(),
        weight_decay: golden["weight_decay"].as_f64().unwrap(),
    }
}

const SHAPES: [&[usize]; 2] = [&[3, 4], &[5]];

fn close(what: &str, step: usize, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len());
    for (a, b) in ours.iter().zip(theirs) {
        assert!(
            (a - b).abs() <= 1e-6 * b.abs().max(1.0),
            "step {step}, {what}: {a}, torch {b}"
        );
    }
}

#[test]
fn ten_steps_of_adamw_and_its_moments_are_torchs() {
    let golden = &fixture()["adamw"];
    let options = options(golden);
    let tensor = |i: usize, value: &Value| Tensor::from_vec(floats(value), SHAPES[i], &Device::Cpu).unwrap();
    let vars: Vec<Var> = (0..2)
        .map(|i| Var::from_tensor(&tensor(i, &golden["start"][i])).unwrap())
        .collect();
    let mut optimizer = AdamW::new(vars.iter().cloned(), options);
    for (step, expected) in golden["steps"].as_array().unwrap().iter().enumerate() {
        let gradients: Vec<Tensor> = (0..2).map(|i| tensor(i, &expected["gradients"][i])).collect();
        optimizer
            .step(&gradients, golden["lr"].as_f64().unwrap(), 1.0)
            .unwrap();
        for (i, var) in vars.iter().enumerate() {
            let weights: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
            close("weights", step, &weights, &floats(&expected["weights"][i]));
            let [mean, square] = optimizer.moments(i).unwrap();
            close("exp_avg", step, &mean, &floats(&expected["exp_avg"][i]));
            close("exp_avg_sq", step, &square, &floats(&expected["exp_avg_sq"][i]));
        }
    }
}

/// The gradient of references/optimizer.py, `gradient_8bit`.
fn gradient_8bit(step: usize) -> Tensor {
    let one = |i: usize| ((i * 37 + step * 101) % 257) as f32 - 128.0;
    let values: Vec<f32> = (0..600)
        .map(|i| one(i) / 128.0 * 2f32.powi(-((i % 17) as i32)))
        .collect();
    Tensor::from_vec(values, 600, &Device::Cpu).unwrap()
}

#[test]
fn moments_in_eight_bits_are_those_of_bitsandbytes() {
    let golden = &fixture()["adamw_8bit"];
    let var = Var::zeros(600, DType::F32, &Device::Cpu).unwrap();
    let mut optimizer = AdamW::new([var.clone()], options(golden));
    // A vector's weights do not decay by our rule; bitsandbytes was asked to let them.
    let decay = 1.0 - golden["lr"].as_f64().unwrap() * golden["weight_decay"].as_f64().unwrap();
    optimizer.keep_in_eight_bits(0);
    for step in 1..=golden["steps"].as_u64().unwrap() as usize {
        var.set(&(var.as_detached_tensor() * decay).unwrap()).unwrap();
        optimizer
            .step(&[gradient_8bit(step)], golden["lr"].as_f64().unwrap(), 1.0)
            .unwrap();
    }
    // A number in the middle between two codes takes one or the other, as its last bit falls.
    let nearly_all_equal = |what: &str, ours: &[f32], theirs: &[f32]| {
        let pairs = ours.iter().zip(theirs);
        let unequal = pairs
            .filter(|(a, b)| (*a - *b).abs() > 1e-6 * b.abs().max(1.0))
            .count();
        assert!(unequal <= 6, "{what}: {unequal} of 600 differ");
    };
    nearly_all_equal(
        "weights",
        &var.to_vec1::<f32>().unwrap(),
        &floats(&golden["weights"]),
    );
    let scales = optimizer.scales(0).unwrap();
    let moments = optimizer.moments(0).unwrap();
    for (i, part) in ["exp_avg", "exp_avg_sq"].into_iter().enumerate() {
        close("absmax", 5, &scales[i], &floats(&golden["absmax"][i]));
        let theirs: Vec<f32> = floats(&golden[part])
            .into_iter()
            .enumerate()
            .map(|(at, value)| value * scales[i][at / 256])
            .collect();
        nearly_all_equal(part, &moments[i], &theirs);
    }
}

#[test]
fn schedules_are_those_of_transformers_at_every_step() {
    let golden = fixture();
    let schedules = golden["schedules"].as_array().unwrap();
    assert_eq!(schedules.len(), 16);
    for expected in schedules {
        let schedule: Schedule = serde_json::from_value(expected["name"].clone()).unwrap();
        let [warmup, total] = ["warmup", "total"].map(|key| expected[key].as_u64().unwrap() as usize);
        for (step, factor) in expected["factors"].as_array().unwrap().iter().enumerate() {
            let (ours, theirs) = (schedule.factor(step, warmup, total), factor.as_f64().unwrap());
            assert!((ours - theirs).abs() < 1e-12, "{expected}: step {step}: {ours}");
        }
    }
}
