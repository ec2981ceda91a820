//! `--resume-from-checkpoint`: which run goes on, from which checkpoint, and with which settings.

use std::path::{Path, PathBuf};

use super::UsageError;
use super::options::{OpdGiven, OpdSettings, SftConfig, SftOptions, read_toml};
use crate::trainer::checkpoint;

/// A run to go on with.
#[derive(Debug)]
pub(super) struct Resume {
    /// Its folder.
    pub(super) run: PathBuf,
    /// The checkpoint.
    pub(super) checkpoint: PathBuf,
    /// The step after which it was saved.
    pub(super) step: usize,
}

/// Settings that may change: they say what is shown, evaluated and saved and when it is enough, not how weights move.
const FREE: [&str; 11] = [
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "early_stopping_patience",
    "early_stopping_threshold",
    "load_best_model_at_end",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "gradient_checkpointing",
    "resume_from_checkpoint",
];
/// Settings that may change, but then the run is not what it would have been without a stop.
const OTHER_RESULT: [&str; 14] = [
    "device",
    "bf16",
    "fp16",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
];

impl Resume {
    /// Looks a run's folder, or one of its checkpoints, up.
    pub(super) fn find(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        if !path.is_dir() {
            anyhow::bail!("--resume-from-checkpoint {shown}: there is no such folder");
        }
        let (run, checkpoint) = if path.join(checkpoint::STATE_FILE).exists() {
            let whole = path.canonicalize()?;
            let run = whole.parent().unwrap_or(&whole).to_path_buf();
            (run, Some(path.to_path_buf()))
        } else {
            let last = checkpoint::list(path)?.pop();
            (path.to_path_buf(), last.map(|(_, checkpoint)| checkpoint))
        };
        if run.join("summary.json").exists() {
            anyhow::bail!("{} went through: it has nothing to go on with", run.display());
        }
        let step = checkpoint.as_deref().and_then(step_of);
        let (Some(checkpoint), Some(step)) = (checkpoint, step) else {
            anyhow::bail!(
                "--resume-from-checkpoint {shown} has no checkpoint\nhint: name the folder of a run that was stopped, or a checkpoint-N in it"
            );
        };
        Ok(Self {
            run,
            checkpoint,
            step,
        })
    }

    /// The options that the run began with.
    pub(super) fn stored(&self) -> PathBuf {
        self.run.join("config.resolved.toml")
    }

    /// Refuses another folder than the run's own.
    pub(super) fn check_place(&self, output_dir: Option<&Path>) -> Result<(), UsageError> {
        let own = self.run.canonicalize().ok();
        if output_dir.is_none_or(|dir| dir.canonicalize().ok() == own) {
            return Ok(());
        }
        Err(UsageError::Usage(format!(
            "-o: the run goes on in its own folder, {}\nhint: leave -o out",
            self.run.display()
        )))
    }

    /// The settings of the run, with those that are given over them. Refuses a change that would make it another run;
    /// the second value names changes that make another result.
    pub(super) fn settings(&self, given: SftOptions) -> Result<(SftConfig, Vec<String>), UsageError> {
        let stored = read_toml(&self.stored())?;
        self.check_place(given.output_dir.as_deref())?;
        let before = table(stored.clone().resolve(SftOptions::default()).resolved())?;
        let options = given.or(stored);
        options.check()?;
        let mut config = options.resolve(SftOptions::default());
        config.output_dir.clone_from(&self.run);
        let changes = changes(&before, table(config.resolved())?)?;
        // The run's own record says how it goes on, not from where.
        config.resume_from_checkpoint = PathBuf::new();
        Ok((config, changes))
    }

    /// The same of a distillation.
    pub(super) fn opd_settings(&self, given: OpdGiven) -> Result<(OpdSettings, Vec<String>), UsageError> {
        let stored = OpdGiven::read(&self.stored())?;
        self.check_place(given.training.output_dir.as_deref())?;
        let before = table(stored.clone().resolve().resolved())?;
        let options = given.or(stored);
        options.check()?;
        let mut settings = options.resolve();
        settings.training.output_dir.clone_from(&self.run);
        let changes = changes(&before, table(settings.resolved())?)?;
        settings.training.resume_from_checkpoint = PathBuf::new();
        Ok((settings, changes))
    }
}

/// The settings that differ and make another result; an error for one that would make it another run.
fn changes(before: &toml::Table, now: toml::Table) -> Result<Vec<String>, UsageError> {
    let mut changes = Vec::new();
    for (key, value) in now {
        let old = before.get(&key);
        if old == Some(&value) || key == "output_dir" || FREE.contains(&key.as_str()) {
            continue;
        }
        let flag = format!("--{}", key.replace('_', "-"));
        let old = old.map_or("not given".to_owned(), toml::Value::to_string);
        if !OTHER_RESULT.contains(&key.as_str()) {
            return Err(UsageError::Usage(format!(
                "{flag} is {value}, but the run began with {old}: that would be another run\nhint: leave {flag} out, or begin a run in another folder with -o"
            )));
        }
        changes.push(format!("{flag} is {value} now, {old} before"));
    }
    Ok(changes)
}

/// N of `checkpoint-N`.
fn step_of(checkpoint: &Path) -> Option<usize> {
    let name = checkpoint.canonicalize().ok()?;
    name.file_name()?
        .to_str()?
        .strip_prefix("checkpoint-")?
        .parse()
        .ok()
}

fn table(settings: Result<toml::Table, toml::ser::Error>) -> Result<toml::Table, UsageError> {
    settings.map_err(|e| UsageError::Usage(e.to_string()))
}
