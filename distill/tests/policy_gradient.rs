//! The policy gradient against the reverse KL, and its importance ratio and discount by hand.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use candle_core::{DType, Device, Tensor};
use pipit_distill::batch::Batch;
use pipit_distill::loss::{Loss, Taught};
use pipit_distill::model::ops::{Distillation, Frozen, frozen_distillation_loss};
use pipit_distill::random::Random;
use pipit_distill::teacher::Scores;
use support::logits::{
    STUDENT, TEACHER, assert_near, floats, full, log_softmax, objective, policy, random_logits, run, tensor,
};

#[test]
fn the_policy_gradient_is_that_of_the_reverse_kl_on_average_over_the_students_tokens() {
    let q = log_softmax(&STUDENT);
    let exact = run(
        &tensor(&STUDENT, 5),
        &[1],
        full(&TEACHER, 5),
        objective(Loss::ReverseKl),
    )
    .1;
    let gradient = |token: u32| {
        let (_, gradient, measures) = run(&tensor(&STUDENT, 5), &[token], full(&TEACHER, 5), policy(0.0));
        (gradient, measures.sampled_kl.unwrap())
    };
    let gradients: Vec<(Vec<f64>, f64)> = (0..5).map(gradient).collect();
    let mean = |i: usize| {
        (0..5)
            .map(|token| q[token].exp() * gradients[token].0[i])
            .sum::<f64>()
    };
    assert_near(&(0..5).map(mean).collect::<Vec<_>>(), &exact, 1e-7, "enumeration");
    let kl: f64 = (0..5).map(|token| q[token].exp() * gradients[token].1).sum();
    assert!((kl - 0.164_968_03).abs() < 1e-7);
    // The same from samples, within four standard errors.
    let mut random = Random::new(3, "losses");
    let count = 200_000;
    let (mut sums, mut squares) = ([0.0; 5], [0.0; 5]);
    for _ in 0..count {
        let mut left = random.uniform();
        let token = (0..4).find(|token| {
            left -= q[*token].exp();
            left < 0.0
        });
        for (i, g) in gradients[token.unwrap_or(4)].0.iter().enumerate() {
            sums[i] += g;
            squares[i] += g * g;
        }
    }
    for i in 0..5 {
        let mean = sums[i] / f64::from(count);
        let error = ((squares[i] / f64::from(count) - mean * mean) / f64::from(count)).sqrt();
        assert!(
            (mean - exact[i]).abs() < 4.0 * error,
            "{i}: {mean} ± {error}, not {}",
            exact[i]
        );
    }
}

#[test]
fn an_old_student_is_weighed_by_the_importance_ratio() {
    let tokens = [2, 1, 4];
    let (student, teacher) = (random_logits(3, 5, 20), floats(&random_logits(3, 5, 21)));
    let of_token = |logits: &[f64], i: usize| log_softmax(&logits[i * 5..][..5])[tokens[i] as usize];
    let wide: Vec<f64> = teacher.iter().map(|x| f64::from(*x)).collect();
    let now: Vec<f64> = (0..3).map(|i| of_token(&student, i)).collect();
    let log_p: Vec<f64> = (0..3).map(|i| of_token(&wide, i)).collect();
    let with = |old: Option<Vec<f32>>, discount| {
        let scores = full(&teacher, 5);
        run(
            &tensor(&student, 5),
            &tokens,
            Taught { scores, old },
            policy(discount),
        )
    };
    // On the first step the student is the one that sampled: the ratio is 1.
    let same = with(Some(now.iter().map(|x| *x as f32).collect()), 0.0);
    let fresh = with(None, 0.0);
    assert!((same.0 - fresh.0).abs() < 1e-6);
    assert_near(&same.1, &fresh.1, 1e-6, "ratio 1");
    // Later it is not. A reward counts at the tokens before it.
    let old = [-1.5f32, -0.5, -2.0];
    let rewards: Vec<f64> = log_p.iter().zip(old).map(|(p, old)| p - f64::from(old)).collect();
    let advantages = [
        rewards[0] + 0.9 * rewards[1] + 0.81 * rewards[2],
        rewards[1] + 0.9 * rewards[2],
        rewards[2],
    ];
    let (loss, gradient, _) = with(Some(old.to_vec()), 0.9);
    let weights: Vec<f64> = (0..3)
        .map(|i| (now[i] - f64::from(old[i])).exp() * advantages[i])
        .collect();
    assert!((loss + weights.iter().sum::<f64>()).abs() < 1e-6);
    for i in 0..3 {
        let q = log_softmax(&student[i * 5..][..5]);
        for (j, q) in q.iter().enumerate() {
            let at_token = if j == tokens[i] as usize { 1.0 } else { 0.0 };
            assert!((gradient[i * 5 + j] + weights[i] * (at_token - q.exp())).abs() < 1e-6);
        }
    }
    // What a served teacher tells is enough.
    let labels = Scores::Label(log_p.iter().map(|x| *x as f32).collect());
    let taught = Taught {
        scores: labels,
        old: Some(old.to_vec()),
    };
    let served = run(&tensor(&student, 5), &tokens, taught, policy(0.9));
    assert!((served.0 - loss).abs() < 1e-5);
    // Another sequence's reward counts nowhere else.
    let two = Batch::new([(&[0u32, 2, 1][..], &[-100i64, 2, 1][..]), (&[0, 4], &[-100, 4])]);
    let taught = Taught {
        scores: Scores::Label(log_p.iter().map(|x| *x as f32).collect()),
        old: Some(old.to_vec()),
    };
    let distillation = Distillation::new(&two, taught, &policy(0.9), 5).unwrap();
    let rows = [&student[..10], &[0.0; 5], &student[10..], &[0.0; 5]].concat();
    let identity = Frozen::Dense(Tensor::eye(5, DType::F64, &Device::Cpu).unwrap());
    let (apart, _) = frozen_distillation_loss(&tensor(&rows, 5), &identity, distillation).unwrap();
    let ratio = |i: usize| (now[i] - f64::from(old[i])).exp();
    let by_hand = ratio(0) * (rewards[0] + 0.9 * rewards[1]) + ratio(1) * rewards[1] + ratio(2) * rewards[2];
    assert!((apart.to_scalar::<f64>().unwrap() + by_hand).abs() < 1e-5);
}
