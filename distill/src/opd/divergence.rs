//! How far a student is from its teacher on given texts.

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;
use serde::Serialize;

use super::OpdError;
use crate::batch::Batch;
use crate::data::Sample;
use crate::model::{Mode, Model};
use crate::opd::Task;
use crate::teacher::{Asked, LogitRows, Scores, Teacher, copy_logits};

/// Rows of logits that exist at a time.
const CHUNK: usize = 64;

/// Averages over the labelled tokens of texts. P is the teacher, Q the student, both at temperature 1. Of a teacher
/// that tells its most probable tokens only, the others are one token: the divergences are lower bounds then
/// (data processing), and the acceptance an upper one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Divergence {
    /// Labelled tokens.
    pub tokens: usize,
    /// KL(P‖Q), nats a token; none where the teacher tells the labels' probabilities only.
    pub forward_kl: Option<f64>,
    /// KL(Q‖P), nats a token.
    pub reverse_kl: Option<f64>,
    /// 1 − TV(P, Q): the chance that speculative decoding accepts the student's token.
    pub acceptance_rate: Option<f64>,
    /// The share of tokens at which both find the same token the most probable.
    pub top1_agreement: Option<f64>,
    /// −log Q of the labels, nats a token.
    pub cross_entropy: f64,
    /// −log P of the labels, nats a token; none where the teacher does not tell it of all.
    pub teacher_cross_entropy: Option<f64>,
}

impl Divergence {
    /// What decides which evaluation is the best: KL(teacher‖student), or the cross-entropy where that is not known.
    pub fn eval_loss(&self) -> f64 {
        self.forward_kl.unwrap_or(self.cross_entropy)
    }
}

/// Sums over tokens.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum {
    tokens: usize,
    cross_entropy: f64,
    teacher_cross_entropy: Option<f64>,
    pair: Option<Pair>,
}

/// What needs both distributions, summed over tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Pair {
    forward_kl: f64,
    reverse_kl: f64,
    accepted: f64,
    agreed: f64,
}

impl Sum {
    /// Adds the tokens of a batch: the teacher's scores and the student's logits, a row for each label.
    pub(super) fn add(
        &mut self,
        scores: &Scores,
        student: &dyn LogitRows,
        labels: &[u32],
    ) -> candle_core::Result<()> {
        let mut rows = (Vec::new(), Vec::new());
        for first in (0..labels.len()).step_by(CHUNK) {
            let chunk = first..labels.len().min(first + CHUNK);
            read(student, chunk.clone(), &mut rows.0)?;
            let width = rows.0.len() / chunk.len();
            let labels = &labels[chunk.clone()];
            let of_rows: Vec<Row> = match scores {
                Scores::Full(teacher) => {
                    read(teacher.as_ref(), chunk.clone(), &mut rows.1)?;
                    let theirs = rows.1.len() / chunk.len();
                    let pairs = rows
                        .1
                        .par_chunks_exact(theirs)
                        .zip(rows.0.par_chunks_exact(width));
                    pairs
                        .zip(labels)
                        .map(|((p, q), label)| Row::full(p, q, *label))
                        .collect()
                }
                Scores::Top(top) => {
                    let range = chunk.start * top.k..chunk.end * top.k;
                    let ids = top.ids[range.clone()].par_chunks_exact(top.k);
                    let logprobs = top.logprobs[range].par_chunks_exact(top.k);
                    let teacher = ids.zip(logprobs).zip(rows.0.par_chunks_exact(width));
                    teacher
                        .zip(labels)
                        .map(|(((ids, p), q), label)| Row::top(ids, p, q, *label))
                        .collect()
                }
                Scores::Label(logprobs) => {
                    let teacher = logprobs[chunk.clone()].par_iter();
                    teacher
                        .zip(rows.0.par_chunks_exact(width))
                        .zip(labels)
                        .map(|((p, q), label)| Row::label(*p, q, *label))
                        .collect()
                }
            };
            of_rows.iter().for_each(|row| self.add_row(row));
        }
        Ok(())
    }

    fn add_row(&mut self, row: &Row) {
        let first = self.tokens == 0;
        self.tokens += 1;
        self.cross_entropy += row.cross_entropy;
        self.teacher_cross_entropy = match (self.teacher_cross_entropy, row.teacher_cross_entropy) {
            (None, more) if first => more,
            (Some(sum), Some(more)) => Some(sum + more),
            _ => None,
        };
        if let Some(more) = row.pair {
            let sum = self.pair.get_or_insert_default();
            sum.forward_kl += more.forward_kl;
            sum.reverse_kl += more.reverse_kl;
            sum.accepted += more.accepted;
            sum.agreed += more.agreed;
        }
    }

