//! The teacher of a distillation, and whether it and the student mean the same by their tokens.

use std::path::Path;

use anyhow::Context as _;
use pipit_convert::gguf::Gguf;

use super::prepare::Prepared;
use crate::cli::UsageError;
use crate::cli::options::OpdSettings;
use crate::data::Encoder;
use crate::opd::OpdOptions;
use crate::opd::preflight::check_template;
use crate::teacher::cache::{Binding, Cached};
use crate::teacher::gguf::GgufTeacher;
use crate::teacher::routed::Routed;
use crate::teacher::served::{ServedOptions, ServedTeacher, api_key_from_environment};
use crate::teacher::vocabulary::{check_tokenizer, probe};
use crate::teacher::{BaseTeacher, CheckpointTeacher, Spec, Teacher, TeacherError};

/// `--teacher base`.
const BASE: &str = "base";

/// A teacher that is ready.
pub(super) struct Opened<'a> {
    pub(super) teacher: Box<dyn Teacher + 'a>,
    /// What its weights take, where they are here.
    pub(super) bytes: u64,
    /// The time of a token of the student in those of one of the teacher, where that is known.
    pub(super) draft_cost: Option<f64>,
}

/// Opens the teacher or the teachers that are asked for.
pub(super) fn open<'a>(
    settings: &OpdSettings,
    prepared: &'a Prepared,
    options: &OpdOptions,
) -> anyhow::Result<Opened<'a>> {
    let own = &settings.distillation;
    let opener = Opener {
        settings,
        prepared,
        longest: prepared.longest(options),
    };
    let cached = !own.teacher_cache.as_os_str().is_empty();
    let given = Some(own.draft_cost).filter(|cost| *cost > 0.0);
    if own.teacher == BASE && own.through.is_empty() {
        if cached {
            let usage =
                "--teacher-cache cannot be used with --teacher base: its scores are as near as the student";
            anyhow::bail!(UsageError::Usage(usage.into()));
        }
        let teacher = BaseTeacher::new(&prepared.student.model).context("--teacher base")?;
        return Ok(Opened {
            teacher: Box::new(teacher),
            bytes: 0,
            draft_cost: given.or(opener.cost(prepared.student.model.parameters())),
        });
    }
    let mut opened = if own.teachers.0.is_empty() {
        opener.open(&own.teacher)?
    } else {
        let (mut routed, mut bytes) = (Vec::new(), 0);
        for (route, spec) in &own.teachers.0 {
            let opened = opener.open(spec)?;
            bytes += opened.bytes;
            routed.push((route.clone(), opened.teacher));
        }
        Here {
            teacher: Box::new(Routed::new(routed)?),
            bytes,
            parameters: None,
        }
    };
    if cached {
        opened.teacher = opener.cached(opened.teacher)?;
    }
    Ok(Opened {
        bytes: opened.bytes,
        draft_cost: given.or(opened.parameters.and_then(|parameters| opener.cost(parameters))),
        teacher: opened.teacher,
    })
}

/// A teacher with what is known of its size.
struct Here {
    teacher: Box<dyn Teacher>,
    bytes: u64,
    parameters: Option<usize>,
}

struct Opener<'a> {
    settings: &'a OpdSettings,
    prepared: &'a Prepared,
    /// The most tokens of a text.
    longest: usize,
}

impl Opener<'_> {
    /// The time of a token of the student in those of a teacher of so many parameters: decoding reads every weight once
    /// for a token.
    fn cost(&self, parameters: usize) -> Option<f64> {
        let student = self.prepared.student.model.parameters();
        (parameters > 0).then(|| student as f64 / parameters as f64)
    }

    fn open(&self, spec: &str) -> anyhow::Result<Here> {
        // The base of a student that computes through quantised weights is no longer what it was: it is opened anew.
        let spec = match spec {
            BASE => Spec::Checkpoint(self.settings.training.model.clone()),
            spec => Spec::parse(spec),
        };
        let (opened, path) = match &spec {
            Spec::Served(url) => return self.served(url),
            Spec::Gguf(path) => (self.gguf(path)?, path),
            Spec::Checkpoint(path) => (self.checkpoint(path)?, path),
        };
        let theirs = Encoder::open(path, opened.teacher.vocab_size())?;
        let (student, name) = (&self.prepared.student.encoder, opened.teacher.name());
        let model = &self.settings.training.model;
        check_tokenizer((student, &model.to_string_lossy()), (&theirs, &name))?;
        check_template(
            student,
            (&theirs, &name),
            &self.settings.training.data,
            &self.prepared.probes,
        )?;
        Ok(opened)
    }

    fn checkpoint(&self, path: &Path) -> anyhow::Result<Here> {
        let adapter = self.settings.distillation.teacher_adapter.as_path();
        let adapter = Some(adapter).filter(|path| !path.as_os_str().is_empty());
        let teacher = CheckpointTeacher::open(path, adapter, self.prepared.student.model.place())?;
        let model = teacher.model();
        Ok(Here {
            bytes: model.bytes(),
            parameters: Some(model.parameters()),
            teacher: Box::new(teacher),
        })
    }

    fn gguf(&self, path: &Path) -> anyhow::Result<Here> {
        if !self.settings.distillation.teacher_adapter.as_os_str().is_empty() {
            let usage = "--teacher-adapter is for a checkpoint; pipit-convert merges it into a GGUF file";
            anyhow::bail!(UsageError::Usage(usage.into()));
        }
        let file = Gguf::open(path)?;
        let elements = |dimensions: &[u64]| dimensions.iter().product::<u64>() as usize;
        let tensors = file.tensors().iter().map(|tensor| elements(&tensor.dimensions));
        Ok(Here {
            bytes: path.metadata()?.len(),
            parameters: Some(tensors.sum()),
            teacher: Box::new(GgufTeacher::open(path, self.longest)?),
        })
    }

    fn served(&self, url: &str) -> anyhow::Result<Here> {
        let own = &self.settings.distillation;
        let options = ServedOptions {
            top_k: own.teacher_top_k,
            vocab_size: self.prepared.student.model.config().vocab_size,
            model: Some(own.teacher_model.clone()).filter(|name| !name.is_empty()),
            concurrency: own.teacher_requests,
            api_key: api_key_from_environment(),
            ..ServedOptions::default()
        };
        let teacher = ServedTeacher::connect(url, options)?;
        let why = probe(&self.prepared.student.encoder, |text| {
            teacher.tokens(text).map_err(TeacherError::from)
        })?;
        if let Some(why) = why {
            return Err(TeacherError::Tokenizer {
                teacher: teacher.name(),
                student: self.settings.training.model.display().to_string(),
                why,
            }
            .into());
        }
        Ok(Here {
            teacher: Box::new(teacher),
            bytes: 0,
            parameters: None,
        })
    }

    fn cached(&self, teacher: Box<dyn Teacher>) -> anyhow::Result<Box<dyn Teacher>> {
        let own = &self.settings.distillation;
        let encoder = &self.prepared.student.encoder;
        let binding = Binding {
            teacher: teacher.name(),
            tokenizer_sha256: encoder.tokenizer_sha256()?,
            template_sha256: encoder.template_sha256(),
            vocab_size: self.prepared.student.model.config().vocab_size,
            top_k: own.teacher_top_k,
        };
        Ok(Box::new(Cached::open(&own.teacher_cache, teacher, &binding)?))
    }
}
