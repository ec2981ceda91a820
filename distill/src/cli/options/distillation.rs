//! The options that `opd` has beside those of any training.

use std::path::{Path, PathBuf};

use pipit_convert::adapter::Patterns;
use pipit_convert::quantize::FileType;
use serde::{Deserialize, Serialize};

use super::{SftConfig, SftOptions, UsageError, is_absent, needed, options, parse_json, read_known};
use crate::loss::{Loss, Objective};
use crate::rollout::Draw;

/// The losses, as `--loss` spells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LossName {
    /// KL(teacher‖student).
    ForwardKl,
    /// KL(student‖teacher).
    ReverseKl,
    /// Between both, by --beta.
    Jsd,
    /// KL(teacher‖a mixture), by --skew-alpha.
    SkewForwardKl,
    /// KL(student‖a mixture), by --skew-alpha.
    SkewReverseKl,
    /// What speculative decoding rejects.
    TotalVariation,
    /// Reverse KL of the drawn tokens only.
    PolicyGradient,
}

/// Who draws the student's answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum RolloutSource {
    /// The student as it is trained.
    Student,
    /// The GGUF file that it becomes, in llama.cpp.
    Gguf,
}

options! {
    DistillationOptions, DistillationConfig;
    #[arg(value_name = "DIR|FILE.gguf|URL")]
    teacher: String = String::new(), "Whom the student learns from: a checkpoint, a GGUF file, or an OpenAI-compatible server; `base` is the student's own base without its adapter";
    #[arg(value_name = "DIR")]
    teacher_adapter: PathBuf = PathBuf::new(), "An adapter in PEFT's layout that the teacher's checkpoint carries";
    #[arg(value_parser = parse_json::<Patterns<String>>, value_name = "JSON")]
    teachers: Patterns<String> = Patterns::default(), "Several teachers: {\"VALUE\": \"DIR|FILE.gguf|URL\", …}, by the value of --teacher-column";
    #[arg(value_name = "COLUMN")]
    teacher_column: String = "teacher".into(), "The column of the data that says which of --teachers is asked [default: teacher]";
    #[arg(value_name = "DIR")]
    teacher_cache: PathBuf = PathBuf::new(), "A folder that keeps the teacher's scores, its most probable tokens";
    teacher_top_k: usize = 20, "So many tokens are asked of a served teacher, and kept in a cache; 0 asks for the texts' own only [default: 20]";
    teacher_model: String = String::new(), "The model's name on the server";
    teacher_requests: usize = 4, "Requests to the server at one time [default: 4]";
    #[arg(value_enum)]
    loss: LossName = LossName::Jsd, "What is minimised [default: jsd]";
    beta: f64 = 0.5, "With jsd: 0 is forward-kl, 1 reverse-kl [default: 0.5]";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    jsd_rescaled: bool = false, "Divide jsd by beta·(1 − beta), which goes over into both ends without a jump";
    skew_alpha: f64 = 0.1, "With a skew loss: the share of the other distribution in the mixture [default: 0.1]";
    discount: f64 = 0.0, "With policy-gradient: what a token's reward counts at the token before it [default: 0]";
    temperature: f64 = 1.0, "Both models' logits are divided by it [default: 1]";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    t_squared: bool = false, "Multiply the loss by the temperature's square";
    loss_top_k: usize = 0, "The loss looks at so many of the teacher's most probable tokens, and at all others as one; 0 looks at all [default: 0]";
    ce_weight: f64 = 0.0, "The weight of the answers' cross-entropy, which is added [default: 0]";
    on_policy_fraction: f64 = 0.5, "The share of rows that the student answers itself; the others are trained on with the answers of the data [default: 0.5]";
    max_new_tokens: usize = 128, "The most tokens of an answer [default: 128]";
    num_generations: usize = 1, "Answers to each prompt [default: 1]";
    steps_per_generation: usize = 1, "Answers are drawn for so many steps at a time [default: 1]";
    generation_batch_size: usize = 32, "Answers that are drawn at one time [default: 32]";
    rollout_temperature: f64 = 1.0, "The temperature of the drawing; 0 takes the most probable token [default: that of the loss]";
    top_k: usize = 0, "Draw from so many of the most probable tokens; 0 from all [default: 0]";
    top_p: f64 = 1.0, "Draw from the most probable tokens that together have this probability [default: 1]";
    #[arg(value_enum)]
    rollouts: RolloutSource = RolloutSource::Student, "Who draws the answers [default: student]";
    #[arg(value_name = "TYPE")]
    through: String = String::new(), "The student computes with the weights that it has as a GGUF file of this type, as llama-quantize spells it: Q4_K_M, Q4_0, …";
    #[arg(value_name = "TYPE")]
    gguf_type: String = String::new(), "The type of the GGUF file that the result is measured as, on --eval-data, and that --rollouts gguf draws from [default: that of --through; else it is not measured]";
    #[arg(value_name = "F")]
    imatrix: PathBuf = PathBuf::new(), "The importance matrix that the GGUF file is made with";
    draft_cost: f64 = 0.0, "The time of a token of the student in those of a token of the teacher, for what the student is worth as its draft model [default: by their sizes]";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    controls: bool = false, "Train off-policy and on-policy without --through too, from the same start, and show the three side by side";
}

