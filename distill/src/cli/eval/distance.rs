//! `eval --teacher`: how far the model is from another one on the answers of the rows.

use std::path::Path;

use super::Args;
use crate::cli::UsageError;
use crate::data::{Encoder, Sample};
use crate::model::Model;
use crate::opd::{Divergence, Task, divergence};
use crate::teacher::gguf::GgufTeacher;
use crate::teacher::vocabulary::check_tokenizer;
use crate::teacher::{CheckpointTeacher, Spec, Teacher};

/// Measures the model against the teacher at `spec`. A GGUF file without an adapter is run in llama.cpp, with its rounding
/// of activations: as it will be deployed.
pub(super) fn measure(
    args: &Args,
    spec: &str,
    model: &Model,
    encoder: &Encoder,
    samples: &[&Sample],
) -> anyhow::Result<Divergence> {
    let longest = samples.iter().map(|sample| sample.ids.len()).max().unwrap_or(0);
    let (mut teacher, path): (Box<dyn Teacher>, _) = match Spec::parse(spec) {
        Spec::Gguf(path) => (Box::new(GgufTeacher::open(&path, longest)?), path),
        Spec::Checkpoint(path) => (
            Box::new(CheckpointTeacher::open(&path, None, model.place())?),
            path,
        ),
        Spec::Served(url) => anyhow::bail!(UsageError::Usage(format!(
            "--teacher {url}: a checkpoint folder or a GGUF file is measured against\nhint: `pipit-distill opd` takes servers"
        ))),
    };
    check_same_tokenizer(args, encoder, &path, teacher.as_ref())?;
    let tasks: Vec<Task> = samples
        .iter()
        .map(|sample| Task {
            line: sample.line,
            prompt: Vec::new(),
            sample: Some((*sample).clone()),
            route: None,
        })
        .collect();
    if args.model.is_file() && args.adapter.is_none() {
        let mut student = GgufTeacher::open(&args.model, longest)?;
        return Ok(divergence::measure_teacher(
            &mut student,
            teacher.as_mut(),
            &tasks,
            args.batch_size,
        )?);
    }
    Ok(divergence::measure(
        model,
        teacher.as_mut(),
        &tasks,
        args.batch_size,
    )?)
}

fn check_same_tokenizer(
    args: &Args,
    encoder: &Encoder,
    path: &Path,
    teacher: &dyn Teacher,
) -> anyhow::Result<()> {
    let theirs = Encoder::open(path, teacher.vocab_size())?;
    let model = args.model.to_string_lossy();
    check_tokenizer((encoder, &model), (&theirs, &teacher.name()))?;
    Ok(())
}
