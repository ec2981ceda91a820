//! Everything that is read before a distillation starts, but for the teacher.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context as _;
use pipit_convert::imatrix::Imatrix;
use pipit_convert::model::SourceModel;
use pipit_convert::quantize::{FileType, Recipe};
use serde_json::Value;

use crate::card::Base;
use crate::cli::Output;
use crate::cli::opened::Opened;
use crate::cli::options::OpdSettings;
use crate::cli::plan::Facts;
use crate::cli::sft::{LOSS_CHUNK, languages, train_options};
use crate::data::{DataReport, Encoder, Prompt, Row, Rows, Sample, read_prompts, read_rows};
use crate::opd::{OpdOptions, Task, Through};
use crate::rollout::RolloutOptions;

/// Rows that templates are compared on.
const PROBES: usize = 8;

/// The student and the data.
pub(super) struct Prepared {
    pub(super) student: Opened,
    pub(super) tasks: Vec<Task>,
    report: DataReport,
    pub(super) eval_tasks: Vec<Task>,
    eval_report: Option<DataReport>,
    pub(super) prompts: Vec<Prompt>,
    /// The values of the column `language`.
    pub(super) languages: Vec<String>,
    /// What the checkpoint says of itself.
    pub(super) base: Base,
    /// How the student becomes a GGUF file.
    pub(super) recipe: Option<Recipe>,
    /// The student's quantised weights.
    pub(super) through: Option<Through>,
    /// Some of the rows, to compare what templates make of them.
    pub(super) probes: Vec<Row>,
}

pub(super) fn prepare(
    settings: &mut OpdSettings,
    method_is_given: bool,
    output: Output,
) -> anyhow::Result<Prepared> {
    let recipe = recipe(settings)?;
    let config = &mut settings.training;
    let mut student = Opened::new(config, method_is_given)?;
    let reader = Reader {
        encoder: &student.encoder,
        max_length: config.max_length,
        column: &settings.distillation.teacher_column,
    };
    let fraction = settings.distillation.on_policy_fraction;
    let (rows, tasks, report) = reader.read(&config.data, None, fraction)?;
    output.warn(&config.data, &report);
    let (mut eval_tasks, mut eval_report, mut prompts) = (Vec::new(), None, Vec::new());
    if !config.eval_data.as_os_str().is_empty() {
        let path = &config.eval_data;
        // Student and teacher are compared on the answers that the rows have.
        let (rows, eval, mut report) = reader.read(path, Some(config.max_eval_samples), 0.0)?;
        let samples =
            |tasks: &[Task]| -> Vec<Sample> { tasks.iter().filter_map(|task| task.sample.clone()).collect() };
        report.find_leaks(&samples(&eval), &samples(&tasks));
        output.warn(path, &report);
        prompts = student.prompts(path, &rows)?;
        (eval_tasks, eval_report) = (eval, Some(report));
    }
    let through = match (&recipe, settings.distillation.through.is_empty()) {
        (Some(recipe), false) => {
            let source = SourceModel::open(&config.model)?;
            Some(Through::new(&mut student.model, &source, recipe)?)
        }
        _ => None,
    };
    Ok(Prepared {
        student,
        tasks,
        report,
        eval_tasks,
        eval_report,
        prompts,
        languages: languages(&rows),
        base: Base::read(&config.model).with_context(|| format!("cannot read {}", config.model.display()))?,
        recipe,
        through,
        probes: rows.rows.iter().flatten().take(PROBES).cloned().collect(),
    })
}

/// How the student becomes a GGUF file, where it does.
fn recipe(settings: &OpdSettings) -> anyhow::Result<Option<Recipe>> {
    let own = &settings.distillation;
    if own.gguf_type.is_empty() {
        return Ok(None);
    }
    let mut recipe = Recipe::new(FileType::from_name(&own.gguf_type)?);
    if !own.imatrix.as_os_str().is_empty() {
        recipe.imatrix = Some(Imatrix::open(&own.imatrix)?.importance(&own.imatrix.to_string_lossy()));
    }
    Ok(Some(recipe))
}

/// Reads rows as tasks.
struct Reader<'a> {
    encoder: &'a Encoder,
    max_length: usize,
    /// The column that names a teacher.
    column: &'a str,
}

impl Reader<'_> {
    /// `fraction` of the rows are answered by the student: all of them need no answers, and none no prompts.
    fn read(
        &self,
        path: &Path,
        limit: Option<usize>,
        fraction: f64,
    ) -> anyhow::Result<(Rows, Vec<Task>, DataReport)> {
        let rows = match fraction > 0.0 {
            true => read_prompts(path, limit)?,
            false => read_rows(path, limit)?,
        };
        let mut prompts = HashMap::new();
        let mut report = DataReport::default();
        if fraction > 0.0 {
            let (all, of_prompts) = self.encoder.prompts(path, &rows)?;
            prompts = all.into_iter().map(|(line, prompt)| (line, prompt.ids)).collect();
            report = of_prompts;
        }
        let mut samples = HashMap::new();
        if fraction < 1.0 {
            let (all, of_samples) = self.encoder.samples(path, &rows, self.max_length)?;
            samples = all.into_iter().map(|sample| (sample.line, sample)).collect();
            report = of_samples;
        }
        let tasks = rows.rows.iter().flatten().filter_map(|row: &Row| {
            let (prompt, sample) = (prompts.remove(&row.line), samples.remove(&row.line));
            // What a row lacks that needs it, the report says.
            let usable = (fraction == 0.0 || prompt.is_some()) && (fraction == 1.0 || sample.is_some());
            let route = row
                .columns
                .get(self.column)
                .and_then(Value::as_str)
                .map(str::to_owned);
            usable.then(|| Task {
                line: row.line,
                prompt: prompt.unwrap_or_default(),
                sample,
                route,
            })
        });
        let tasks = tasks.collect();
        Ok((rows, tasks, report))
    }
}

impl Prepared {
    /// The most tokens that a text can have.
    pub(super) fn longest(&self, options: &OpdOptions) -> usize {
        let drawn = self
            .tasks
            .iter()
            .map(|task| task.prompt.len() + options.max_new_tokens)
            .max();
        let samples = self
            .tasks
            .iter()
            .chain(&self.eval_tasks)
            .filter_map(|task| task.sample.as_ref());
        let given = samples.map(|sample| sample.ids.len()).max();
        drawn.max(given).unwrap_or(0).min(self.student.model.longest())
    }

    /// How to distil.
    pub(super) fn options(&self, settings: &OpdSettings) -> OpdOptions {
        let own = &settings.distillation;
        let lengths = vec![0; self.tasks.len()];
        OpdOptions {
            train: train_options(&settings.training, lengths),
            objective: settings.objective(LOSS_CHUNK),
            on_policy_fraction: own.on_policy_fraction,
            rollout: RolloutOptions {
                draw: settings.draw(),
                num_generations: own.num_generations,
                width: own.generation_batch_size,
            },
            max_new_tokens: own.max_new_tokens,
            steps_per_generation: own.steps_per_generation,
        }
    }

    /// What a plan is made of: every answer as long as it can become.
    pub(super) fn facts(&self, options: &OpdOptions, teacher: u64, through: Option<&Through>) -> Facts<'_> {
        Facts {
            model: &self.student.model,
            lengths: self.tasks.iter().map(|task| task.longest(options)).collect(),
            report: &self.report,
            eval_report: self.eval_report.as_ref(),
            teacher_bytes: teacher + through.map_or(0, Through::bytes),
            at_once: through.is_none(),
        }
    }
}