/// What is given for a distillation: of a training, and beside it.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(
    mut_arg("model", |arg| arg.long("student").help("The checkpoint folder to start from")),
    mut_arg("data", |arg| arg.long("prompts").help("Rows: `messages`, or `prompt` and `completion`; answers may be missing where the student answers all")),
    mut_arg("packing", |arg| arg.hide(true))
)]
pub struct OpdGiven {
    /// Those of any training.
    #[command(flatten)]
    pub training: SftOptions,
    /// Those beside it.
    #[command(flatten)]
    pub distillation: DistillationOptions,
}

/// All options of a distillation with their values.
#[derive(Debug, Clone)]
pub struct OpdSettings {
    /// Those of any training; `model` is the student, `data` the prompts.
    pub training: SftConfig,
    /// Those beside it.
    pub distillation: DistillationConfig,
}

/// What a distillation calls (left) what a training calls otherwise.
const NAMES: [(&str, &str); 2] = [("student", "model"), ("prompts", "data")];

impl OpdGiven {
    /// Reads a TOML file of options.
    pub fn read(path: &Path) -> Result<Self, UsageError> {
        let own = |key: &&str| !NAMES.iter().any(|(_, training)| training == key) && *key != "packing";
        let training = SftOptions::KEYS.iter().copied().filter(|key| own(key));
        let names = NAMES.iter().map(|(opd, _)| *opd);
        let known: Vec<&str> = names
            .chain(training)
            .chain(DistillationOptions::KEYS.iter().copied())
            .collect();
        let bad = |e: toml::de::Error| UsageError::Config(path.to_path_buf(), e.to_string());
        let mut table: toml::Table = toml::from_str(&read_known(path, &known)?).map_err(bad)?;
        for (opd, training) in NAMES {
            if let Some(value) = table.remove(opd) {
                table.insert(training.into(), value);
            }
        }
        let value = toml::Value::Table(table);
        Ok(Self {
            training: value.clone().try_into().map_err(bad)?,
            distillation: value.try_into().map_err(bad)?,
        })
    }

    /// Fills in from `file`.
    pub fn or(self, file: Self) -> Self {
        Self {
            training: self.training.or(file.training),
            distillation: self.distillation.or(file.distillation),
        }
    }

    /// Refuses options of another method than the one that is chosen.
    pub fn check(&self) -> Result<(), UsageError> {
        if self.training.packing.is_some() {
            return Err(UsageError::Usage(
                "--packing is not for opd: how long an answer becomes is not known before".into(),
            ));
        }
        self.training.check()
    }

    /// Fills in from the defaults.
    pub fn resolve(mut self) -> OpdSettings {
        let temperature = self.distillation.temperature.unwrap_or(1.0);
        self.distillation.rollout_temperature.get_or_insert(temperature);
        let through = self.distillation.through.clone().unwrap_or_default();
        self.distillation.gguf_type.get_or_insert(through);
        OpdSettings {
            training: self.training.resolve(SftOptions::default()),
            distillation: self.distillation.or_default(),
        }
    }
}

impl OpdSettings {
    /// What `config.resolved.toml` says: every option that counts.
    pub fn resolved(&self) -> Result<toml::Table, toml::ser::Error> {
        let mut table = self.training.resolved()?;
        table.remove("packing");
        for (opd, training) in NAMES {
            if let Some(value) = table.remove(training) {
                table.insert(opd.into(), value);
            }
        }
        let own = toml::Table::try_from(&self.distillation)?;
        let is_empty = |value: &toml::Value| {
            value.as_str().is_some_and(str::is_empty) || value.as_table().is_some_and(toml::Table::is_empty)
        };
        table.extend(own.into_iter().filter(|(_, value)| !is_empty(value)));
        Ok(table)
    }

