//! The options of `sft`, which are those of `opd` too: flags, the same keys in a TOML file, and defaults.

mod distillation;
mod method;

use std::path::{Path, PathBuf};

pub use distillation::{
    DistillationConfig, DistillationOptions, LossName, OpdGiven, OpdSettings, RolloutSource,
};
pub use method::Method;
use method::is_of_adapters;
use pipit_convert::adapter::{Patterns, TargetModules};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::UsageError;
use crate::adapter::{Bias, InitLoraWeights, PromptTuningInit};
use crate::optimizer::{Optim, Schedule};
use crate::trainer::{Strategy, When};

/// The four-bit types of bitsandbytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum QuantType {
    /// Four bits whose values are the quantiles of a normal distribution.
    Nf4,
    /// Four bits of a float; refused by name.
    Fp4,
}

/// Values with commas between them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct List<T>(pub Vec<T>);

/// Declares every option once: the flag, the TOML key, and the resolved value.
macro_rules! options {
    ($options:ident, $config:ident; $($(#[arg($($arg:tt)*)])? $name:ident: $ty:ty = $default:expr, $doc:literal;)*) => {
        /// Options as given on the command line or in a TOML file; what is not given is none.
        #[derive(Debug, Clone, Default, clap::Args, Deserialize)]
        #[serde(default)]
        pub struct $options {
            $(#[doc = $doc] #[arg(long $(, $($arg)*)?)] pub $name: Option<$ty>,)*
        }

        /// All options with their values.
        #[derive(Debug, Clone, Serialize)]
        pub struct $config {
            $(#[doc = $doc] #[serde(skip_serializing_if = "is_absent")] pub $name: $ty,)*
        }

        impl $options {
            /// The keys that a TOML file may have.
            pub const KEYS: &[&str] = &[$(stringify!($name)),*];

            /// Fills in from `file`.
            pub fn or(self, file: Self) -> Self {
                Self { $($name: self.$name.or(file.$name),)* }
            }

            /// The keys of the options that are given.
            pub fn given(&self) -> Vec<&'static str> {
                let given = [$((stringify!($name), self.$name.is_some())),*];
                given.into_iter().filter(|(_, given)| *given).map(|(key, _)| key).collect()
            }

            /// Fills in from the defaults.
            fn or_default(self) -> $config {
                $config { $($name: self.$name.unwrap_or_else(|| $default),)* }
            }
        }
    };
}
use options;

options! {
    SftOptions, SftConfig;
    #[arg(value_name = "DIR|FILE.gguf")]
    model: PathBuf = PathBuf::new(), "The checkpoint folder to start from; lora and qlora also train over the blocks of a GGUF file";
    #[arg(value_name = "F.jsonl|F.parquet")]
    data: PathBuf = PathBuf::new(), "Rows to train on: `messages`, or `prompt` and `completion`, or `text`";
    #[arg(short = 'o', value_name = "RUN")]
    output_dir: PathBuf = PathBuf::new(), "The folder to make; one that holds work is not written over";
    #[arg(value_enum)]
    method: Method = Method::Lora, "What is trained [default: lora]";
    per_device_train_batch_size: usize = 8, "Sequences in one forward pass [default: 8]";
    gradient_accumulation_steps: usize = 1, "Forward passes in one step [default: 1]";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    packing: bool = false, "A forward pass takes as many rows as fit into its sequences of --max-length tokens; no row sees another";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    gradient_checkpointing: bool = false, "Keep no activations, compute them again: less memory, one more forward pass, the same bits [default: true with qlora]";
    #[arg(value_name = "cpu|cuda[:N]|metal[:N]")]
    device: String = "cpu".into(), "Where to train: the CPU, or a GPU that this program was built for [default: cpu]";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    bf16: bool = false, "On a GPU: hidden states and frozen weights in bfloat16; what is trained stays in f32";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    fp16: bool = false, "The same in float16, with loss scaling, for GPUs without bfloat16";
    #[arg(value_enum)]
    optim: Optim = Optim::AdamwTorch, "AdamW with its moments in f32, or on the CPU in eight bits: a quarter of their memory [default: adamw_torch]";
    learning_rate: f64 = 2e-4, "The learning rate after the warm-up [default: 2e-4]";
    num_train_epochs: f64 = 3.0, "Passes over the data, where --max-steps is not given [default: 3]";
    max_steps: usize = 0, "Steps to do, whatever the number of passes";
    #[arg(value_enum)]
    lr_scheduler_type: Schedule = Schedule::Linear, "How the learning rate goes on [default: linear]";
    warmup_steps: usize = 0, "Steps over which the learning rate rises from 0";
    warmup_ratio: f64 = 0.0, "The same as a share of all steps, where --warmup-steps is not given";
    weight_decay: f64 = 0.0, "Weight decay, not of norms [default: 0]";
    max_grad_norm: f64 = 1.0, "Longer gradients are shortened to this; 0 does not [default: 1]";
    adam_beta1: f64 = 0.9, "AdamW's first decay [default: 0.9]";
    adam_beta2: f64 = 0.999, "AdamW's second decay [default: 0.999]";
    adam_epsilon: f64 = 1e-8, "AdamW's epsilon [default: 1e-8]";
    seed: u64 = 42, "The same seed gives the same bits [default: 42]";
    logging_steps: usize = 10, "A line of figures every so many steps [default: 10]";
    #[arg(value_name = "F.jsonl|F.parquet")]
    eval_data: PathBuf = PathBuf::new(), "Rows to evaluate on";
    #[arg(value_enum)]
    eval_strategy: Strategy = Strategy::Steps, "When to evaluate; once at the end always [default: steps]";
    eval_steps: usize = 0, "An evaluation every so many steps [default: 0, at the end only]";
    max_eval_samples: usize = 100, "The most rows of --eval-data that are used [default: 100]";
    early_stopping_patience: usize = 0, "End after so many evaluations that were not better [default: 0, do not]";
    early_stopping_threshold: f64 = 0.0, "Better is an evaluation loss that is smaller by more than this [default: 0]";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    load_best_model_at_end: bool = false, "End with the weights of the best evaluation, whose checkpoint is kept";
    #[arg(value_enum)]
    save_strategy: Strategy = Strategy::Steps, "When to save a checkpoint; always when the run is stopped [default: steps]";
    save_steps: usize = 500, "A checkpoint every so many steps [default: 500]";
    save_total_limit: usize = 2, "The most checkpoints that are kept, beside the best; 0 keeps all [default: 2]";
    #[arg(value_name = "RUN|CHECKPOINT")]
    resume_from_checkpoint: PathBuf = PathBuf::new(), "Go on with a run that was stopped, from its last checkpoint or from this one; other options are those of the run";
    max_length: usize = 0, "Longer sequences are cut to so many tokens, and reported [default: 1024, or what the model knows]";
    r: usize = 8, "The rank of the adapters [default: 8]";
    lora_alpha: f64 = 16.0, "The adapters' scale is this through r [default: 16]";
    lora_dropout: f64 = 0.0, "The chance with which an adapter's input is dropped [default: 0]";
    #[arg(value_parser = parse_targets, value_name = "NAMES|REGEX")]
    target_modules: TargetModules = TargetModules::Pattern("all-linear".into()),
        "Layers with an adapter: names with commas, a regular expression, or all-linear [default: all-linear]";
    #[arg(value_parser = parse_targets, value_name = "NAMES|REGEX")]
    exclude_modules: TargetModules = TargetModules::Names(vec![]), "Layers without an adapter all the same";
    #[arg(value_parser = parse_list::<usize>, value_name = "N,…")]
    layers_to_transform: List<usize> = List::default(), "Adapt these blocks only, where --target-modules lists names";
    #[arg(value_parser = parse_list::<String>, value_name = "NAMES")]
    layers_pattern: List<String> = List::default(), "What stands before a block's index in a module's name";
    #[arg(value_parser = parse_json::<Patterns<usize>>, value_name = "JSON")]
    rank_pattern: Patterns<usize> = Patterns::default(), "Other ranks by module: {\"REGEX\": R, …}, the first that matches";
    #[arg(value_parser = parse_json::<Patterns<f64>>, value_name = "JSON")]
    alpha_pattern: Patterns<f64> = Patterns::default(), "Other alphas by module: {\"REGEX\": ALPHA, …}";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    use_rslora: bool = false, "Scale by lora_alpha / √r";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    use_dora: bool = false, "Train the lengths of the weights' rows beside their directions";
    #[arg(value_name = "true|gaussian|false")]
    init_lora_weights: InitLoraWeights = InitLoraWeights::True, "What A and B start from [default: true]";
    #[arg(value_enum)]
    bias: Bias = Bias::None, "Which of the model's biases are trained too [default: none]";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    lora_bias: bool = false, "Give B a bias";
    #[arg(value_parser = parse_list::<String>, value_name = "NAMES")]
    modules_to_save: List<String> = List::default(), "Modules that are trained and stored whole: lm_head, embed_tokens, norm";
    num_virtual_tokens: usize = 20, "Rows before every sequence, with --method prompt or prefix [default: 20]";
    #[arg(value_enum)]
    prompt_tuning_init: PromptTuningInit = PromptTuningInit::Random, "What a soft prompt starts from [default: RANDOM]";
    #[arg(value_name = "TEXT")]
    prompt_tuning_init_text: String = String::new(), "The text of --prompt-tuning-init TEXT";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    prefix_projection: bool = false, "Make the prefix by two layers while it is trained";
    encoder_hidden_size: usize = 0, "The width between those layers [default: that of a row of keys]";
    #[arg(value_name = "DIR")]
    adapter: PathBuf = PathBuf::new(), "A stored adapter to train further, instead of a new one";
    #[arg(value_enum)]
    bnb_4bit_quant_type: QuantType = QuantType::Nf4, "The base's type with --method qlora on a folder [default: nf4]";
    #[arg(num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", action = clap::ArgAction::Set)]
    bnb_4bit_use_double_quant: bool = true, "Whether its scales are quantised too, as in the QLoRA paper [default: true]";
}

impl SftOptions {
    /// Fills in from `file`, then from the defaults.
    pub fn resolve(self, file: Self) -> SftConfig {
        let mut given = self.or(file);
        if given.method == Some(Method::Qlora) {
            // As PEFT's prepare_model_for_kbit_training has it: who asks for four bits is short of memory.
            given.gradient_checkpointing.get_or_insert(true);
        }
        given.or_default()
    }
}

/// A path that was not given, which TOML cannot express.
fn is_absent<T: 'static>(value: &T) -> bool {
    let value: &dyn std::any::Any = value;
    value
        .downcast_ref::<PathBuf>()
        .is_some_and(|path| path.as_os_str().is_empty())
}

/// Values with commas between them.
pub(super) fn parse_list<T: std::str::FromStr<Err: std::fmt::Display>>(
    text: &str,
) -> Result<List<T>, String> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let values = parts.map(|part| part.parse().map_err(|e| format!("{part:?}: {e}")));
    Ok(List(values.collect::<Result<_, _>>()?))
}

/// A JSON value, in which no key stands twice.
fn parse_json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    pipit_convert::json::from_slice(text.as_bytes()).map_err(|e| e.to_string())
}