    /// The averages.
    pub(super) fn divergence(&self) -> Divergence {
        let mean = |sum: f64| sum / self.tokens.max(1) as f64;
        let of_pair = |value: fn(&Pair) -> f64| self.pair.as_ref().map(|pair| mean(value(pair)));
        Divergence {
            tokens: self.tokens,
            forward_kl: of_pair(|pair| pair.forward_kl),
            reverse_kl: of_pair(|pair| pair.reverse_kl),
            acceptance_rate: of_pair(|pair| pair.accepted),
            top1_agreement: of_pair(|pair| pair.agreed),
            cross_entropy: mean(self.cross_entropy),
            teacher_cross_entropy: self.teacher_cross_entropy.map(mean),
        }
    }
}

fn read(rows: &dyn LogitRows, range: Range<usize>, out: &mut Vec<f32>) -> candle_core::Result<()> {
    out.resize(range.len() * rows.vocab_size(), 0.0);
    rows.read(range, out)
}

/// One token.
struct Row {
    cross_entropy: f64,
    teacher_cross_entropy: Option<f64>,
    pair: Option<Pair>,
}

impl Row {
    /// All logits of both; what only one of them knows is left out.
    fn full(teacher: &[f32], student: &[f32], label: u32) -> Self {
        let shared = teacher.len().min(student.len());
        let (p, q) = (log_softmax(&teacher[..shared]), log_softmax(&student[..shared]));
        let of_label = |logs: &[f64]| logs.get(label as usize).map(|log| -log);
        Self {
            cross_entropy: of_label(&q).unwrap_or(f64::INFINITY),
            teacher_cross_entropy: of_label(&p),
            pair: Some(Pair::of(&p, &q)),
        }
    }

    /// The teacher's most probable tokens, and one that is all others.
    fn top(ids: &[u32], logprobs: &[f32], student: &[f32], label: u32) -> Self {
        let all = log_softmax(student);
        let of = |id: &u32| all.get(*id as usize).copied().unwrap_or(f64::NEG_INFINITY);
        let mut p: Vec<f64> = logprobs.iter().map(|log| f64::from(*log)).collect();
        let mut q: Vec<f64> = ids.iter().map(of).collect();
        let rest = |logs: &[f64]| {
            (1.0 - logs.iter().map(|log| log.exp()).sum::<f64>())
                .max(1e-12)
                .ln()
        };
        let tails = (rest(&p), rest(&q));
        let known = ids.iter().position(|id| *id == label).map(|at| -p[at]);
        p.push(tails.0);
        q.push(tails.1);
        Self {
            cross_entropy: -of(&label),
            teacher_cross_entropy: known,
            pair: Some(Pair::of(&p, &q)),
        }
    }

    /// The teacher's probability of the label only.
    fn label(logprob: f32, student: &[f32], label: u32) -> Self {
        let all = log_softmax(student);
        Self {
            cross_entropy: all.get(label as usize).map_or(f64::INFINITY, |log| -log),
            teacher_cross_entropy: Some(-f64::from(logprob)),
            pair: None,
        }
    }
}

impl Pair {
    /// Of two distributions, as logarithms.
    fn of(p: &[f64], q: &[f64]) -> Self {
        let mut pair = Self::default();
        for (log_p, log_q) in p.iter().zip(q) {
            let (p, q) = (log_p.exp(), log_q.exp());
            // 0 · log 0 is 0.
            pair.forward_kl += if p > 0.0 { p * (log_p - log_q) } else { 0.0 };
            pair.reverse_kl += if q > 0.0 { q * (log_q - log_p) } else { 0.0 };
            pair.accepted += p.min(q);
        }
        pair.agreed = f64::from(u8::from(largest(p) == largest(q)));
        pair
    }
}

fn largest(logs: &[f64]) -> usize {
    let start = (0, f64::NEG_INFINITY);
    logs.iter()
        .enumerate()
        .fold(start, |best, (i, x)| if *x > best.1 { (i, *x) } else { best })
        .0
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - top).exp()).sum();
    let log_sum = top + sum.ln();
    logits.iter().map(|x| f64::from(*x) - log_sum).collect()
}

/// The student's logits at the labels of a batch, computed when they are read.
struct StudentRows<'a> {
    model: &'a Model,
    hidden: Tensor,
}

impl LogitRows for StudentRows<'_> {
    fn rows(&self) -> usize {
        self.hidden.dims()[0]
    }

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn read(&self, rows: Range<usize>, out: &mut [f32]) -> candle_core::Result<()> {
        let hidden = self.hidden.narrow(0, rows.start, rows.len())?;
        copy_logits(&self.model.logits(&hidden)?, out)
    }
}

