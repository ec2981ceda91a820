//! Distillation losses against golden numbers, TRL and torch (references/losses.py), differences, and each other.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use candle_core::{DType, Device, Tensor, Var};
use pipit_distill::batch::Batch;
use pipit_distill::loss::{Loss, LossError, Objective, Taught};
use pipit_distill::model::ops::{Distillation, Frozen, frozen_distillation_loss};
use pipit_distill::teacher::{Scores, TopK};
use support::logits::{
    STUDENT, TEACHER, assert_near, batch, floats, full, log_softmax, objective, policy, random_logits, run,
    tensor,
};

const JSD: fn(f64) -> Loss = |beta| Loss::Jsd {
    beta,
    rescaled: false,
};
const LOSSES: [Loss; 9] = [
    Loss::ForwardKl,
    Loss::ReverseKl,
    Loss::Jsd {
        beta: 0.1,
        rescaled: false,
    },
    Loss::Jsd {
        beta: 0.5,
        rescaled: true,
    },
    Loss::SkewForwardKl { alpha: 0.1 },
    Loss::SkewReverseKl { alpha: 0.1 },
    Loss::SkewForwardKl { alpha: 0.0 },
    Loss::SkewReverseKl { alpha: 0.0 },
    Loss::TotalVariation,
];

/// The golden vector.
fn golden(objective: Objective) -> (f64, Vec<f64>) {
    let (loss, gradient, _) = run(&tensor(&STUDENT, 5), &[1], full(&TEACHER, 5), objective);
    (loss, gradient)
}

#[test]
fn values_and_gradients_are_the_golden_ones() {
    let values = [
        (Loss::ForwardKl, 0.157_735_56),
        (JSD(0.0), 0.157_735_56),
        (JSD(0.1), 0.013_990_04),
        (JSD(0.5), 0.038_202_76),
        (JSD(0.9), 0.014_431_09),
        (JSD(1.0), 0.164_968_03),
        (Loss::ReverseKl, 0.164_968_03),
        (Loss::SkewForwardKl { alpha: 0.1 }, 0.124_368_50),
        (Loss::SkewReverseKl { alpha: 0.1 }, 0.126_825_90),
    ];
    for (loss, value) in values {
        assert_near(&[golden(objective(loss)).0], &[value], 1e-8, loss.name());
    }
    let hot = |loss| {
        golden(Objective {
            temperature: 2.0,
            ..objective(loss)
        })
        .0
    };
    let values = [hot(Loss::ForwardKl), hot(JSD(0.5)), hot(Loss::ReverseKl)];
    assert_near(
        &values,
        &[0.070_456_27, 0.017_711_63, 0.073_913_19],
        1e-8,
        "T = 2",
    );
    let gradients = [
        (
            Loss::ForwardKl,
            [
                -0.142_294_56,
                0.126_745_52,
                -0.030_899_41,
                0.024_029_37,
                0.022_419_08,
            ],
        ),
        (
            JSD(0.5),
            [
                -0.026_556_12,
                0.033_931_45,
                -0.018_202_63,
                0.007_317_66,
                0.003_509_64,
            ],
        ),
        (
            Loss::ReverseKl,
            [
                -0.092_837_71,
                0.161_888_81,
                -0.122_961_81,
                0.049_940_44,
                0.003_970_27,
            ],
        ),
    ];
    for (loss, gradient) in gradients {
        assert_near(&golden(objective(loss)).1, &gradient, 1e-8, loss.name());
    }
    let top = Objective {
        top_k: Some(2),
        ..objective(Loss::ForwardKl)
    };
    assert_near(&[golden(top).0], &[0.139_209_63], 1e-8, "tail");
}