/// `all-linear`, a regular expression (anything with a character that a name does not have), or names.
#[expect(clippy::unnecessary_wraps, reason = "clap's value parsers return a result")]
fn parse_targets(text: &str) -> Result<TargetModules, std::convert::Infallible> {
    let name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | ',' | '-' | ' ');
    if text == "all-linear" || !text.chars().all(name) {
        return Ok(TargetModules::Pattern(text.to_owned()));
    }
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    Ok(TargetModules::Names(names.map(str::to_owned).collect()))
}

fn needed(flag: &str, path: &Path) -> Result<(), UsageError> {
    match path.as_os_str().is_empty() {
        true => Err(UsageError::Usage(format!(
            "{flag} is missing\nhint: pipit-distill sft --help shows an example"
        ))),
        false => Ok(()),
    }
}

/// Reads a TOML file of options; an unknown key is refused with the nearest name.
pub fn read_toml(path: &Path) -> Result<SftOptions, UsageError> {
    let text = read_known(path, SftOptions::KEYS)?;
    toml::from_str(&text).map_err(|e| UsageError::Config(path.to_path_buf(), e.to_string()))
}

/// The text of a TOML file; a key that is none of `known` is refused with the nearest name.
fn read_known(path: &Path, known: &[&str]) -> Result<String, UsageError> {
    let bad = |why: String| UsageError::Config(path.to_path_buf(), why);
    let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
    let table: toml::Table = toml::from_str(&text).map_err(|e| bad(e.to_string()))?;
    for key in table.keys() {
        if !known.contains(&key.as_str()) {
            let nearest = known
                .iter()
                .max_by(|a, b| strsim::jaro_winkler(a, key).total_cmp(&strsim::jaro_winkler(b, key)));
            return Err(bad(format!(
                "unknown key `{key}`\nhint: did you mean `{}`?",
                nearest.unwrap_or(&"")
            )));
        }
    }
    Ok(text)
}