    /// Refuses values that cannot be meant. What the loss is made of is for [`Objective::check`] to say.
    pub fn check(&self) -> Result<(), UsageError> {
        let usage = |text: String| Err(UsageError::Usage(text));
        needed("--student", &self.training.model)?;
        needed("--prompts", &self.training.data)?;
        self.training.check_values()?;
        let own = &self.distillation;
        match (own.teacher.is_empty(), own.teachers.0.is_empty()) {
            (true, true) => needed("--teacher", Path::new(""))?,
            (false, false) => return usage("--teacher and --teachers cannot be given together".into()),
            _ => {}
        }
        for (flag, value) in [
            ("--max-new-tokens", own.max_new_tokens),
            ("--num-generations", own.num_generations),
            ("--steps-per-generation", own.steps_per_generation),
            ("--generation-batch-size", own.generation_batch_size),
            ("--teacher-requests", own.teacher_requests),
        ] {
            if value == 0 {
                return usage(format!("{flag} must be at least 1"));
            }
        }
        for (flag, value, low, high) in [
            ("--on-policy-fraction", own.on_policy_fraction, 0.0, 1.0),
            ("--rollout-temperature", own.rollout_temperature, 0.0, 1e6),
            ("--top-p", own.top_p, f64::MIN_POSITIVE, 1.0),
            ("--draft-cost", own.draft_cost, 0.0, 1e6),
        ] {
            if !(low..=high).contains(&value) {
                return usage(format!("{flag} is {value}, which is out of range"));
            }
        }
        for (flag, name) in [("--through", &own.through), ("--gguf-type", &own.gguf_type)] {
            if let Err(e) = FileType::from_name(name)
                && !name.is_empty()
            {
                return usage(format!("{flag}: {e}"));
            }
        }
        if !own.through.is_empty() && !own.gguf_type.eq_ignore_ascii_case(&own.through) {
            return usage(
                "--gguf-type is another type than --through: what is trained would not be what is measured"
                    .into(),
            );
        }
        if own.rollouts == RolloutSource::Gguf && own.gguf_type.is_empty() {
            return usage("--rollouts gguf needs --gguf-type or --through".into());
        }
        if own.controls && own.through.is_empty() {
            return usage("--controls compares with --through, which is not given".into());
        }
        if !own.gguf_type.is_empty()
            && self.training.eval_data.as_os_str().is_empty()
            && own.rollouts == RolloutSource::Student
        {
            return usage("the GGUF file is measured on --eval-data, which is not given".into());
        }
        Ok(())
    }

    /// What is minimised, `chunk` rows of logits at a time.
    pub fn objective(&self, chunk: usize) -> Objective {
        let own = &self.distillation;
        Objective {
            loss: match own.loss {
                LossName::ForwardKl => Loss::ForwardKl,
                LossName::ReverseKl => Loss::ReverseKl,
                LossName::Jsd => Loss::Jsd {
                    beta: own.beta,
                    rescaled: own.jsd_rescaled,
                },
                LossName::SkewForwardKl => Loss::SkewForwardKl {
                    alpha: own.skew_alpha,
                },
                LossName::SkewReverseKl => Loss::SkewReverseKl {
                    alpha: own.skew_alpha,
                },
                LossName::TotalVariation => Loss::TotalVariation,
                LossName::PolicyGradient => Loss::PolicyGradient {
                    discount: own.discount,
                },
            },
            temperature: own.temperature,
            t_squared: own.t_squared,
            top_k: Some(own.loss_top_k).filter(|k| *k > 0),
            ce_weight: own.ce_weight,
            chunk,
        }
    }

    /// How tokens are drawn.
    pub fn draw(&self) -> Draw {
        let own = &self.distillation;
        Draw {
            temperature: own.rollout_temperature,
            top_k: own.top_k,
            top_p: own.top_p,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<OpdGiven, UsageError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        OpdGiven::read(file.path())
    }

    const NEEDED: &str = "student = 's'\nprompts = 'p'\nteacher = 't'\n";

    #[test]
    fn a_resolved_configuration_can_be_read_again() {
        let settings = read(&format!(
            "{NEEDED}temperature = 0.5\nthrough = 'q4_0'\neval_data = 'e'"
        ))
        .unwrap()
        .resolve();
        settings.check().unwrap();
        assert_eq!(settings.draw().temperature, 0.5);
        let text = toml::to_string(&settings.resolved().unwrap()).unwrap();
        let again = read(&text).unwrap();
        again.check().unwrap();
        assert_eq!(
            toml::to_string(&again.resolve().resolved().unwrap()).unwrap(),
            text
        );
        assert!(
            text.contains("student = \"s\"") && !text.contains("model ="),
            "{text}"
        );
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (text, named) in [
            ("model = 'm'", "`model`"),
            ("packing = true", "`packing`"),
            ("beat = 0.5", "`beta`"),
        ] {
            let error = read(&format!("{NEEDED}{text}")).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        for (text, named) in [
            ("on_policy_fraction = 1.5", "--on-policy-fraction is 1.5"),
            ("num_generations = 0", "--num-generations"),
            ("through = 'Q4_9'", "--through: Q4_9"),
            ("through = 'Q4_0'\ngguf_type = 'Q8_0'", "--gguf-type is another"),
            ("rollouts = 'gguf'", "--rollouts gguf needs"),
            ("controls = true", "--controls"),
            ("through = 'Q4_0'", "--eval-data"),
            ("top_p = 0.0", "--top-p"),
            ("teachers = {a = 'x'}", "cannot be given together"),
        ] {
            let error = read(&format!("{NEEDED}{text}")).unwrap().resolve().check();
            let error = error.unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
