//! Distillation: the loss between a student's and a teacher's distributions, over an output layer that is trained,
//! frozen, or frozen under an adapter. Of both only a chunk of logits exists at a time.

use std::collections::HashSet;
use std::ops::AddAssign;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Error, Result, Tensor, Var};
use rayon::prelude::*;

use super::cross_entropy::loss_and_gradient;
use super::frozen::Frozen;
use super::head_loss::{Criterion, Targets, compute_here, frozen_head_loss, head_loss};
use super::lora_head_loss::{HeadAdapter, lora_head_loss};
use super::real::Real;
use crate::batch::Batch;
use crate::loss::{
    Loss, LossError, Measures, Objective, Sampled, Taught, composed_log_softmax, log_softmax, sum,
};
use crate::teacher::{LogitRows, Scores, TopK};

const OP: &str = "distillation";
/// What a tail has at least: where the most probable tokens were rounded to 1 in f32, it is not known to be less.
const SMALLEST_TAIL: f64 = 1e-7;

/// A loss between a student and its teacher over the targets of a batch.
pub struct Distillation {
    targets: Targets,
    objective: Objective,
    teacher: Told,
    measures: Arc<Mutex<Measures>>,
}

/// What the teacher told.
enum Told {
    Full(Box<dyn LogitRows>),
    Top(TopK),
    Sampled(Sampled),
}

/// The sums of a row.
#[derive(Clone, Copy, Default)]
struct Row {
    loss: f64,
    cross_entropy: f64,
    sampled_kl: f64,
}

impl AddAssign for Row {
    fn add_assign(&mut self, other: Self) {
        self.loss += other.loss;
        self.cross_entropy += other.cross_entropy;
        self.sampled_kl += other.sampled_kl;
    }
}

/// The **sum** over the targets of the loss, a scalar, with its parts. hidden `[rows, d]`, weight `[vocabulary, d]`,
/// which gets a gradient too.
pub fn distillation_loss(
    hidden: &Tensor,
    weight: &Tensor,
    distillation: Distillation,
) -> Result<(Tensor, Measures)> {
    measured(distillation, |distillation| {
        head_loss(hidden, weight, distillation)
    })
}

/// The same with a weight that gets no gradient.
pub fn frozen_distillation_loss(
    hidden: &Tensor,
    weight: &Frozen,
    distillation: Distillation,
) -> Result<(Tensor, Measures)> {
    measured(distillation, |distillation| {
        frozen_head_loss(hidden, weight, distillation)
    })
}

/// The same under an adapter, whose tensors get gradients.
pub fn lora_distillation_loss(
    hidden: &Tensor,
    weight: &Frozen,
    adapter: HeadAdapter<'_>,
    distillation: Distillation,
) -> Result<(Tensor, Measures)> {
    measured(distillation, |distillation| {
        lora_head_loss(hidden, weight, adapter, distillation)
    })
}

fn measured(
    distillation: Distillation,
    loss: impl FnOnce(Distillation) -> Result<Tensor>,
) -> Result<(Tensor, Measures)> {
    let measures = distillation.measures.clone();
    let loss = loss(distillation)?;
    let measures = *measures.lock().unwrap_or_else(PoisonError::into_inner);
    Ok((loss, measures))
}