#[test]
fn trls_and_torchs_values_and_gradients_are_ours() {
    let fixture =
        candle_core::safetensors::load(support::fixture("losses.safetensors"), &Device::Cpu).unwrap();
    let teacher: Vec<f32> = support::floats(&fixture["teacher"]);
    let width = fixture["student"].dim(1).unwrap();
    let labels = fixture["labels"].to_vec1::<i64>().unwrap();
    let labels: Vec<u32> = labels.iter().map(|label| *label as u32).collect();
    let compare = |name: &str, objective: Objective, taught: Scores| {
        let value = fixture[name].to_scalar::<f64>().unwrap();
        let gradient = fixture[&format!("{name}.grad")].flatten_all().unwrap();
        let gradient = gradient.to_vec1::<f64>().unwrap();
        let student = fixture["student"].to_dtype(DType::F64).unwrap();
        let Scores::Full(rows) = &taught else {
            // Probabilities that went through f32.
            let (ours, ours_gradient, _) = run(&student, &labels, taught, objective);
            assert_near(&[ours], &[value], 2e-5 * value.max(1.0), name);
            assert_near(&ours_gradient, &gradient, 1e-5, name);
            return;
        };
        let mut copy = vec![0.0; teacher.len()];
        rows.read(0..labels.len(), &mut copy).unwrap();
        let (ours, ours_gradient, _) = run(&student, &labels, taught, objective);
        assert_near(&[ours], &[value], 1e-9 * value.max(1.0), name);
        assert_near(&ours_gradient, &gradient, 1e-9, name);
        let (ours, ours_gradient, _) = run(&fixture["student"], &labels, full(&copy, width), objective);
        assert_near(
            &[ours],
            &[value],
            2e-6 * value.max(1.0),
            &format!("{name} in f32"),
        );
        assert_near(&ours_gradient, &gradient, 3e-6, &format!("{name} in f32"));
    };
    for temperature in [0.7, 1.0, 2.0] {
        let of = |loss| Objective {
            temperature,
            ..objective(loss)
        };
        for beta in ["0.0", "0.1", "0.5", "0.9", "1.0"] {
            let loss = JSD(beta.parse().unwrap());
            let name = format!("trl.{beta}.{temperature:?}");
            compare(&name, of(loss), full(&teacher, width));
        }
        for (name, loss) in [("forward", Loss::ForwardKl), ("reverse", Loss::ReverseKl)] {
            let top = Objective {
                top_k: Some(8),
                ..of(loss)
            };
            let name = format!("top.{name}.{temperature:?}");
            compare(&name, top, full(&teacher, width));
            if temperature == 1.0 {
                let ids = fixture["top.ids"]
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<i64>()
                    .unwrap();
                let logprobs = fixture["top.logprobs"].to_dtype(DType::F32).unwrap();
                let top = TopK {
                    k: 8,
                    ids: ids.iter().map(|id| *id as u32).collect(),
                    logprobs: support::floats(&logprobs),
                };
                compare(&name, of(loss), Scores::Top(top));
            }
        }
    }
    for alpha in ["0.1", "0.5"] {
        let (forward, reverse) = (format!("skew_forward.{alpha}"), format!("skew_reverse.{alpha}"));
        let alpha = alpha.parse().unwrap();
        let full = || full(&teacher, width);
        compare(&forward, objective(Loss::SkewForwardKl { alpha }), full());
        compare(&reverse, objective(Loss::SkewReverseKl { alpha }), full());
    }
    compare(
        "total_variation",
        objective(Loss::TotalVariation),
        full(&teacher, width),
    );
}

#[test]
fn gradients_are_the_differences() {
    let (student, teacher) = (random_logits(3, 7, 1), floats(&random_logits(3, 7, 2)));
    let variants = |loss| {
        let plain = objective(loss);
        let scaled = Objective {
            temperature: 1.7,
            t_squared: true,
            ce_weight: 0.3,
            ..plain
        };
        let top = Objective {
            top_k: Some(3),
            ..scaled
        };
        [plain, scaled, top]
    };
    for objective in LOSSES.into_iter().flat_map(variants) {
        let of = |logits: &[f64]| run(&tensor(logits, 7), &[4, 0, 6], full(&teacher, 7), objective);
        let gradient = of(&student).1;
        for i in 0..student.len() {
            let at = |by: f64| {
                let mut moved = student.clone();
                moved[i] += by;
                of(&moved).0
            };
            let difference = (at(1e-6) - at(-1e-6)) / 2e-6;
            assert!(
                (difference - gradient[i]).abs() < 2e-8,
                "{objective:?}, {i}: {} but the difference is {difference}",
                gradient[i]
            );
        }
    }
}

