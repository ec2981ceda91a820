//! `RUN/checkpoint-N/`: all that a run needs to go on after step N, bit for bit as if it had never stopped.
//!
//! | file | |
//! |---|---|
//! | what the run would end with | an adapter in PEFT's layout, or a checkpoint folder: usable by itself |
//! | `trainer.safetensors` | `NAME.exp_avg` and `NAME.exp_avg_sq` (AdamW's moments, torch's names) of every trained tensor, with `….absmax` (their scales, bitsandbytes' name) where they are kept in eight bits, and the tensor itself as `NAME` unless `model.safetensors` has it; f32 |
//! | `trainer_state.json` | [`Progress`], and a fingerprint of the data |
//!
//! There is no state of a random generator: order and dropout are functions of the seed and the step.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use pipit_convert::checkpoint::TensorFiles;
use pipit_convert::output::OutputDir;
use serde::{Deserialize, Serialize};

use super::loss_scale::LossScale;
use super::{Learner, Progress};
use crate::export::write_tensors;
use crate::random::mix;

/// The file that makes a folder a checkpoint of a run.
pub const STATE_FILE: &str = "trainer_state.json";
const TENSORS_FILE: &str = "trainer.safetensors";
const MODEL_FILE: &str = "model.safetensors";
const PREFIX: &str = "checkpoint-";

/// What went wrong with writing.
pub type Cause = Box<dyn Error + Send + Sync>;

/// Writes what a run would end with into a folder.
pub type Export<'a> = &'a dyn Fn(&Path) -> Result<(), Cause>;

/// Where and how a run saves itself.
#[derive(Clone)]
pub struct Checkpoints<'a> {
    /// The folder of the run.
    pub dir: PathBuf,
    /// What makes a checkpoint usable by itself.
    pub export: Export<'a>,
    /// Whether `export` writes every trained tensor into `model.safetensors`, under its name.
    pub weights_in_export: bool,
    /// The most checkpoints that are kept, beside the best one; 0 keeps all.
    pub save_total_limit: usize,
    /// Whether the checkpoint of the best evaluation is saved and kept, and its weights are those that the run ends with.
    pub load_best_model_at_end: bool,
    /// The checkpoint to go on from.
    pub resume_from: Option<PathBuf>,
}

impl std::fmt::Debug for Checkpoints<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoints")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

/// What can be wrong with saving a checkpoint, or with going on from one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A checkpoint cannot be written.
    #[error("cannot save {path}: {source}; {}", match .last_good {
        Some(last) => format!("{} is whole\nhint: free some space, then --resume-from-checkpoint {}", last.display(), last.display()),
        None => "there is none before it\nhint: free some space, or name another place with -o".to_owned(),
    })]
    Write {
        /// The checkpoint.
        path: PathBuf,
        /// What went wrong.
        source: Cause,
        /// The newest checkpoint that is whole.
        last_good: Option<PathBuf>,
    },
    /// A file of the checkpoint cannot be read, or is cut short.
    #[error("{path} cannot be gone on from: {why}{}", resume_hint(.path))]
    Broken {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with which file.
        why: String,
    },
    /// The checkpoint's tensors are not those that are trained now.
    #[error(
        "{path} is of another run: {why}\nhint: go on with the same --model, --method and adapter settings"
    )]
    OtherTensors {
        /// The checkpoint.
        path: PathBuf,
        /// Which tensor, and how it differs.
        why: String,
    },
    /// The data are not those that the run began with.
    #[error(
        "{path} is of a run on other data: the rows of --data, or what the tokenizer and --max-length make of them, have changed\nhint: go on with the same data, or begin another run"
    )]
    OtherData {
        /// The checkpoint.
        path: PathBuf,
    },
    /// The arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Names an older checkpoint beside a broken one.
fn resume_hint(path: &Path) -> String {
    let beside = path.parent().and_then(|dir| list(dir).ok()).unwrap_or_default();
    let older = beside.into_iter().rev().find(|(_, other)| other != path);
    older.map_or_else(String::new, |(_, other)| {
        format!(
            "\nhint: --resume-from-checkpoint {} goes on from there",
            other.display()
        )
    })
}

/// `trainer_state.json`.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    #[serde(flatten)]
    progress: Progress,
    /// In fp16 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loss_scale: Option<LossScale>,
    data_fingerprint: String,
    version: String,
}

/// A number that changes with any token or label of the sequences (ids, labels), and with their order.
pub(crate) fn fingerprint<'a>(sequences: impl IntoIterator<Item = (&'a [u32], &'a [i64])>) -> u64 {
    let one = |ids: &[u32], labels: &[i64]| {
        let tokens = ids.iter().zip(labels);
        tokens.fold(mix(ids.len() as u64), |hash, (id, label)| {
            mix(hash ^ mix(u64::from(*id)) ^ (*label as u64).rotate_left(32))
        })
    };
    let sequences = sequences.into_iter();
    sequences.fold(0, |hash, (ids, labels)| mix(hash ^ one(ids, labels)))
}

