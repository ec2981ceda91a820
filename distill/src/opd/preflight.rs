//! What is found out before the first step: everything that would make a distillation learn nothing, or the wrong thing.
//! Vocabularies and templates are compared where the teacher is opened.

use std::path::Path;

use candle_core::Result as CandleResult;

use super::{Cast, OpdError, OpdOptions, Task};
use crate::batch::Batch;
use crate::data::{DataError, Encoder, Row, Sample};
use crate::loss::{Loss, LossError, log_softmax};
use crate::model::Mode;
use crate::teacher::{Asked, LogitRows, Scores};
use crate::trainer::{TrainError, unreached};

/// Two scores of the same text may differ by so many nats: far below what a step of training moves, far above what
/// another order of summation does.
const REPEATABLE_NATS: f32 = 1e-3;
/// Tokens of a prompt that an error shows.
const SHOWN_TOKENS: usize = 12;
/// Texts that are tried.
const PROBES: usize = 2;
/// Tokens of each.
const PROBE_TOKENS: usize = 64;

/// Why a distillation is not begun.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PreflightError {
    /// The loss is none, or the teacher tells too little for it.
    #[error(transparent)]
    Loss(#[from] LossError),
    /// λ is no share.
    #[error("--on-policy-fraction is {value}; it must be from 0 to 1")]
    Fraction {
        /// Its value.
        value: f64,
    },
    /// Rows are to be trained on with their answers, and one has none.
    #[error(
        "line {line} has no answer, and --on-policy-fraction {fraction} trains on answers of the data too\nhint: `pipit-distill generate` writes the teacher's; --on-policy-fraction 1 needs none"
    )]
    NoAnswer {
        /// The line.
        line: usize,
        /// λ.
        fraction: f64,
    },
    /// Rows are to be answered, and one leaves no room.
    #[error(
        "line {line}: its prompt has {tokens} tokens, which leaves no room for an answer: the student knows {longest}\nhint: leave the row out"
    )]
    NoRoom {
        /// The line.
        line: usize,
        /// Tokens of the prompt.
        tokens: usize,
        /// The most tokens of a sequence.
        longest: usize,
    },
    /// A policy gradient of texts that the student has not drawn.
    #[error(
        "--loss policy-gradient is about the student's own answers\nhint: it needs --on-policy-fraction 1"
    )]
    PolicyOffPolicy,
    /// A policy gradient of answers that were drawn otherwise than the loss has them.
    #[error(
        "--loss policy-gradient needs answers drawn as its loss has them, from all tokens and at its temperature\nhint: leave --rollout-temperature, --top-k and --top-p out"
    )]
    PolicyDraw,
    /// The teacher is not of one mind.
    #[error(
        "{teacher} scores the same text differently when it is asked again, by {nats:.4} nats: what it teaches would be noise\nhint: a served model may need a single replica, a fixed batch size or deterministic kernels; a cache asks it once"
    )]
    NotRepeatable {
        /// The teacher.
        teacher: String,
        /// The largest difference.
        nats: f32,
    },
    /// The teacher expects other prompts.
    #[error(
        "line {line}: the chat template of the teacher {teacher} makes other tokens of it than the student's, from token {place} on: {theirs:?} there, {ours:?} here\nhint: a teacher that is asked in a form that it does not know teaches its confusion; give both the same chat_template.jinja, or use pipit-distill generate and sft"
    )]
    Template {
        /// The line.
        line: usize,
        /// The teacher.
        teacher: String,
        /// The first token that differs.
        place: usize,
        /// The teacher's text from there on.
        theirs: String,
        /// The student's text from there on.
        ours: String,
    },
    /// A row cannot be rendered.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A text cannot be tried.
    #[error(transparent)]
    Opd(#[from] OpdError),
}