#[test]
fn a_teacher_that_is_the_student_gives_zero_to_the_bit() {
    let student = random_logits(4, 300, 3);
    let narrow = floats(&student);
    let tokens = [4, 0, 299, 7];
    for loss in LOSSES {
        for top_k in [None, Some(1), Some(20)] {
            for temperature in [1.0, 0.7] {
                let objective = Objective {
                    top_k,
                    temperature,
                    ..objective(loss)
                };
                let logits = tensor(&student, 300).to_dtype(DType::F32).unwrap();
                let (value, gradient, measures) = run(&logits, &tokens, full(&narrow, 300), objective);
                assert_eq!(value, 0.0, "{objective:?}");
                assert!(gradient.iter().all(|g| *g == 0.0), "{objective:?}");
                assert_eq!((measures.loss, measures.sampled_kl), (0.0, Some(0.0)));
            }
        }
    }
}

#[test]
fn losses_are_never_negative_and_a_tail_hides_but_never_adds() {
    let tokens = [0, 1, 2, 3, 4, 5];
    for seed in 0..20 {
        let student = random_logits(6, 90, 10 + seed);
        // Near to the student, and far from it.
        for far in [1e-3, 0.1, 2.0] {
            let noise = random_logits(6, 90, 50 + seed);
            let teacher: Vec<f64> = student.iter().zip(noise).map(|(x, n)| x + far * n).collect();
            for loss in LOSSES {
                let value = |top_k| {
                    let objective = Objective {
                        top_k,
                        ..objective(loss)
                    };
                    run(
                        &tensor(&student, 90),
                        &tokens,
                        full(&floats(&teacher), 90),
                        objective,
                    )
                    .0
                };
                let whole = value(None);
                assert!(whole > 0.0, "{loss:?}: {whole}");
                let mut last = 0.0;
                for k in [1, 2, 10, 50, 89] {
                    let part = value(Some(k));
                    assert!(part >= last - 1e-12 && part <= whole + 1e-12, "{loss:?}, {k}");
                    last = part;
                }
                assert!((value(Some(90)) - whole).abs() < 1e-12 && value(Some(500)) == whole);
                // In f32 it keeps its sign where there is something to see.
                let narrow = tensor(&student, 90).to_dtype(DType::F32).unwrap();
                let narrow = run(&narrow, &tokens, full(&floats(&teacher), 90), objective(loss)).0;
                assert!(
                    (narrow - whole).abs() < 1e-6 * whole.max(1.0),
                    "{loss:?}: {narrow} {whole}"
                );
                assert!(narrow > 0.0 || whole < 1e-6, "{loss:?}: {narrow} {whole}");
            }
        }
    }
}

#[test]
fn a_constant_on_all_logits_changes_nothing() {
    for loss in LOSSES {
        let plain = golden(objective(loss));
        let student: Vec<f64> = STUDENT.iter().map(|x| x + 30.0).collect();
        let teacher = TEACHER.map(|x| x - 8.0);
        let (value, gradient, _) = run(&tensor(&student, 5), &[1], full(&teacher, 5), objective(loss));
        assert!((value - plain.0).abs() < 1e-12);
        assert_near(&gradient, &plain.1, 1e-12, loss.name());
    }
}