/// The checkpoints in a run's folder with their steps, oldest first.
pub fn list(run: &Path) -> io::Result<Vec<(usize, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(run)? {
        let entry = entry?;
        let name = entry.file_name();
        let step = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.parse().ok());
        if let Some(step) = step
            && entry.path().is_dir()
        {
            found.push((step, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

impl Checkpoints<'_> {
    fn path_of(&self, step: usize) -> PathBuf {
        self.dir.join(format!("{PREFIX}{step}"))
    }

    /// Saves the state after a step: under another name first, synced, then renamed. Older ones are removed then.
    pub(crate) fn save(
        &self,
        learner: &Learner<'_>,
        progress: &Progress,
        data: u64,
    ) -> Result<PathBuf, CheckpointError> {
        let path = self.path_of(progress.global_step);
        self.write(&path, learner, progress, data).map_err(|source| {
            let whole = list(&self.dir).unwrap_or_default();
            CheckpointError::Write {
                last_good: whole.into_iter().next_back().map(|(_, path)| path),
                path: path.clone(),
                source,
            }
        })?;
        self.remove_old(progress.best_global_step);
        Ok(path)
    }

    fn write(&self, path: &Path, learner: &Learner<'_>, progress: &Progress, data: u64) -> Result<(), Cause> {
        let dir = OutputDir::create(path)?;
        (self.export)(dir.path())?;
        let mut tensors = Vec::new();
        for (i, (name, var)) in learner.trained().iter().enumerate() {
            let shape = var.dims().to_vec();
            if !self.weights_in_export {
                tensors.push((i, Part::Weights, (Part::Weights.name(name), shape.clone())));
            }
            let scales = learner.optimizer().scales(i);
            for at in 0..2 {
                tensors.push((i, Part::Moment(at), (Part::Moment(at).name(name), shape.clone())));
                if let Some(scales) = &scales {
                    let shape = vec![scales[at].len()];
                    tensors.push((i, Part::Scales(at), (Part::Scales(at).name(name), shape)));
                }
            }
        }
        let names: Vec<_> = tensors.iter().map(|(.., named)| named.clone()).collect();
        write_tensors(&dir.path().join(TENSORS_FILE), &names, |tensor| {
            let (i, part, _) = tensors[tensor];
            let (mut both, at) = match part {
                Part::Weights => return numbers(learner.trained()[i].1),
                Part::Moment(at) => (learner.optimizer().moments(i)?, at),
                Part::Scales(at) => (learner.optimizer().scales(i).unwrap_or_default(), at),
            };
            Ok(std::mem::take(&mut both[at]))
        })?;
        let state = State {
            progress: progress.clone(),
            loss_scale: learner.loss_scale(),
            data_fingerprint: format!("{data:016x}"),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        std::fs::write(dir.path().join(STATE_FILE), serde_json::to_vec_pretty(&state)?)?;
        dir.commit()?;
        Ok(())
    }

    /// Keeps the newest ones, and the best one where it is asked for at the end.
    fn remove_old(&self, best: Option<usize>) {
        let best = best.filter(|_| self.load_best_model_at_end);
        let mut old = list(&self.dir).unwrap_or_default();
        old.truncate(match self.save_total_limit {
            0 => 0,
            limit => old.len().saturating_sub(limit),
        });
        for (step, path) in old.into_iter().filter(|(step, _)| Some(*step) != best) {
            // A name that nobody takes for a checkpoint, should the power fail before all of it is removed.
            let aside = self.dir.join(format!(".{PREFIX}{step}.old.part"));
            let removed = std::fs::rename(&path, &aside).and_then(|()| std::fs::remove_dir_all(&aside));
            if let Err(e) = removed {
                tracing::warn!("{} cannot be removed: {e}", path.display());
            }
        }
    }

    /// The state to begin with: that of the checkpoint to go on from, put into the learner, or that of a new run.
    pub(crate) fn start(&self, learner: &mut Learner<'_>, data: u64) -> Result<Progress, CheckpointError> {
        let Some(path) = &self.resume_from else {
            return Ok(Progress::default());
        };
        let broken = |why: String| CheckpointError::Broken {
            path: path.clone(),
            why,
        };
        let text = std::fs::read(path.join(STATE_FILE)).map_err(|e| broken(format!("{STATE_FILE}: {e}")))?;
        let state: State = serde_json::from_slice(&text).map_err(|e| broken(format!("{STATE_FILE}: {e}")))?;
        let files = Files::open(path)?;
        files.check(learner)?;
        if state.data_fingerprint != format!("{data:016x}") {
            return Err(CheckpointError::OtherData { path: path.clone() });
        }
        files.weights(learner)?;
        for i in 0..learner.trained().len() {
            let (name, var) = learner.trained()[i];
            let [mean, square] = [0, 1].map(|at| files.take(&Part::Moment(at).name(name), var.dims()));
            let scales = match learner.optimizer().scales(i) {
                Some(scales) => {
                    let shape = [scales[0].len()];
                    let [mean, square] = [0, 1].map(|at| files.take(&Part::Scales(at).name(name), &shape));
                    Some([mean?, square?])
                }
                None => None,
            };
            learner.optimizer_mut().set_moments(i, [mean?, square?], scales)?;
        }
        learner.optimizer_mut().set_steps(state.progress.global_step);
        if let Some(loss_scale) = state.loss_scale {
            learner.set_loss_scale(loss_scale);
        }
        Ok(state.progress)
    }

    /// Puts the weights after a step back.
    pub(crate) fn load_weights(&self, learner: &Learner<'_>, step: usize) -> Result<(), CheckpointError> {
        Files::open(&self.path_of(step))?.weights(learner)
    }
}

/// What is kept of a trained tensor.
#[derive(Debug, Clone, Copy)]
enum Part {
    Weights,
    /// The mean of the gradients (0), or of their squares (1).
    Moment(usize),
    /// Its scales, where it is kept in eight bits.
    Scales(usize),
}

impl Part {
    /// The name in `trainer.safetensors`.
    fn name(self, tensor: &str) -> String {
        match self {
            Self::Weights => tensor.to_owned(),
            Self::Moment(0) => format!("{tensor}.exp_avg"),
            Self::Moment(_) => format!("{tensor}.exp_avg_sq"),
            Self::Scales(at) => format!("{}.absmax", Self::Moment(at).name(tensor)),
        }
    }
}

fn numbers(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1()
}

/// The tensors of a checkpoint.
struct Files<'a> {
    path: &'a Path,
    tensors: TensorFiles,
}

impl<'a> Files<'a> {
    fn open(path: &'a Path) -> Result<Self, CheckpointError> {
        let broken = |e: pipit_convert::checkpoint::CheckpointError| CheckpointError::Broken {
            path: path.to_path_buf(),
            why: e.to_string().replace("\nhint: fetch or copy the file again", ""),
        };
        let mut tensors = TensorFiles::open(&path.join(TENSORS_FILE)).map_err(broken)?;
        if path.join(MODEL_FILE).is_file() {
            tensors.add(path.join(MODEL_FILE)).map_err(broken)?;
        }
        Ok(Self { path, tensors })
    }

    /// Refuses a checkpoint in which more, less or something else is trained.
    fn check(&self, learner: &Learner<'_>) -> Result<(), CheckpointError> {
        let end = Part::Moment(0).name("");
        let mut saved: Vec<&str> = self
            .tensors
            .names()
            .filter_map(|name| name.strip_suffix(end.as_str()))
            .collect();
        let other = |why| CheckpointError::OtherTensors {
            path: self.path.to_path_buf(),
            why,
        };
        for (name, var) in learner.trained() {
            let Some(at) = saved.iter().position(|saved| saved == name) else {
                return Err(other(format!("it does not train {name}")));
            };
            saved.swap_remove(at);
            let shape = self
                .tensors
                .tensor(&Part::Moment(0).name(name))
                .map(|tensor| tensor.shape.to_vec());
            if shape.as_deref() != Some(var.dims()) {
                return Err(other(format!(
                    "{name} is {:?} there, {:?} here",
                    shape.unwrap_or_default(),
                    var.dims()
                )));
            }
        }
        match saved.first() {
            Some(name) => Err(other(format!("it trains {name} too"))),
            None => Ok(()),
        }
    }

    fn take(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let broken = |why| CheckpointError::Broken {
            path: self.path.to_path_buf(),
            why,
        };
        let Some(tensor) = self.tensors.tensor(name) else {
            return Err(broken(format!("it has no tensor {name}")));
        };
        if tensor.shape != shape {
            return Err(broken(format!(
                "tensor {name} is {:?}, not {shape:?}",
                tensor.shape
            )));
        }
        let values = tensor.to_f32().map_err(|e| broken(e.to_string()))?;
        self.tensors.release(name);
        Ok(values)
    }

    fn weights(&self, learner: &Learner<'_>) -> Result<(), CheckpointError> {
        for (name, var) in learner.trained() {
            let values = Tensor::from_vec(self.take(name, var.dims())?, var.dims(), var.device())?;
            var.set(&values.to_dtype(var.dtype())?)?;
        }
        Ok(())
    }
}