/// Compares student and teacher on the answers that rows have, `batch_size` of them at a time.
pub fn measure(
    student: &Model,
    teacher: &mut dyn Teacher,
    tasks: &[Task],
    batch_size: usize,
) -> Result<Divergence, OpdError> {
    let mut sum = Sum::default();
    for part in tasks.chunks(batch_size.max(1)) {
        let asked = asked(part);
        let (batch, labels) = batch_and_labels(&asked);
        let scores = teacher.score(&asked)?;
        let rows = batch.targets().into_iter().map(|(row, _)| row as u32).collect();
        let hidden = student.hidden(&batch, Mode::INFERENCE)?;
        let rows = Tensor::from_vec(rows, labels.len(), hidden.device())?;
        let rows = StudentRows {
            model: student,
            hidden: hidden.index_select(&rows, 0)?,
        };
        sum.add(&scores, &rows, &labels)?;
    }
    Ok(sum.divergence())
}

/// The texts as a batch, and the labels that are asked about.
fn batch_and_labels(asked: &[Asked<'_>]) -> (Batch, Vec<u32>) {
    let batch = Batch::new(asked.iter().map(|text| (text.ids, text.labels)));
    let labels = batch.targets().into_iter().map(|(_, label)| label).collect();
    (batch, labels)
}

/// The same of a student that is asked as a teacher is: a GGUF file in llama.cpp.
pub(crate) fn measure_teacher(
    student: &mut dyn Teacher,
    teacher: &mut dyn Teacher,
    tasks: &[Task],
    batch_size: usize,
) -> Result<Divergence, OpdError> {
    let mut sum = Sum::default();
    for part in tasks.chunks(batch_size.max(1)) {
        let asked = asked(part);
        let (_, labels) = batch_and_labels(&asked);
        let scores = teacher.score(&asked)?;
        if let Scores::Full(rows) = student.score(&asked)? {
            sum.add(&scores, rows.as_ref(), &labels)?;
        }
    }
    Ok(sum.divergence())
}

/// The rows with the answers that they have.
fn asked(tasks: &[Task]) -> Vec<Asked<'_>> {
    let answered = tasks
        .iter()
        .filter_map(|task| Some((task, task.sample.as_ref()?)));
    let asked = answered.map(|(task, Sample { ids, labels, .. })| Asked {
        ids,
        labels,
        route: task.route.as_deref(),
    });
    asked.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::teacher::TopK;

    struct Given(Vec<f32>, usize);

    impl LogitRows for Given {
        fn rows(&self) -> usize {
            self.0.len() / self.1
        }
        fn vocab_size(&self) -> usize {
            self.1
        }
        fn read(&self, rows: Range<usize>, out: &mut [f32]) -> candle_core::Result<()> {
            out.copy_from_slice(&self.0[rows.start * self.1..rows.end * self.1]);
            Ok(())
        }
    }

    const STUDENT: [f32; 5] = [0.0, 1.0, 2.0, -1.0, 0.5];
    const TEACHER: [f32; 5] = [1.0, 0.0, 2.0, -3.0, 0.25];

    fn found(scores: &Scores) -> Divergence {
        let mut sum = Sum::default();
        sum.add(scores, &Given(STUDENT.repeat(130), 5), &[2; 130])
            .unwrap();
        sum.divergence()
    }

    fn near(found: Option<f64>, expected: f64) {
        assert!((found.unwrap() - expected).abs() < 1e-7, "{found:?} {expected}");
    }

    #[test]
    fn the_golden_vector() {
        // A teacher with an embedding that is padded to more rows, over several chunks.
        let mut padded = TEACHER.to_vec();
        padded.extend([9.0, 9.0]);
        let found = found(&Scores::Full(Box::new(Given(padded.repeat(130), 7))));
        near(found.forward_kl, 0.157_735_56);
        near(found.reverse_kl, 0.164_968_03);
        let (p, q) = (log_softmax(&TEACHER), log_softmax(&STUDENT));
        let tv: f64 = p
            .iter()
            .zip(&q)
            .map(|(p, q)| (p.exp() - q.exp()).abs())
            .sum::<f64>()
            / 2.0;
        near(found.acceptance_rate, 1.0 - tv);
        assert_eq!((found.tokens, found.top1_agreement), (130, Some(1.0)));
        near(Some(found.cross_entropy), -q[2]);
        near(found.teacher_cross_entropy, -p[2]);
    }

    #[test]
    fn of_a_teachers_top_two_the_rest_is_one_token() {
        let p = log_softmax(&TEACHER);
        let found = found(&Scores::Top(TopK {
            k: 2,
            ids: [2, 0].repeat(130),
            logprobs: [p[2] as f32, p[0] as f32].repeat(130),
        }));
        near(found.forward_kl, 0.139_209_63);
        near(found.teacher_cross_entropy, -p[2]);
    }

    #[test]
    fn of_labels_only_the_cross_entropies_are_known() {
        let found = found(&Scores::Label(vec![-0.5; 130]));
        assert_eq!((found.forward_kl, found.acceptance_rate), (None, None));
        assert_eq!(found.teacher_cross_entropy, Some(0.5));
        assert_eq!(found.eval_loss(), found.cross_entropy);
    }
}
