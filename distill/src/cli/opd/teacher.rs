//! The teacher of a distillation, and whether it and the student speak of the same tokens.

use std::path::Path;

use super::prepare::Prepared;
use crate::cli::options::OpdSettings;
use crate::data::Encoder;
use crate::teacher::{BaseTeacher, CheckpointTeacher, Teacher};

/// `--teacher base`.
const BASE: &str = "base";

/// A teacher that is ready.
pub(super) struct Opened<'a> {
    pub(super) teacher: Box<dyn Teacher + 'a>,
    /// What its weights take, where they are here.
    pub(super) bytes: u64,
    /// The time of a token of the student in those of one of the teacher.
    pub(super) draft_cost: Option<f64>,
}

/// Opens the teacher that is asked for.
pub(super) fn open<'a>(settings: &OpdSettings, prepared: &'a Prepared) -> anyhow::Result<Opened<'a>> {
    let own = &settings.distillation;
    let student = &prepared.student;
    // Decoding reads every weight once for a token: its time goes with their number.
    let cost = |parameters: usize| Some(student.model.parameters() as f64 / parameters.max(1) as f64);
    let given = Some(own.draft_cost).filter(|cost| *cost > 0.0);
    if own.teacher == BASE && own.through.is_empty() {
        return Ok(Opened {
            teacher: Box::new(BaseTeacher::new(&student.model)?),
            bytes: 0,
            draft_cost: given.or(cost(student.model.parameters())),
        });
    }
    // The base of a student that computes through quantised weights is no longer what it was: it is opened anew.
    let path = match own.teacher.as_str() {
        BASE => settings.training.model.as_path(),
        path => Path::new(path),
    };
    let adapter = Some(own.teacher_adapter.as_path()).filter(|path| !path.as_os_str().is_empty());
    let teacher = CheckpointTeacher::open(path, adapter)?;
    let model = teacher.model();
    let _ = Encoder::open(path, model.config().vocab_size)?;
    Ok(Opened {
        bytes: 4 * model.parameters() as u64,
        draft_cost: given.or(cost(model.parameters())),
        teacher: Box::new(teacher),
    })
}
