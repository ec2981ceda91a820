//! Measures an importance matrix: sums up the squares of what each column is multiplied with.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Entry, Imatrix, ImatrixError};
use crate::evaluate::{EvaluateError, Kind, Observer, Operand, Operation, Options, Session, Text};
use crate::progress::Progress;

/// Products with fewer tokens are left out, as llama-imatrix does.
const MIN_TOKENS: usize = 16;

/// How an importance matrix is measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// How the text is cut.
    pub text: Options,
    /// Whether `output.weight` is measured too. Tied embeddings never are.
    pub output: bool,
}

/// Puts the text through the model, and measures what the layers' matrices are multiplied with.
pub fn measure(
    model: &Path,
    text: &Text,
    settings: &Settings,
    progress: &dyn Progress,
) -> Result<Imatrix, ImatrixError> {
    let collector = Collector {
        output: settings.output,
        ..Collector::default()
    };
    let mut session = Session::open(model, &settings.text, collector)?;
    let chunks = text.chunks(&session, &settings.text)?;
    let bytes = text.as_str().len() as u64 / chunks.count() as u64;
    progress.start("measuring", bytes * chunks.count() as u64);
    for chunk in 0..chunks.count() {
        session.clear();
        for tokens in chunks.input(chunk).chunks(session.batch()) {
            if progress.cancelled() {
                return Err(EvaluateError::Interrupted.into());
            }
            // Without logits for all tokens, llama.cpp leaves tokens out of the last layer.
            let decoded = session.decode(tokens, |_| true);
            if let Some(failure) = session.observer().failure.take() {
                return Err(failure.at(model));
            }
            decoded?;
        }
        progress.advance(bytes);
    }
    let name = text.path.file_name().unwrap_or_default().to_string_lossy();
    Ok(Imatrix {
        entries: std::mem::take(&mut session.observer().entries),
        datasets: vec![name.into_owned()],
        chunks: u32::try_from(chunks.count()).unwrap_or(u32::MAX),
        chunk_size: u32::try_from(settings.text.ctx).unwrap_or(u32::MAX),
    })
}

#[derive(Debug, Default)]
struct Collector {
    output: bool,
    entries: BTreeMap<String, Entry>,
    /// What a matrix is multiplied with.
    values: Vec<f32>,
    failure: Option<Failure>,
}

/// Why there is nothing to sum up.
#[derive(Debug)]
enum Failure {
    Experts(String),
    NotFinite(String),
    Inconsistent(String, usize, usize),
}

impl Failure {
    fn at(self, model: &Path) -> ImatrixError {
        let path = model.to_path_buf();
        match self {
            Self::Experts(tensor) => ImatrixError::Experts { path, tensor },
            Self::NotFinite(tensor) => ImatrixError::NotFinite { path, tensor },
            Self::Inconsistent(tensor, found, wanted) => ImatrixError::Inconsistent {
                path,
                tensor,
                found,
                wanted,
            },
        }
    }
}

impl Observer for Collector {
    fn wants(&mut self, operation: &Operation<'_>) -> bool {
        if self.failure.is_some() {
            return false;
        }
        let Some((matrix, input)) = operation.operands() else {
            return false;
        };
        if operation.kind() == Kind::ExpertProduct {
            return true;
        }
        if input.dimensions()[1] < MIN_TOKENS || !input.is_f32() {
            return false;
        }
        let name = matrix.name();
        name.starts_with("blk.") || self.output && name == "output.weight"
    }

    fn see(&mut self, operation: &Operation<'_>) -> bool {
        let Some((matrix, input)) = operation.operands() else {
            return true;
        };
        let name = matrix.name().into_owned();
        self.failure = match operation.kind() {
            Kind::ExpertProduct => Some(Failure::Experts(name)),
            _ => self.add(name, &matrix, &input).err(),
        };
        self.failure.is_none()
    }
}

impl Collector {
    fn add(&mut self, name: String, matrix: &Operand<'_>, input: &Operand<'_>) -> Result<(), Failure> {
        let [_, _, deep, deeper] = matrix.dimensions().map(|n| n.max(1));
        let [columns, rows, matrices, batches] = input.dimensions();
        let wanted = columns * deep * deeper;
        let entry = self.entries.entry(name.clone()).or_insert_with(|| Entry {
            sums: vec![0.0; wanted],
            counts: vec![0],
        });
        if entry.sums.len() != wanted {
            return Err(Failure::Inconsistent(name, wanted, entry.sums.len()));
        }
        input.read(&mut self.values);
        for batch in 0..batches {
            for at in 0..matrices {
                let first = ((batch % deeper) * deep + at % deep) * columns;
                let sums = &mut entry.sums[first..first + columns];
                for row in 0..rows {
                    let values = input.row(&self.values, row, at, batch);
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum += value * value;
                    }
                }
            }
        }
        if entry.sums.iter().any(|sum| !sum.is_finite()) {
            return Err(Failure::NotFinite(name));
        }
        entry.counts[0] += (rows * matrices * batches / (deep * deeper)) as i64;
        Ok(())
    }
}
