//! Distillation losses over logits: the output layer is the identity, so that hidden states are logits.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::Range;

use candle_core::{DType, Device, Tensor, Var};
use pipit_distill::batch::Batch;
use pipit_distill::loss::{Loss, Measures, Objective, Taught};
use pipit_distill::model::ops::{Distillation, Frozen, frozen_distillation_loss};
use pipit_distill::random::Random;
use pipit_distill::teacher::{LogitRows, Scores};

/// The golden vector: a student's and a teacher's logits.
pub(crate) const STUDENT: [f64; 5] = [0.0, 1.0, 2.0, -1.0, 0.5];
pub(crate) const TEACHER: [f32; 5] = [1.0, 0.0, 2.0, -3.0, 0.25];

/// Logits in memory.
pub(crate) struct Rows {
    width: usize,
    logits: Vec<f32>,
}

impl LogitRows for Rows {
    fn rows(&self) -> usize {
        self.logits.len() / self.width
    }
    fn vocab_size(&self) -> usize {
        self.width
    }
    fn read(&self, rows: Range<usize>, out: &mut [f32]) -> candle_core::Result<()> {
        out.copy_from_slice(&self.logits[rows.start * self.width..rows.end * self.width]);
        Ok(())
    }
}

pub(crate) fn full(logits: &[f32], width: usize) -> Scores {
    let logits = logits.to_vec();
    Scores::Full(Box::new(Rows { width, logits }))
}

pub(crate) fn objective(loss: Loss) -> Objective {
    Objective {
        loss,
        temperature: 1.0,
        t_squared: false,
        top_k: None,
        ce_weight: 0.0,
        chunk: 2,
    }
}

/// One sequence whose row i is asked for `tokens[i]`; a last row is asked for nothing.
pub(crate) fn batch(tokens: &[u32]) -> Batch {
    let ids = vec![0; tokens.len() + 1];
    let mut labels = vec![-100];
    labels.extend(tokens.iter().map(|token| i64::from(*token)));
    Batch::new([(ids.as_slice(), labels.as_slice())])
}

/// Value, gradient by the logits, and the parts. `logits` `[rows, vocabulary]`, a row for each token.
pub(crate) fn run(
    logits: &Tensor,
    tokens: &[u32],
    taught: impl Into<Taught>,
    objective: Objective,
) -> (f64, Vec<f64>, Measures) {
    let vocabulary = logits.dim(1).unwrap();
    let identity = Tensor::eye(vocabulary, logits.dtype(), &Device::Cpu).unwrap();
    let last = Tensor::zeros((1, vocabulary), logits.dtype(), &Device::Cpu).unwrap();
    let var = Var::from_tensor(&Tensor::cat(&[logits, &last], 0).unwrap()).unwrap();
    let distillation = Distillation::new(&batch(tokens), taught.into(), &objective, vocabulary).unwrap();
    let (loss, measures) = frozen_distillation_loss(&var, &Frozen::Dense(identity), distillation).unwrap();
    let gradient = loss.backward().unwrap().get(&var).unwrap().clone();
    let gradient = gradient
        .narrow(0, 0, tokens.len())
        .unwrap()
        .flatten_all()
        .unwrap();
    let gradient = gradient.to_dtype(DType::F64).unwrap().to_vec1().unwrap();
    let loss = loss.to_dtype(DType::F64).unwrap().to_scalar().unwrap();
    (loss, gradient, measures)
}

pub(crate) fn tensor(logits: &[f64], width: usize) -> Tensor {
    Tensor::from_slice(logits, (logits.len() / width, width), &Device::Cpu).unwrap()
}

pub(crate) fn assert_near(ours: &[f64], theirs: &[f64], within: f64, what: &str) {
    assert_eq!(ours.len(), theirs.len());
    for (a, b) in ours.iter().zip(theirs) {
        assert!((a - b).abs() <= within, "{what}: {a}, not {b}");
    }
}

pub(crate) fn random_logits(rows: usize, width: usize, seed: u64) -> Vec<f64> {
    let mut random = Random::new(seed, "losses");
    (0..rows * width).map(|_| 2.0 * random.normal()).collect()
}

pub(crate) fn floats(logits: &[f64]) -> Vec<f32> {
    logits.iter().map(|x| *x as f32).collect()
}

/// log softmax, another way.
pub(crate) fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|x| x.exp()).sum();
    logits.iter().map(|x| x - sum.ln()).collect()
}

pub(crate) fn policy(discount: f64) -> Objective {
    objective(Loss::PolicyGradient { discount })
}