impl SftOptions {
    /// Refuses options of another method than the one that is chosen, and those that a stored adapter decides.
    pub fn check(&self) -> Result<(), UsageError> {
        let method = self.method.unwrap_or(Method::Lora);
        let stored = self.adapter.is_some();
        for key in self.given().into_iter().filter(|key| is_of_adapters(key)) {
            let flag = format!("--{}", key.replace('_', "-"));
            if stored && key != "adapter" {
                return Err(UsageError::Usage(format!(
                    "{flag} cannot be given with --adapter, which decides it"
                )));
            }
            let decided = stored && self.method.is_none();
            if !method.takes(key) && !decided {
                return Err(UsageError::Usage(format!(
                    "{flag} is not for --method {}\nhint: leave it out, or choose another method",
                    method.name()
                )));
            }
        }
        Ok(())
    }
}

impl SftConfig {
    /// What `config.resolved.toml` says: every option that counts.
    pub fn resolved(&self) -> Result<toml::Table, toml::ser::Error> {
        let stored = !self.adapter.as_os_str().is_empty();
        let mut table = toml::Table::try_from(self)?;
        table.retain(|key, value| match is_of_adapters(key) {
            true if stored => key == "adapter",
            true => self.method.takes(key) && !value.as_str().is_some_and(str::is_empty),
            false => true,
        });
        Ok(table)
    }

    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<(), UsageError> {
        for (flag, path) in [("--model", &self.model), ("--data", &self.data)] {
            needed(flag, path)?;
        }
        self.check_values()
    }