impl Distillation {
    /// Of a batch whose student tells `vocabulary` tokens apart. A teacher that knows more or fewer is compared over
    /// the tokens that both know, which come first. Refuses scores that do not belong to the batch, or that say less
    /// than the loss is made of.
    pub fn new(batch: &Batch, taught: Taught, objective: &Objective, vocabulary: usize) -> Result<Self> {
        objective.check().map_err(Error::wrap)?;
        objective.accepts(&taught.scores).map_err(Error::wrap)?;
        let targets = Targets {
            rows: batch.targets(),
            chunk: objective.chunk,
        };
        let count = targets.rows.len();
        let rows = match &taught.scores {
            Scores::Full(logits) => logits.rows(),
            Scores::Label(log_p) => log_p.len(),
            Scores::Top(top) => {
                check_top(top)?;
                top.ids.len() / top.k
            }
        };
        if rows != count {
            candle_core::bail!("{OP}: {rows} rows of scores for {count} targets");
        }
        let teacher = match (objective.loss, taught.scores) {
            (Loss::PolicyGradient { discount }, scores) => {
                let log_p = of_labels(scores, &targets, objective.temperature, vocabulary)?;
                let old = taught
                    .old
                    .map(|old| old.into_iter().map(f64::from).collect::<Vec<_>>());
                match &old {
                    None if discount > 0.0 => return Err(Error::wrap(LossError::Discount)),
                    Some(old) if old.len() != count => {
                        candle_core::bail!("{OP}: {} sampled probabilities for {count} targets", old.len())
                    }
                    _ => {}
                }
                let starts = batch.starts();
                let sequence = |(row, _): &(usize, u32)| starts.partition_point(|start| start <= row);
                let sequences: Vec<usize> = targets.rows.iter().map(sequence).collect();
                Told::Sampled(Sampled::new(log_p, old, &sequences, discount))
            }
            (_, Scores::Full(logits)) => Told::Full(logits),
            (_, Scores::Top(top)) => Told::Top(top),
            (_, Scores::Label(_)) => candle_core::bail!("{OP}: labels only"),
        };
        let measures = Measures {
            loss: 0.0,
            cross_entropy: (objective.ce_weight > 0.0).then_some(0.0),
            sampled_kl: (!matches!(teacher, Told::Top(_))).then_some(0.0),
        };
        Ok(Self {
            targets,
            objective: *objective,
            teacher,
            measures: Arc::new(Mutex::new(measures)),
        })
    }

    /// Adds to what is measured.
    fn count(&self, sums: Row) {
        let mut measures = self.measures.lock().unwrap_or_else(PoisonError::into_inner);
        measures.loss += sums.loss;
        if let Some(cross_entropy) = &mut measures.cross_entropy {
            *cross_entropy += sums.cross_entropy;
        }
        if let Some(sampled_kl) = &mut measures.sampled_kl {
            *sampled_kl += sums.sampled_kl;
        }
    }

    /// One row, in place of whose logits is left the gradient.
    fn row<T: Real>(&self, target: usize, logits: &mut [T], teacher: &mut [T]) -> Row {
        let token = self.targets.rows[target].1 as usize;
        let mut row = Row::default();
        let labels = (self.objective.ce_weight > 0.0).then(|| {
            let mut labels = logits.to_vec();
            row.cross_entropy = loss_and_gradient(&mut labels, token);
            labels
        });
        let shared = match &self.teacher {
            Told::Full(_) => teacher.len().min(logits.len()),
            Told::Top(_) | Told::Sampled(_) => logits.len(),
        };
        let (known, unknown) = logits.split_at_mut(shared);
        let scale = 1.0 / self.objective.temperature;
        row.loss = match &self.teacher {
            Told::Full(_) => {
                let teacher = &mut teacher[..shared];
                log_softmax(known, scale);
                log_softmax(teacher, scale);
                if token < shared {
                    row.sampled_kl = (known[token] - teacher[token]).to_f64();
                }
                match self.objective.top_k.filter(|k| *k < shared) {
                    None => self.objective.loss.of_log_probabilities(teacher, known),
                    Some(k) => {
                        let ids = largest(teacher, k);
                        let (top, tail) = apart(teacher, &ids);
                        self.of_top(&ids, top, tail, known)
                    }
                }
            }
            Told::Top(top) => {
                log_softmax(known, scale);
                let k = target * top.k..(target + 1) * top.k;
                // A token that the student does not know is one of the tail.
                let known_to_both = |(id, log_p): (&u32, &f32)| {
                    (*id < shared as u32).then_some((*id, T::of(f64::from(*log_p))))
                };
                let pairs = top.ids[k.clone()].iter().zip(&top.logprobs[k]);
                let (ids, log_p): (Vec<u32>, Vec<T>) = pairs.filter_map(known_to_both).unzip();
                let tail = 1.0 - log_p.iter().map(|log_p| log_p.to_f64().exp()).sum::<f64>();
                self.of_top(&ids, log_p, tail.max(SMALLEST_TAIL), known)
            }
            Told::Sampled(sampled) => {
                let [loss, log_q] = sampled.compute(target, token, known, scale);
                row.sampled_kl = log_q - sampled.log_p[target];
                loss
            }
        };
        row.loss *= self.objective.scale();
        let scale = T::of(scale * self.objective.scale());
        known.iter_mut().for_each(|x| *x *= scale);
        unknown.fill(T::zero());
        if let Some(labels) = labels {
            let weight = T::of(self.objective.ce_weight);
            logits
                .iter_mut()
                .zip(labels)
                .for_each(|(x, label)| *x += weight * label);
        }
        row
    }