#[test]
fn jsd_goes_over_into_both_ends() {
    let [forward, reverse] = [Loss::ForwardKl, Loss::ReverseKl].map(|loss| golden(objective(loss)).0);
    // The plain value goes to zero, and jumps at the ends; divided by β or 1 − β it does not.
    for (near, within) in [(1e-2, 0.014), (1e-3, 0.0014)] {
        let (left, right) = (
            golden(objective(JSD(near))).0,
            golden(objective(JSD(1.0 - near))).0,
        );
        assert!((left / near / forward - 1.0).abs() < within, "{left}");
        assert!((right / near / reverse - 1.0).abs() < within, "{right}");
        let rescaled = |beta| golden(objective(Loss::Jsd { beta, rescaled: true }));
        assert!((rescaled(near).0 / forward - 1.0).abs() < 2.0 * within);
        assert!((rescaled(1.0 - near).0 / reverse - 1.0).abs() < 2.0 * within);
    }
    for rescaled in [false, true] {
        let end = |beta| golden(objective(Loss::Jsd { beta, rescaled }));
        assert_eq!(end(0.0), golden(objective(Loss::ForwardKl)));
        assert_eq!(end(1.0), golden(objective(Loss::ReverseKl)));
    }
}

#[test]
fn the_square_of_the_temperature_multiplies_the_loss_only_when_asked() {
    for loss in LOSSES {
        let at = |t_squared, ce_weight| {
            golden(Objective {
                temperature: 3.0,
                t_squared,
                ce_weight,
                ..objective(loss)
            })
        };
        let (plain, squared) = (at(false, 0.0), at(true, 0.0));
        assert!((squared.0 - 9.0 * plain.0).abs() < 1e-12);
        let nine: Vec<f64> = plain.1.iter().map(|g| 9.0 * g).collect();
        assert_near(&squared.1, &nine, 1e-12, loss.name());
        // The cross-entropy is that of temperature 1, whatever the temperature of the loss.
        let cross_entropy = -log_softmax(&STUDENT)[1];
        assert!((at(true, 0.5).0 - squared.0 - 0.5 * cross_entropy).abs() < 1e-12);
        assert!((at(false, 2.0).0 - plain.0 - 2.0 * cross_entropy).abs() < 1e-12);
    }
}

#[test]
fn a_chunk_of_rows_is_as_good_as_all_of_them_and_threads_change_no_bit() {
    let rows = 13;
    let tokens: Vec<u32> = (0..rows as u32).collect();
    let logits = tensor(&random_logits(rows, 70, 5), 70)
        .to_dtype(DType::F32)
        .unwrap();
    let teacher = floats(&random_logits(rows, 70, 6));
    for loss in LOSSES {
        let of = |chunk| {
            let objective = Objective {
                chunk,
                ce_weight: 0.5,
                ..objective(loss)
            };
            run(&logits, &tokens, full(&teacher, 70), objective)
        };
        let all = of(256);
        for chunk in [1, 7, rows] {
            let part = of(chunk);
            assert!((part.0 - all.0).abs() < 1e-6 * all.0);
            assert_near(&part.1, &all.1, 1e-6, loss.name());
        }
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| of(7))
        };
        assert_eq!(on(1), on(3));
    }
}

#[test]
fn a_teacher_with_padded_embeddings_is_cut_to_the_tokens_that_both_know() {
    let (student, teacher) = (random_logits(2, 9, 7), floats(&random_logits(2, 9, 8)));
    let part =
        |x: &[f64], width: usize| -> Vec<f64> { x.chunks(9).flat_map(|row| row[..width].to_vec()).collect() };
    let teacher_part: Vec<f32> = teacher.chunks(9).flat_map(|row| row[..6].to_vec()).collect();
    for loss in LOSSES {
        for top_k in [None, Some(3)] {
            let objective = Objective {
                top_k,
                ..objective(loss)
            };
            let equal = run(
                &tensor(&part(&student, 6), 6),
                &[1, 5],
                full(&teacher_part, 6),
                objective,
            );
            let padded_teacher = run(
                &tensor(&part(&student, 6), 6),
                &[1, 5],
                full(&teacher, 9),
                objective,
            );
            assert_eq!((equal.0, &equal.1), (padded_teacher.0, &padded_teacher.1));
            let padded_student = run(&tensor(&student, 9), &[1, 5], full(&teacher_part, 6), objective);
            assert_eq!((equal.0, equal.1), (padded_student.0, part(&padded_student.1, 6)));
            let beyond = padded_student.1.chunks(9).flat_map(|row| &row[6..]);
            assert!(beyond.into_iter().all(|g| *g == 0.0));
        }
    }
}