    /// The same, whatever the model and the data are called.
    fn check_values(&self) -> Result<(), UsageError> {
        let usage = |text: String| Err(UsageError::Usage(text));
        for (flag, value) in [
            ("--per-device-train-batch-size", self.per_device_train_batch_size),
            ("--gradient-accumulation-steps", self.gradient_accumulation_steps),
            ("--logging-steps", self.logging_steps),
            ("--r", self.r),
            ("--num-virtual-tokens", self.num_virtual_tokens),
            (
                "--rank-pattern",
                self.rank_pattern.0.iter().map(|(_, r)| *r).min().unwrap_or(1),
            ),
        ] {
            if value == 0 {
                return usage(format!("{flag} must be at least 1"));
            }
        }
        for (flag, value, low, high) in [
            ("--learning-rate", self.learning_rate, f64::MIN_POSITIVE, 1e3),
            (
                "--num-train-epochs",
                self.num_train_epochs,
                f64::MIN_POSITIVE,
                1e6,
            ),
            ("--warmup-ratio", self.warmup_ratio, 0.0, 1.0),
            ("--weight-decay", self.weight_decay, 0.0, 1e3),
            ("--max-grad-norm", self.max_grad_norm, 0.0, f64::MAX),
            ("--adam-beta1", self.adam_beta1, 0.0, 1.0 - f64::EPSILON),
            ("--adam-beta2", self.adam_beta2, 0.0, 1.0 - f64::EPSILON),
            ("--adam-epsilon", self.adam_epsilon, f64::MIN_POSITIVE, 1.0),
            ("--lora-alpha", self.lora_alpha, f64::MIN_POSITIVE, 1e6),
            ("--lora-dropout", self.lora_dropout, 0.0, 1.0 - f64::EPSILON),
            (
                "--early-stopping-threshold",
                self.early_stopping_threshold,
                0.0,
                f64::MAX,
            ),
        ] {
            if !(low..=high).contains(&value) {
                return usage(format!("{flag} is {value}, which is out of range"));
            }
        }
        let with_text = self.prompt_tuning_init == PromptTuningInit::Text;
        if self.method == Method::Prompt && with_text == self.prompt_tuning_init_text.is_empty() {
            return usage("--prompt-tuning-init TEXT and --prompt-tuning-init-text go together".into());
        }
        let evaluates = !self.eval_data.as_os_str().is_empty()
            && self.eval_strategy.every(self.eval_steps) != When::Never;
        for (flag, given) in [
            ("--early-stopping-patience", self.early_stopping_patience > 0),
            ("--load-best-model-at-end", self.load_best_model_at_end),
        ] {
            if given && !evaluates {
                return usage(format!(
                    "{flag} needs evaluations while training\nhint: give --eval-data, and --eval-steps N or --eval-strategy epoch"
                ));
            }
        }
        if self.lr_scheduler_type == Schedule::Constant && (self.warmup_steps > 0 || self.warmup_ratio > 0.0)
        {
            return usage(
                "--lr-scheduler-type constant has no warm-up\nhint: constant_with_warmup has one".into(),
            );
        }
        if self.optim == Optim::Adamw8bit && self.device != "cpu" {
            return usage(format!(
                "--optim adamw_8bit runs on the CPU, not on {}\nhint: leave it out, or train on the CPU",
                self.device
            ));
        }
        if self.bnb_4bit_quant_type == QuantType::Fp4 {
            return usage(
                "--bnb-4bit-quant-type fp4 is not built\nhint: nf4 is, and closer to a model's weights"
                    .into(),
            );
        }
        if self.max_length == 1 {
            return usage(
                "--max-length must be at least 2: a token is predicted from the one before it".into(),
            );
        }
        Ok(())
    }