    /// The loss over some tokens, whose log P is `log_p`, and the tail of all others, whose P is `tail`. In place of log
    /// Q of every token is left the gradient by logits.
    fn of_top<T: Real>(&self, ids: &[u32], mut log_p: Vec<T>, tail: f64, log_q: &mut [T]) -> f64 {
        let (mut top, rest) = apart(log_q, ids);
        let has_tail = ids.len() < log_q.len();
        if has_tail {
            log_p.push(T::of(tail.ln()));
            top.push(T::of(rest.ln()));
        }
        let loss = self.objective.loss.of_log_probabilities(&mut log_p, &mut top);
        if has_tail && let Some(of_tail) = top.pop() {
            // A token has its share of what the tail's probability should become.
            let share = of_tail * T::of(1.0 / rest);
            log_q.iter_mut().for_each(|q| *q *= share);
        }
        for (id, gradient) in ids.iter().zip(top) {
            log_q[*id as usize] = gradient;
        }
        loss
    }
}

/// Log-probabilities of some tokens. In place of all are left the probabilities of the others, and their sum is
/// returned.
fn apart<T: Real>(log_p: &mut [T], ids: &[u32]) -> (Vec<T>, f64) {
    let top = ids.iter().map(|id| log_p[*id as usize]).collect();
    log_p.iter_mut().for_each(|x| *x = x.exp());
    ids.iter().for_each(|id| log_p[*id as usize] = T::zero());
    let rest = sum(log_p);
    (top, rest)
}

/// The places of the k largest numbers, the first of equals first.
fn largest<T: Real>(x: &[T], k: usize) -> Vec<u32> {
    let order = |a: &u32, b: &u32| {
        let [left, right] = [a, b].map(|id| x[*id as usize].to_f64());
        right.total_cmp(&left).then(a.cmp(b))
    };
    let mut ids: Vec<u32> = (0..x.len() as u32).collect();
    if k < ids.len() {
        ids.select_nth_unstable_by(k, order);
        ids.truncate(k);
    }
    ids.sort_unstable_by(order);
    ids
}

/// The number in a scalar.
fn scalar(tensor: &Tensor) -> Result<f64> {
    tensor.to_dtype(DType::F64)?.to_scalar()
}

fn check_top(top: &TopK) -> Result<()> {
    let length = top.ids.len();
    if top.k == 0 || !length.is_multiple_of(top.k) || length != top.logprobs.len() {
        let numbers = top.logprobs.len();
        candle_core::bail!(
            "{OP}: {length} tokens with {numbers} probabilities, {} a row",
            top.k
        );
    }
    for (row, (ids, log_p)) in top.ids.chunks(top.k).zip(top.logprobs.chunks(top.k)).enumerate() {
        if ids.iter().collect::<HashSet<_>>().len() < ids.len() {
            candle_core::bail!("{OP}: row {row} of the scores has a token twice");
        }
        if let Some(log_p) = log_p.iter().find(|log_p| !log_p.is_finite()) {
            candle_core::bail!("{OP}: row {row} of the scores has a log-probability of {log_p}");
        }
    }
    Ok(())
}

/// log P of the labels.
fn of_labels(scores: Scores, targets: &Targets, temperature: f64, vocabulary: usize) -> Result<Vec<f64>> {
    let logits = match scores {
        Scores::Label(log_p) => return Ok(log_p.into_iter().map(f64::from).collect()),
        Scores::Full(logits) => logits,
        Scores::Top(_) => candle_core::bail!("{OP}: the probabilities of labels are not known"),
    };
    let width = logits.vocab_size();
    let shared = width.min(vocabulary);
    let mut all = Vec::with_capacity(targets.rows.len());
    for (first, rows) in targets.chunks() {
        let mut chunk = vec![0.0; rows.len() * width];
        logits.read(first..first + rows.len(), &mut chunk)?;
        let log_p: Vec<Option<f64>> = chunk
            .par_chunks_mut(width)
            .zip(rows)
            .map(|(logits, (_, token))| {
                let known = &mut logits[..shared];
                log_softmax(known, 1.0 / temperature);
                known.get(*token as usize).copied().map(f64::from)
            })
            .collect();
        for (log_p, (_, token)) in log_p.into_iter().zip(rows) {
            let unknown = || {
                Error::msg(format!(
                    "{OP}: token {token} is not in the teacher's vocabulary of {width}"
                ))
            };
            all.push(log_p.ok_or_else(unknown)?);
        }
    }
    Ok(all)
}