#[test]
fn only_labelled_rows_count_and_the_first_answer_token_is_one_of_them() {
    // Prompt a b, answer c d: c is predicted from b's row, d from c's.
    let batch = Batch::new([(&[1u32, 2, 3, 0][..], &[-100i64, -100, 3, 0][..])]);
    let logits = random_logits(4, 5, 9);
    let teacher = floats(&random_logits(2, 5, 10));
    let of = |logits: &[f64]| {
        let var = Var::from_tensor(&tensor(logits, 5)).unwrap();
        let identity = Frozen::Dense(Tensor::eye(5, DType::F64, &Device::Cpu).unwrap());
        let taught = full(&teacher, 5).into();
        let distillation = Distillation::new(&batch, taught, &objective(Loss::ForwardKl), 5).unwrap();
        let (loss, _) = frozen_distillation_loss(&var, &identity, distillation).unwrap();
        let gradient = loss
            .backward()
            .unwrap()
            .get(&var)
            .unwrap()
            .to_vec2::<f64>()
            .unwrap();
        (loss.to_scalar::<f64>().unwrap(), gradient)
    };
    let (loss, gradient) = of(&logits);
    let by_hand: f64 = [(1, 0), (2, 1)]
        .iter()
        .map(|(student, taught)| {
            let q = log_softmax(&logits[student * 5..][..5]);
            let teacher: Vec<f64> = teacher[taught * 5..][..5].iter().map(|x| f64::from(*x)).collect();
            let p = log_softmax(&teacher);
            p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
        })
        .sum();
    assert!((loss - by_hand).abs() < 1e-12, "{loss}, by hand {by_hand}");
    assert!(gradient[0].iter().chain(&gradient[3]).all(|g| *g == 0.0));
    assert!(gradient[1].iter().chain(&gradient[2]).all(|g| *g != 0.0));
    // Whatever stands in the other rows.
    let mut other = logits.clone();
    (0..5).for_each(|i| (other[i], other[15 + i]) = (77.0 + i as f64, f64::NAN));
    assert_eq!(of(&other).0.to_bits(), loss.to_bits());
}

#[test]
fn without_a_label_the_loss_is_zero() {
    for loss in LOSSES.into_iter().chain([Loss::PolicyGradient { discount: 0.5 }]) {
        let taught = Taught {
            scores: full(&[], 5),
            old: Some(Vec::new()),
        };
        let logits = Tensor::zeros((0, 5), DType::F32, &Device::Cpu).unwrap();
        let (value, gradient, measures) = run(&logits, &[], taught, objective(loss));
        assert_eq!((value, gradient.len(), measures.loss), (0.0, 0, 0.0));
    }
}

#[test]
fn reverse_kl_picks_one_mode_and_forward_kl_covers_both() {
    // A student with one mode, on a line: its logits are −(x − centre)² / width.
    let teacher: Vec<f64> = (0..40)
        .map(|x| {
            let mode = |centre: f64| (-(f64::from(x) - centre).powi(2) / 8.0).exp();
            (mode(8.0) + mode(30.0) + 1e-9).ln()
        })
        .collect();
    let narrow = floats(&teacher);
    let fit = |loss: Loss| {
        let (mut centre, mut log_width) = (12.0f64, 2.0f64);
        for _ in 0..4000 {
            let width = log_width.exp();
            let logits: Vec<f64> = (0..40)
                .map(|x| -(f64::from(x) - centre).powi(2) / width)
                .collect();
            let gradient = run(&tensor(&logits, 40), &[0], full(&narrow, 40), objective(loss)).1;
            let places = (0..40).map(f64::from).zip(&gradient);
            let by_centre: f64 = places.clone().map(|(x, g)| g * 2.0 * (x - centre) / width).sum();
            let by_width: f64 = places.map(|(x, g)| g * (x - centre).powi(2) / width).sum();
            centre -= 0.5 * by_centre;
            log_width -= 0.02 * by_width;
        }
        (centre, log_width.exp())
    };
    let (centre, width) = fit(Loss::ReverseKl);
    assert!(
        (centre - 8.0).abs() < 0.5 && (width - 8.0).abs() < 2.0,
        "{centre} {width}"
    );
    let (centre, width) = fit(Loss::ForwardKl);
    assert!(
        (15.0..23.0).contains(&centre) && width > 100.0,
        "{centre} {width}"
    );
}

