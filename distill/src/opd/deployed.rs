//! The GGUF file that a student becomes: what `pipit-convert model` makes of it, made while it is trained, to draw its
//! answers from and to measure it as it will be deployed.

use std::path::{Path, PathBuf};

use llama_cpp_2::model::params::LlamaModelParams;
use pipit_convert::adapter::{AdapterError, PeftAdapter};
use pipit_convert::llama_cpp::{LlamaCppError, load};
use pipit_convert::merge::ScaledAdapter;
use pipit_convert::model::{ModelError, Plan, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::Recipe;

use super::divergence::measure_teacher;
use super::{Divergence, OpdError, Task};
use crate::random::Random;
use crate::rollout::{DecodeError, LlamaCpp, Rollout, RolloutOptions, Stop, rollouts};
use crate::teacher::Teacher;
use crate::teacher::gguf::GgufTeacher;
use crate::trainer::checkpoint::{Cause, Export};

/// Why the GGUF file of a student cannot be made or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeployError {
    /// There is no place for it.
    #[error(
        "cannot make a temporary folder for the student's GGUF file: {0}\nhint: TMPDIR names another place"
    )]
    Scratch(std::io::Error),
    /// The student cannot be written.
    #[error("cannot write the student: {0}\nhint: TMPDIR names another place")]
    Export(Cause),
    /// Its adapter cannot be read again.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// It cannot be converted.
    #[error("the student does not become a GGUF file: {0}")]
    Convert(#[from] ModelError),
    /// llama.cpp does not load it.
    #[error(transparent)]
    Load(#[from] LlamaCppError),
    /// llama.cpp does not go on.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// How a student becomes a GGUF file.
#[derive(Clone, Copy)]
pub struct Deployed<'a> {
    /// The checkpoint that an adapter stands on, where the student is one.
    pub base: Option<&'a Path>,
    /// Writes the student into a folder: a checkpoint, or an adapter in PEFT's layout.
    pub export: Export<'a>,
    /// The types of its tensors.
    pub recipe: &'a Recipe,
}

impl std::fmt::Debug for Deployed<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deployed")
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

/// A GGUF file that is removed when it is no longer needed.
#[derive(Debug)]
pub struct Scratch {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Deployed<'_> {
    /// Writes the student's file.
    pub fn write(&self) -> Result<Scratch, DeployError> {
        let folder = tempfile::tempdir().map_err(DeployError::Scratch)?;
        let student = folder.path().join("student");
        std::fs::create_dir(&student).map_err(DeployError::Scratch)?;
        (self.export)(&student).map_err(DeployError::Export)?;
        let mut adapters = Vec::new();
        if self.base.is_some() {
            adapters.push(ScaledAdapter {
                adapter: PeftAdapter::open(&student)?,
                scale: 1.0,
            });
        }
        let mut model = SourceModel::open(self.base.unwrap_or(&student))?;
        // pipit-convert proves the tokenizer when the result is converted for good.
        model.skip_tokenizer_proof();
        let path = folder.path().join("student.gguf");
        Plan::new(&model, &adapters, self.recipe)?.write(&path, None, &Silent)?;
        Ok(Scratch {
            _folder: folder,
            path,
        })
    }

    /// Answers of the student's file in llama.cpp, as [`rollouts`] has them.
    pub fn rollouts(
        &self,
        prompts: &[&[u32]],
        options: &RolloutOptions,
        stop: &Stop<'_>,
        streams: &mut [Random],
    ) -> Result<Vec<Rollout>, DeployError> {
        let file = self.write()?;
        let model = load(&file.path, &LlamaModelParams::default().with_n_gpu_layers(0))?;
        let prompt = prompts.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let width = options.width.max(options.num_generations);
        let mut decoder = LlamaCpp::new(&model, prompt + stop.max_new_tokens, width)?;
        Ok(rollouts(&mut decoder, prompts, options, stop, streams)?)
    }

    /// How far the student's file, computed by llama.cpp, is from the teacher on the answers that rows have. The second
    /// value is the size of the file in bytes.
    pub fn measure(
        &self,
        teacher: &mut dyn Teacher,
        tasks: &[Task],
        batch_size: usize,
    ) -> Result<(Divergence, u64), OpdError> {
        let file = self.write()?;
        let bytes = file.path.metadata().map_or(0, |metadata| metadata.len());
        let samples = tasks.iter().filter_map(|task| task.sample.as_ref());
        let longest = samples.map(|sample| sample.ids.len()).max().unwrap_or(0);
        let mut student = GgufTeacher::open(&file.path, longest)?;
        Ok((measure_teacher(&mut student, teacher, tasks, batch_size)?, bytes))
    }
}