impl Criterion for Distillation {
    const NAME: &'static str = OP;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn compute<T: Real>(&self, first: usize, logits: &mut [T], vocabulary: usize) -> Result<f64> {
        let count = logits.len() / vocabulary;
        let rows: Vec<Row> = match &self.teacher {
            Told::Full(teacher) => {
                let width = teacher.vocab_size();
                let mut chunk = vec![0.0; count * width];
                teacher.read(first..first + count, &mut chunk)?;
                T::from_f32_vec(chunk)
                    .par_chunks_mut(width)
                    .zip(logits.par_chunks_mut(vocabulary))
                    .enumerate()
                    .map(|(i, (teacher, logits))| self.row(first + i, logits, teacher))
                    .collect()
            }
            Told::Top(_) | Told::Sampled(_) => logits
                .par_chunks_mut(vocabulary)
                .enumerate()
                .map(|(i, logits)| self.row(first + i, logits, &mut []))
                .collect(),
        };
        // In order, whatever the threads: the same seed gives the same bits.
        let mut sums = Row::default();
        rows.into_iter().for_each(|row| sums += row);
        self.count(sums);
        Ok(sums.loss + self.objective.ce_weight * sums.cross_entropy)
    }

    /// All logits of a teacher are compared on the device. Its most probable tokens, and tokens that only one of both
    /// knows, are seen to on the CPU.
    fn compute_there(
        &self,
        first: usize,
        logits: &Tensor,
        with_gradient: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (count, vocabulary) = logits.dims2()?;
        let teacher = match &self.teacher {
            Told::Full(teacher) if self.objective.top_k.is_none() => teacher,
            _ => return compute_here(self, first, logits),
        };
        let shared = teacher.vocab_size().min(vocabulary);
        let targets = &self.targets.rows[first..first + count];
        if targets.iter().any(|(_, token)| *token as usize >= shared) {
            return compute_here(self, first, logits);
        }
        let teacher = teacher.there(first..first + count, logits.device())?;
        let student = Var::from_tensor(&logits.detach())?;
        let scale = 1.0 / self.objective.temperature;
        let log_p = composed_log_softmax(&teacher.narrow(1, 0, shared)?.to_dtype(logits.dtype())?, scale)?;
        let log_q = composed_log_softmax(&student.narrow(1, 0, shared)?, scale)?;
        let labels = self.targets.labels(first, count, logits.device())?;
        let of_labels = |log: &Tensor| log.gather(&labels, 1)?.sum_all();
        let distillation = (self.objective.loss.composed(&log_p, &log_q)? * self.objective.scale())?;
        let mut loss = distillation.clone();
        let mut sums = Row {
            loss: scalar(&distillation)?,
            cross_entropy: 0.0,
            sampled_kl: scalar(&(of_labels(&log_q)? - of_labels(&log_p)?)?)?,
        };
        if self.objective.ce_weight > 0.0 {
            let cross_entropy = of_labels(&composed_log_softmax(&student, 1.0)?)?.neg()?;
            sums.cross_entropy = scalar(&cross_entropy)?;
            loss = (loss + (cross_entropy * self.objective.ce_weight)?)?;
        }
        self.count(sums);
        let gradient = match with_gradient {
            true => loss.backward()?.remove(&student),
            false => None,
        };
        Ok((loss.detach(), gradient))
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::model::ops::gradcheck::{check, random};
    use crate::model::ops::{forced, linear};
    use crate::model::quantized::Nf4;

    const LABELS: [i64; 6] = [-100, 3, 0, -100, 6, 3];

    #[derive(Clone)]
    struct Rows(Vec<f32>);

    impl LogitRows for Rows {
        fn rows(&self) -> usize {
            self.0.len() / 9
        }
        fn vocab_size(&self) -> usize {
            9
        }
        fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
            out.copy_from_slice(&self.0[rows.start * 9..rows.end * 9]);
            Ok(())
        }
    }

    fn floats(shape: &[usize], seed: u64) -> Vec<f32> {
        let numbers = random(shape, seed)
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        numbers.into_iter().map(|x| 3.0 * x as f32).collect()
    }

    /// A student of seven tokens, and a teacher of nine.
    fn distillation(loss: Loss, chunk: usize) -> Distillation {
        let batch = Batch::new([(&[0u32; 6][..], &LABELS[..])]);
        let objective = Objective {
            loss,
            temperature: 1.3,
            t_squared: true,
            top_k: None,
            ce_weight: 0.2,
            chunk,
        };
        let taught = Taught {
            scores: Scores::Full(Box::new(Rows(floats(&[4, 9], 31)))),
            old: Some(vec![-1.0, -2.0, -1.5, -0.5]),
        };
        Distillation::new(&batch, taught, &objective, 7).unwrap()
    }

    const LOSSES: [Loss; 3] = [
        Loss::ReverseKl,
        Loss::Jsd {
            beta: 0.3,
            rescaled: false,
        },
        Loss::PolicyGradient { discount: 0.0 },
    ];

    /// Every kind of output layer: the value for a loss, and the gradients, in chunks.
    #[test]
    fn gradients_are_the_differences_whatever_the_head_and_the_chunk() {
        gradients_are_the_differences();
        forced(gradients_are_the_differences);
    }

    fn gradients_are_the_differences() {
        let (hidden, weight) = (random(&[6, 4], 16), random(&[7, 4], 17));
        let (a, b, factors) = (random(&[2, 4], 18), random(&[7, 2], 19), random(&[7], 20));
        let numbers = floats(&[7, 4], 21);
        let blocks = Frozen::Quantized(Arc::new(Nf4::quantize("nf4".into(), &numbers, [7, 4], false)));
        let dense = Frozen::Dense(weight.as_detached_tensor());
        // The advantage of a policy gradient has no gradient, so the ratio is the old student's.
        for loss in LOSSES {
            for chunk in [1, 3, 256] {
                check(&[&hidden, &weight], |args| {
                    Ok(distillation_loss(&args[0], &args[1], distillation(loss, chunk))?.0)
                });
                for frozen in [&dense, &blocks] {
                    check(&[&hidden], |args| {
                        Ok(frozen_distillation_loss(&args[0], frozen, distillation(loss, chunk))?.0)
                    });
                    check(&[&hidden, &a, &b, &factors], |args| {
                        let adapter = HeadAdapter {
                            down: &linear(&args[0], &args[1])?,
                            b: &args[2],
                            factors: Some(&args[3]),
                        };
                        Ok(lora_distillation_loss(&args[0], frozen, adapter, distillation(loss, chunk))?.0)
                    });
                }
            }
        }
    }

    /// Every loss, also of a teacher that knows more tokens: values, parts and gradients.
    #[test]
    fn devices_compute_the_same() {
        let (hidden, weight) = (random(&[6, 4], 16), random(&[7, 4], 17));
        let alpha = 0.2;
        let others = [
            Loss::ForwardKl,
            Loss::SkewForwardKl { alpha },
            Loss::SkewReverseKl { alpha },
            Loss::TotalVariation,
        ];
        for loss in LOSSES.into_iter().chain(others) {
            let numbers = || {
                let (loss, measures) = distillation_loss(&hidden, &weight, distillation(loss, 3)).unwrap();
                let gradients = loss.backward().unwrap();
                let of = |var: &Tensor| {
                    gradients
                        .get(var)
                        .unwrap()
                        .flatten_all()
                        .unwrap()
                        .to_vec1::<f64>()
                };
                let parts = [
                    measures.loss,
                    measures.cross_entropy.unwrap(),
                    measures.sampled_kl.unwrap(),
                ];
                [
                    vec![scalar(&loss).unwrap()],
                    parts.to_vec(),
                    of(&hidden).unwrap(),
                    of(&weight).unwrap(),
                ]
                .concat()
            };
            for (ours, theirs) in numbers().iter().zip(forced(numbers)) {
                assert!((ours - theirs).abs() < 1e-6, "{loss:?}: {ours} and {theirs}");
            }
        }
    }

    #[test]
    fn the_parts_add_up_to_the_loss() {
        let (hidden, weight) = (random(&[6, 4], 16), random(&[7, 4], 17));
        for loss in LOSSES {
            let (total, parts) = distillation_loss(&hidden, &weight, distillation(loss, 3)).unwrap();
            let total = total.to_scalar::<f64>().unwrap();
            let sum = parts.loss + 0.2 * parts.cross_entropy.unwrap();
            assert!((total - sum).abs() < 1e-12 && parts.sampled_kl.is_some());
        }
    }
}