/// Refuses a teacher whose chat template makes other prompts of rows than the student's. A teacher without a template
/// expects none.
pub fn check_template(
    student: &Encoder,
    (teacher, name): (&Encoder, &str),
    path: &Path,
    rows: &[Row],
) -> Result<(), PreflightError> {
    for row in rows {
        let theirs = match teacher.prompt(path, row) {
            Ok(Some(prompt)) => prompt.ids,
            Ok(None) => continue,
            Err(DataError::NoTemplate { .. }) => {
                tracing::warn!("{name} has no chat template: it is asked in the student's");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let Some(ours) = student.prompt(path, row)?.map(|prompt| prompt.ids) else {
            continue;
        };
        if ours == theirs {
            continue;
        }
        let place = ours.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
        let text = |ids: &[u32]| student.text(&ids[place..ids.len().min(place + SHOWN_TOKENS)]);
        return Err(PreflightError::Template {
            line: row.line,
            teacher: name.to_owned(),
            place,
            theirs: text(&theirs)?,
            ours: text(&ours)?,
        });
    }
    Ok(())
}

/// Refuses what cannot work, before anything is trained.
pub fn check(cast: &mut Cast<'_>, tasks: &[Task], options: &OpdOptions) -> Result<(), PreflightError> {
    options.objective.check()?;
    check_policy(options)?;
    check_tasks(cast, tasks, options)?;
    let probes: Vec<Sample> = tasks.iter().take(PROBES).map(probe).collect();
    let asked: Vec<Asked<'_>> = probes
        .iter()
        .zip(tasks)
        .map(|(probe, task)| Asked {
            ids: &probe.ids,
            labels: &probe.labels,
            route: task.route.as_deref(),
        })
        .collect();
    let mut ask = || cast.teacher.score(&asked).map_err(OpdError::from);
    let (first, second) = (ask()?, ask()?);
    options.objective.accepts(&first)?;
    let nats = difference(&first, &second).map_err(OpdError::from)?;
    if nats.is_nan() || nats > REPEATABLE_NATS {
        return Err(PreflightError::NotRepeatable {
            teacher: cast.teacher.name(),
            nats,
        });
    }
    reaches_all(cast, &probes, first, options)?;
    Ok(())
}

fn check_policy(options: &OpdOptions) -> Result<(), PreflightError> {
    let fraction = options.on_policy_fraction;
    if !(0.0..=1.0).contains(&fraction) {
        return Err(PreflightError::Fraction { value: fraction });
    }
    if !matches!(options.objective.loss, Loss::PolicyGradient { .. }) {
        return Ok(());
    }
    if fraction < 1.0 {
        return Err(PreflightError::PolicyOffPolicy);
    }
    let draw = options.rollout.draw;
    let alike = draw.temperature == options.objective.temperature;
    if !alike || draw.top_k > 0 || draw.top_p < 1.0 {
        return Err(PreflightError::PolicyDraw);
    }
    Ok(())
}

fn check_tasks(cast: &Cast<'_>, tasks: &[Task], options: &OpdOptions) -> Result<(), PreflightError> {
    let (fraction, longest) = (options.on_policy_fraction, cast.student.longest());
    for task in tasks {
        if fraction < 1.0 && task.sample.is_none() {
            let line = task.line;
            return Err(PreflightError::NoAnswer { line, fraction });
        }
        if fraction > 0.0 && (task.prompt.is_empty() || task.prompt.len() >= longest) {
            return Err(PreflightError::NoRoom {
                line: task.line,
                tokens: task.prompt.len(),
                longest,
            });
        }
    }
    Ok(())
}

/// A row as it is, or its prompt where it has no answer, with a label at every token.
fn probe(task: &Task) -> Sample {
    let ids = match &task.sample {
        Some(sample) => &sample.ids,
        None => &task.prompt,
    };
    let ids = ids[..ids.len().min(PROBE_TOKENS)].to_vec();
    Sample {
        line: task.line,
        labels: ids.iter().map(|id| i64::from(*id)).collect(),
        ids,
    }
}

/// The largest difference of a log-probability between two scores of the same texts. Of all logits, those of the tokens
/// that have at least a hundredth of the probability are compared.
fn difference(first: &Scores, second: &Scores) -> CandleResult<f32> {
    let largest = |a: &[f32], b: &[f32]| {
        let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        // Not f32::max, which passes over NaN.
        let largest = differences.fold(0.0f32, |max, x| if x <= max { max } else { x });
        if a.len() == b.len() {
            largest
        } else {
            f32::INFINITY
        }
    };
    Ok(match (first, second) {
        (Scores::Full(a), Scores::Full(b)) => {
            let read = |rows: &dyn LogitRows| -> CandleResult<Vec<f32>> {
                let mut out = vec![0.0; rows.rows() * rows.vocab_size()];
                rows.read(0..rows.rows(), &mut out)?;
                out.chunks_mut(rows.vocab_size().max(1))
                    .for_each(|row| log_softmax(row, 1.0));
                Ok(out)
            };
            let (a, b) = (read(a.as_ref())?, read(b.as_ref())?);
            let probable = |log: &f32| log.is_nan() || *log > 0.01f32.ln();
            let pairs = a.iter().zip(&b).filter(|(a, b)| probable(a) || probable(b));
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.map(|(a, b)| (*a, *b)).unzip();
            largest(&a, &b)
        }
        // The order of tokens that are as probable may change; their probabilities may not.
        (Scores::Top(a), Scores::Top(b)) => largest(&a.logprobs, &b.logprobs),
        (Scores::Label(a), Scores::Label(b)) => largest(a, b),
        _ => f32::INFINITY,
    })
}

/// One backward pass, which nothing comes of: every trained tensor must get a gradient.
fn reaches_all(
    cast: &Cast<'_>,
    probes: &[Sample],
    scores: Scores,
    options: &OpdOptions,
) -> Result<(), OpdError> {
    let batch = Batch::new(probes.iter().map(|probe| (&*probe.ids, &*probe.labels)));
    let mode = Mode {
        gradient: true,
        ..Mode::default()
    };
    let missed = unreached(cast.student, &batch, mode, |hidden| {
        let taught = scores.into();
        let (loss, _) = cast
            .student
            .distillation_loss(hidden, &batch, taught, &options.objective, mode)?;
        Ok(loss)
    })?;
    match missed {
        None => Ok(()),
        Some(tensor) => Err(OpdError::Train(TrainError::NoGradient {
            tensor: tensor.to_owned(),
        })),
    }
}
