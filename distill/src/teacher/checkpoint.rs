//! Teachers that are checkpoints: a folder or a file of its own, or the student's base with the adapter off.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::{Asked, LogitRows, Scores, Teacher, TeacherError};
use crate::adapter::Adapter;
use crate::batch::Batch;
use crate::device::Place;
use crate::model::ops::{Frozen, frozen_linear, is_composed, with_elements};
use crate::model::{HEAD, Keep, Mode, Model, Weight};

/// A checkpoint folder, with an adapter or without. On the CPU its matrices stay in the file, in their own type, and are in
/// memory a part at a time; a GPU has them in its memory.
#[derive(Debug)]
pub struct CheckpointTeacher {
    model: Arc<Model>,
    name: String,
}

impl CheckpointTeacher {
    /// Opens a checkpoint, and the adapter that was trained on it.
    pub fn open(
        path: &Path,
        adapter: Option<&Path>,
        place: &Place,
    ) -> std::result::Result<Self, TeacherError> {
        let mut model = Model::open_on(path, Keep::Mapped, place)?;
        let mut name = path.display().to_string();
        if let Some(adapter) = adapter {
            Adapter::load(&mut model, adapter)?;
            name = format!("{name} with {}", adapter.display());
        }
        Ok(Self {
            model: Arc::new(model),
            name,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }
}

impl Teacher for CheckpointTeacher {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn score(&mut self, sequences: &[Asked<'_>]) -> std::result::Result<Scores, TeacherError> {
        let adapted = self.model.adapted().any(|module| module == HEAD);
        let head = match self.model.matrix(HEAD).filter(|_| !adapted) {
            Some(weight) => Head::Matrix(weight.frozen()),
            None => Head::OfModel(self.model.clone()),
        };
        Ok(Scores::Full(Box::new(score(
            &self.model,
            head,
            Mode::INFERENCE,
            sequences,
        )?)))
    }
}

/// The model that the student's adapter stands on.
#[derive(Debug)]
pub struct BaseTeacher<'a> {
    student: &'a Model,
}

impl<'a> BaseTeacher<'a> {
    /// Of a student whose base stays as it is.
    pub fn new(student: &'a Model) -> std::result::Result<Self, TeacherError> {
        match student.weights().find(|weight| weight.var().is_some()) {
            Some(weight) => Err(TeacherError::BaseIsTrained {
                tensor: weight.name.clone(),
            }),
            None => Ok(Self { student }),
        }
    }
}

impl Teacher for BaseTeacher<'_> {
    fn name(&self) -> String {
        "the student's base".into()
    }

    fn vocab_size(&self) -> usize {
        self.student.config().vocab_size
    }

    fn score(&mut self, sequences: &[Asked<'_>]) -> std::result::Result<Scores, TeacherError> {
        let Some(head) = self.student.matrix(HEAD).map(Weight::frozen) else {
            return Err(candle_core::Error::msg("the student has no output layer").into());
        };
        Ok(Scores::Full(Box::new(score(
            self.student,
            Head::Matrix(head),
            Mode::BASE,
            sequences,
        )?)))
    }
}

/// What makes logits of hidden states.
enum Head {
    Matrix(Frozen),
    /// The output layer has an adapter.
    OfModel(Arc<Model>),
}

/// Hidden states of which a chunk is turned into logits at a time.
struct HiddenRows {
    /// After the last norm, a row for each target, `[rows, hidden_size]`.
    hidden: Tensor,
    head: Head,
    vocab_size: usize,
}

/// The teacher's pass over the sequences, without a graph.
fn score(model: &Model, head: Head, mode: Mode, sequences: &[Asked<'_>]) -> Result<HiddenRows> {
    let batch = Batch::new(sequences.iter().map(|asked| (asked.ids, asked.labels)));
    let hidden = model.hidden(&batch, mode)?;
    let rows: Vec<u32> = batch.targets().iter().map(|(row, _)| *row as u32).collect();
    let rows = Tensor::from_vec(rows, batch.trained_tokens(), hidden.device())?;
    Ok(HiddenRows {
        hidden: hidden.index_select(&rows, 0)?,
        head,
        vocab_size: model.config().vocab_size,
    })
}

impl HiddenRows {
    /// Where the teacher is, in its type.
    fn logits(&self, rows: Range<usize>) -> Result<Tensor> {
        let hidden = self.hidden.narrow(0, rows.start, rows.len())?.contiguous()?;
        match &self.head {
            Head::Matrix(weight) => frozen_linear(&hidden, weight),
            Head::OfModel(model) => model.logits(&hidden),
        }
    }
}

impl LogitRows for HiddenRows {
    fn rows(&self) -> usize {
        self.hidden.dims().first().copied().unwrap_or(0)
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        match &self.head {
            Head::Matrix(weight) if !is_composed(&self.hidden) => {
                let hidden = self.hidden.narrow(0, rows.start, rows.len())?.contiguous()?;
                let sizes = weight.sizes(hidden.dims())?;
                with_elements::<f32, _>(&hidden, "teacher", |hidden| {
                    weight.forward_into("teacher", hidden, sizes, out)
                })
            }
            _ => copy_logits(&self.logits(rows)?, out),
        }
    }

    fn there(&self, rows: Range<usize>, device: &Device) -> Result<Tensor> {
        self.logits(rows)?.to_device(device)?.to_dtype(DType::F32)
    }
}

/// Logits from wherever they are, as f32.
pub(crate) fn copy_logits(logits: &Tensor, out: &mut [f32]) -> Result<()> {
    let logits = logits
        .to_dtype(DType::F32)?
        .to_device(&Device::Cpu)?
        .contiguous()?;
    with_elements::<f32, _>(&logits, "logits", |logits| {
        out.copy_from_slice(logits);
        Ok(())
    })
}
