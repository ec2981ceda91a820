//! `--resume-from-checkpoint`: which run goes on, from which checkpoint, and with which settings.

use std::path::{Path, PathBuf};

use super::UsageError;
use super::options::{SftConfig, SftOptions, read_toml};
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
const OTHER_RESULT: [&str; 11] = [
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

    /// The settings of the run, with those that are given over them. Refuses a change that would make it another run;
    /// the second value names changes that make another result.
    pub(super) fn settings(&self, given: SftOptions) -> Result<(SftConfig, Vec<String>), UsageError> {
        let stored = read_toml(&self.run.join("config.resolved.toml"))?;
        let other_place = given
            .output_dir
            .as_ref()
            .is_some_and(|dir| dir.canonicalize().ok() != self.run.canonicalize().ok());
        if other_place {
            return Err(UsageError::Usage(format!(
                "-o: the run goes on in its own folder, {}\nhint: leave -o out",
                self.run.display()
            )));
        }
        let before = table(&stored.clone().resolve(SftOptions::default()))?;
        let options = given.or(stored);
        options.check()?;
        let mut config = options.resolve(SftOptions::default());
        config.output_dir.clone_from(&self.run);
        let mut changes = Vec::new();
        for (key, value) in table(&config)? {
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
        // The run's own record says how it goes on, not from where.
        config.resume_from_checkpoint = PathBuf::new();
        Ok((config, changes))
    }
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

fn table(config: &SftConfig) -> Result<toml::Table, UsageError> {
    config.resolved().map_err(|e| UsageError::Usage(e.to_string()))
}
