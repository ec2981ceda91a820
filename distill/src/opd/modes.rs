//! A toy that shows what the two directions of KL do: a student that has one hump learns from a teacher that has two.

use crate::loss::Loss;

const PLACES: usize = 41;

/// A hump around `mean`, in logits.
fn hump(mean: f64, log_width: f64) -> impl Fn(usize) -> f64 {
    move |place| -0.5 * ((place as f64 - mean) / log_width.exp()).powi(2)
}

fn log_softmax(logits: impl Fn(usize) -> f64) -> Vec<f64> {
    let logits: Vec<f64> = (0..PLACES).map(logits).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    logits.iter().map(|x| x - max - sum.ln()).collect()
}

/// Two humps, at 10 and 30, the second one a little higher.
fn teacher() -> Vec<f64> {
    let (left, right) = (
        log_softmax(hump(10.0, 1.5f64.ln())),
        log_softmax(hump(30.0, 1.5f64.ln())),
    );
    left.iter()
        .zip(&right)
        .map(|(l, r)| (0.45 * l.exp() + 0.55 * r.exp()).ln())
        .collect()
}

/// The mean and the width that descent comes to from a wide hump that is nearer to the right one.
fn learned(loss: Loss) -> (f64, f64) {
    let (mut mean, mut log_width) = (26.0, 6f64.ln());
    for _ in 0..20_000 {
        let (mut log_p, mut log_q) = (teacher(), log_softmax(hump(mean, log_width)));
        loss.of_log_probabilities(&mut log_p, &mut log_q);
        let (mut d_mean, mut d_log_width) = (0.0, 0.0);
        for (place, d_logit) in log_q.iter().enumerate() {
            let z = (place as f64 - mean) / log_width.exp();
            d_mean += d_logit * z / log_width.exp();
            d_log_width += d_logit * z * z;
        }
        mean -= 0.5 * d_mean;
        log_width -= 0.01 * d_log_width;
    }
    (mean, log_width.exp())
}

#[test]
fn forward_kl_covers_both_humps_and_reverse_kl_keeps_to_one() {
    let (mean, width) = learned(Loss::ForwardKl);
    assert!((mean - 21.0).abs() < 1.0 && width > 7.0, "{mean} {width}");
    let (mean, width) = learned(Loss::ReverseKl);
    assert!((mean - 30.0).abs() < 1.0 && width < 2.5, "{mean} {width}");
}