#[test]
fn what_cannot_be_computed_is_refused_by_name() {
    let refused = |objective: Objective| objective.check().unwrap_err().to_string();
    let base = objective(Loss::ForwardKl);
    for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(refused(Objective { temperature, ..base }).contains("temperature"));
    }
    for beta in [-0.1, 1.1, f64::NAN] {
        assert!(refused(objective(JSD(beta))).contains("beta"));
    }
    assert!(refused(objective(Loss::SkewForwardKl { alpha: 1.0 })).contains("alpha"));
    assert!(refused(objective(Loss::SkewReverseKl { alpha: -0.1 })).contains("alpha"));
    assert!(refused(policy(1.5)).contains("discount"));
    let top_k = Some(0);
    assert!(refused(Objective { top_k, ..base }).contains("top_k"));
    assert!(
        refused(Objective {
            ce_weight: -1.0,
            ..base
        })
        .contains("ce_weight")
    );
    assert!(refused(Objective { chunk: 0, ..base }).contains("chunk"));
    LOSSES.iter().for_each(|loss| objective(*loss).check().unwrap());

    let top = |ids: &[u32], logprobs: &[f32]| {
        Scores::Top(TopK {
            k: 2,
            ids: ids.to_vec(),
            logprobs: logprobs.to_vec(),
        })
    };
    let scores = |objective: Objective, taught: Taught| -> String {
        Distillation::new(&batch(&[1]), taught, &objective, 5)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default()
    };
    let labels = || Scores::Label(vec![-1.0]);
    let hot = Objective {
        temperature: 2.0,
        ..base
    };
    let two = || top(&[1, 2], &[-1.0, -1.0]);
    assert!(scores(base, labels().into()).contains("forward KL cannot be computed from the probabilities"));
    assert!(scores(policy(0.0), two().into()).contains("policy gradient cannot"));
    assert!(scores(hot, two().into()).contains("temperature 2 needs all logits"));
    assert!(scores(policy(0.5), labels().into()).contains("discount"));
    assert!(scores(base, top(&[1, 1], &[-1.0, -1.0]).into()).contains("a token twice"));
    assert!(scores(base, top(&[1, 2], &[-1.0, f32::NAN]).into()).contains("NaN"));
    assert!(scores(base, top(&[1, 2, 3], &[-1.0; 3]).into()).contains("3 tokens"));
    assert!(scores(base, full(&[0.0; 10], 5).into()).contains("2 rows of scores for 1 targets"));
    assert_eq!(scores(base, two().into()), "");
    assert_eq!(
        objective(Loss::ReverseKl).accepts(&labels()),
        Err(LossError::Scores {
            loss: "reverse KL",
            scores: "the probabilities of the labels",
            hint: "policy gradient can; or ask for the most probable tokens",
        })
    );
}

#[test]
fn one_token_and_a_tail_are_not_zero_under_reverse_kl() {
    // Without a tail, one renormalised token has probability 1 under both.
    let one = Scores::Top(TopK {
        k: 1,
        ids: vec![2],
        logprobs: vec![-0.4],
    });
    let (value, gradient, measures) = run(&tensor(&STUDENT, 5), &[1], one, objective(Loss::ReverseKl));
    let q = log_softmax(&STUDENT)[2];
    let kl = |p: f64, q: f64| q * (q / p).ln();
    let p = f64::from(-0.4f32).exp();
    assert!(
        (value - kl(p, q.exp()) - kl(1.0 - p, 1.0 - q.exp())).abs() < 1e-12,
        "{value}"
    );
    assert!(gradient.iter().all(|g| *g != 0.0) && gradient.iter().sum::<f64>().abs() < 1e-12);
    assert_eq!(measures.sampled_kl, None);
}