    /// Refuses a run that has no folder to go to.
    pub fn check_output(&self) -> Result<(), UsageError> {
        needed("--output-dir (-o)", &self.output_dir)
    }

    /// The number of steps, and of those that warm up. `of_epochs` says how many steps so many passes over the data are.
    pub fn steps(&self, of_epochs: impl FnOnce(f64) -> usize) -> (usize, usize) {
        let steps = match self.max_steps {
            0 => of_epochs(self.num_train_epochs),
            steps => steps,
        };
        let warmup = match self.warmup_steps {
            0 => (self.warmup_ratio * steps as f64).ceil() as usize,
            warmup => warmup,
        };
        (steps, warmup)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toml_file(text: &str) -> Result<SftOptions, UsageError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read_toml(file.path())
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let flags = SftOptions {
            learning_rate: Some(1e-3),
            ..SftOptions::default()
        };
        let file = toml_file("learning_rate = 5e-5\nmax_steps = 7\ntarget_modules = ['q_proj']").unwrap();
        let config = flags.resolve(file);
        assert_eq!(
            (config.learning_rate, config.max_steps, config.seed),
            (1e-3, 7, 42)
        );
        assert_eq!(config.target_modules, TargetModules::Names(vec!["q_proj".into()]));
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_name() {
        let error = toml_file("learning_rte = 1").unwrap_err().to_string();
        assert!(
            error.contains("`learning_rte`") && error.contains("`learning_rate`"),
            "{error}"
        );
        assert!(toml_file("learning_rate = 'high'").is_err());
    }

    #[test]
    fn qlora_keeps_no_activations_unless_it_is_told_to() {
        let resolve = |text: &str| {
            toml_file(text)
                .unwrap()
                .resolve(SftOptions::default())
                .gradient_checkpointing
        };
        assert!(resolve("method = 'qlora'"));
        assert!(!resolve("method = 'qlora'\ngradient_checkpointing = false"));
        assert!(!resolve("method = 'lora'"));
    }

    #[test]
    fn a_resolved_configuration_can_be_read_again() {
        let config = SftOptions::default().resolve(SftOptions::default());
        let text = toml::to_string(&config.resolved().unwrap()).unwrap();
        let file = toml_file(&text).unwrap();
        file.check().unwrap();
        let again = file.resolve(SftOptions::default());
        assert_eq!(toml::to_string(&again.resolved().unwrap()).unwrap(), text);
    }

    #[test]
    fn an_option_of_another_method_is_refused() {
        let refused = |text: &str| toml_file(text).unwrap().check().unwrap_err().to_string();
        assert!(
            refused("method = 'prompt'\nuse_dora = true").contains("--use-dora is not for --method prompt")
        );
        assert!(refused("num_virtual_tokens = 3").contains("--num-virtual-tokens is not for --method lora"));
        assert!(refused("adapter = 'run'\nr = 8").contains("--r cannot be given with --adapter"));
        assert!(refused("method = 'full'\nadapter = 'run'").contains("--adapter is not for --method full"));
        toml_file("adapter = 'run'").unwrap().check().unwrap();
        let lora =
            "rank_pattern = {'b.*' = 2, a = 3}\ninit_lora_weights = 'gaussian'\nlayers_to_transform = [1]";
        let options = toml_file(lora).unwrap();
        options.check().unwrap();
        let config = options.resolve(SftOptions::default());
        assert_eq!(
            config.rank_pattern.0,
            [("b.*".to_owned(), 2), ("a".to_owned(), 3)]
        );
        assert_eq!(config.init_lora_weights, InitLoraWeights::Gaussian);
        assert!(
            toml_file("init_lora_weights = 'pissa'")
                .unwrap_err()
                .to_string()
                .contains("pissa")
        );
    }

    #[test]
    fn lists_and_patterns_are_read_from_flags() {
        assert_eq!(parse_list::<usize>("0, 3"), Ok(List(vec![0, 3])));
        assert!(parse_list::<usize>("0,x").unwrap_err().contains('x'));
        let patterns: Patterns<usize> = parse_json(r#"{"z": 1, "a": 2}"#).unwrap();
        assert_eq!(patterns.0, [("z".to_owned(), 1), ("a".to_owned(), 2)]);
        assert!(parse_json::<Patterns<usize>>(r#"{"z": 1, "z": 2}"#).is_err());
    }

    #[test]
    fn steps_and_warm_up() {
        let mut config = SftOptions::default().resolve(SftOptions::default());
        config.warmup_ratio = 0.1;
        let of_epochs = |epochs| (7.0 * epochs) as usize;
        assert_eq!(config.steps(of_epochs), (21, 3));
        config.max_steps = 5;
        assert_eq!(config.steps(of_epochs), (5, 1));
    }

    #[test]
    fn targets_are_names_or_an_expression() {
        assert_eq!(
            parse_targets("q_proj, v_proj"),
            Ok(TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]))
        );
        assert_eq!(
            parse_targets("all-linear"),
            Ok(TargetModules::Pattern("all-linear".into()))
        );
        assert_eq!(
            parse_targets(r".*\.0\..*"),
            Ok(TargetModules::Pattern(r".*\.0\..*".into()))
        );
    }
}
