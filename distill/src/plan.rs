//! What is known of a run before it starts: what is trained, on what, in how much memory and time.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use pipit_convert::checksum::sha256;
use serde::Serialize;

use crate::data::DataReport;
use crate::memory::MemoryPlan;
use crate::report::{duration, mebibytes, thousands};

/// The plan of a run, as `plan.json` holds it.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The checkpoint.
    pub model: PathBuf,
    /// How it is trained, as `--method` spells it.
    pub method: String,
    /// What is trained.
    pub parameters: Parameters,
    /// The training data.
    pub data_file: DataFile,
    /// What became of its rows.
    pub data: DataReport,
    /// The evaluation data.
    pub eval_file: Option<DataFile>,
    /// What became of its rows.
    pub eval_data: Option<DataReport>,
    /// The steps, and what goes through the model in them.
    #[serde(flatten)]
    pub work: Work,
    /// Steps over which the learning rate rises.
    pub warmup_steps: usize,
    /// The memory at the moment at which most is needed.
    pub memory: MemoryPlan,
    /// What programs may still take, beside what this one has taken, in bytes.
    pub available_memory_bytes: Option<u64>,
    /// How fast it goes, where that was measured.
    pub measured: Option<Measured>,
}

/// The file that rows come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DataFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Its checksum, in hexadecimal digits; none of a pipe, which can be read only once.
    pub sha256: Option<String>,
}

impl DataFile {
    /// Reads the size and the checksum of a file.
    pub fn read(path: &Path) -> io::Result<Self> {
        let metadata = path.metadata()?;
        Ok(Self {
            path: path.to_path_buf(),
            bytes: metadata.len(),
            sha256: metadata.is_file().then(|| sha256(path)).transpose()?,
        })
    }
}

/// The numbers that a model has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// Those of the checkpoint.
    pub model: usize,
    /// Those of them, and of adapters, that are trained.
    pub trained: usize,
    /// By what they do in the model.
    pub kinds: Vec<Kind>,
}

/// The numbers that do one thing in a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kind {
    /// What they do.
    pub kind: &'static str,
    /// How many there are.
    pub parameters: usize,
    /// How many of them are trained.
    pub trained: usize,
}

impl Parameters {
    /// From (name, numbers) of the checkpoint's tensors and of those that are trained, adapters among them.
    pub fn count<'a>(
        model: impl IntoIterator<Item = (&'a str, usize)>,
        trained: impl IntoIterator<Item = (&'a str, usize)>,
    ) -> Self {
        let mut out = Self {
            model: 0,
            trained: 0,
            kinds: Vec::new(),
        };
        for (name, numbers) in model {
            out.model += numbers;
            out.kind(kind_of(name)).parameters += numbers;
        }
        for (name, numbers) in trained {
            out.trained += numbers;
            let kind = out.kind(kind_of(name));
            kind.trained += numbers;
            if kind.kind == ADAPTERS {
                kind.parameters += numbers;
            }
        }
        out
    }

    fn kind(&mut self, kind: &'static str) -> &mut Kind {
        let at = self
            .kinds
            .iter()
            .position(|found| found.kind == kind)
            .unwrap_or_else(|| {
                self.kinds.push(Kind {
                    kind,
                    parameters: 0,
                    trained: 0,
                });
                self.kinds.len() - 1
            });
        &mut self.kinds[at]
    }
}

const ADAPTERS: &str = "adapters";

/// What a tensor does, by its name in the checkpoint or in PEFT.
fn kind_of(name: &str) -> &'static str {
    let has = |part: &str| name.contains(part);
    if has("lora_") || has("prompt_") {
        ADAPTERS
    } else if has("norm") {
        "norms"
    } else if has("self_attn") {
        "attention"
    } else if has("mlp") {
        "feed-forward"
    } else if has("embed_tokens") {
        "embedding"
    } else if has("lm_head") {
        "output layer"
    } else {
        "others"
    }
}

/// The steps of a run, and what goes through the model in them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Work {
    /// Steps, each of which moves the weights once.
    pub steps: usize,
    /// Passes over the data.
    pub epochs: f64,
    /// Rows that are seen, some of them several times.
    pub rows_seen: usize,
    /// Tokens of all of them.
    pub tokens_seen: usize,
    /// Tokens of the largest forward pass, which takes the most memory.
    pub largest_pass_tokens: usize,
    /// Rows of the data in that pass.
    pub largest_pass_rows: usize,
    /// Tokens of the largest step.
    pub largest_step_tokens: usize,
}

impl Work {
    /// Sums up the steps, each the samples of its forward passes, of samples with these lengths.
    pub fn sum(steps: impl IntoIterator<Item = Vec<Vec<usize>>>, lengths: &[usize]) -> Self {
        let mut work = Self::default();
        for passes in steps {
            let tokens = |pass: &Vec<usize>| pass.iter().map(|i| lengths[*i]).sum::<usize>();
            let step_tokens: usize = passes.iter().map(tokens).sum();
            for pass in &passes {
                if tokens(pass) > work.largest_pass_tokens {
                    work.largest_pass_tokens = tokens(pass);
                    work.largest_pass_rows = pass.len();
                }
            }
            work.steps += 1;
            work.rows_seen += passes.iter().map(Vec::len).sum::<usize>();
            work.tokens_seen += step_tokens;
            work.largest_step_tokens = work.largest_step_tokens.max(step_tokens);
        }
        work.epochs = work.rows_seen as f64 / lengths.len().max(1) as f64;
        work
    }
}

/// What a few real steps took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// The steps that were timed: the run's first ones.
    pub steps: usize,
    /// Tokens a second in them.
    pub tokens_per_second: f64,
    /// The whole run at this speed, without evaluation, in seconds.
    pub seconds: f64,
    /// The most memory that the program took, the run's largest forward pass among the steps; Linux only.
    pub peak_memory_bytes: Option<u64>,
}

impl Plan {
    /// The plan for people: a few lines.
    pub fn text(&self) -> String {
        let Self {
            parameters,
            data,
            work,
            memory,
            ..
        } = self;
        let share = 100.0 * parameters.trained as f64 / parameters.model.max(1) as f64;
        let count = |number: usize| thousands(number as f64);
        let kinds: Vec<String> = parameters
            .kinds
            .iter()
            .filter(|kind| kind.trained > 0)
            .map(|kind| format!("{} {}", kind.kind, count(kind.trained)))
            .collect();
        // Writing to a string cannot fail.
        let mut out = String::new();
        let _ = writeln!(
            out,
            "trained   {} of {} parameters ({share:.2} %): {}",
            count(parameters.trained),
            count(parameters.model),
            kinds.join(", ")
        );
        let _ = writeln!(
            out,
            "data      {} rows, {} tokens ({} trained on), the longest row {}",
            count(data.used),
            count(data.tokens),
            count(data.trained_tokens),
            count(data.longest)
        );
        let _ = writeln!(
            out,
            "steps     {}, {:.2} passes over the data, {} tokens; at most {} in a step, {} in a forward pass",
            count(work.steps),
            work.epochs,
            count(work.tokens_seen),
            count(work.largest_step_tokens),
            count(work.largest_pass_tokens)
        );
        let parts: Vec<String> = memory
            .parts()
            .iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(name, bytes)| format!("{name} {}", thousands((bytes >> 20) as f64)))
            .collect();
        let _ = writeln!(
            out,
            "memory    about {}: {}",
            mebibytes(memory.peak_bytes),
            parts.join(", ")
        );
        if memory.loading_bytes == memory.peak_bytes {
            let _ = writeln!(
                out,
                "          the most of it while the model is read: its file is in memory then too"
            );
        }
        if let Some(measured) = self.measured {
            if let Some(peak) = measured.peak_memory_bytes {
                let _ = writeln!(
                    out,
                    "          {} were taken by the largest forward pass",
                    mebibytes(peak)
                );
            }
            let _ = writeln!(
                out,
                "time      about {} at {} tokens/s, as the first {} steps had, without evaluation",
                duration(measured.seconds),
                thousands(measured.tokens_per_second),
                measured.steps
            );
        }
        out
    }

    /// Whether the estimate is more than there is: by how many bytes.
    pub fn lacks(&self) -> Option<u64> {
        let held = self.memory.program_bytes + self.memory.weights_bytes + self.memory.adapters_bytes;
        let more = self.memory.peak_bytes.saturating_sub(held);
        more.checked_sub(self.available_memory_bytes?)
            .filter(|bytes| *bytes > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_counted_by_kind() {
        let model = [
            ("model.embed_tokens.weight", 100),
            ("model.layers.0.self_attn.q_norm.weight", 1),
            ("model.layers.0.self_attn.q_proj.weight", 20),
            ("model.layers.0.mlp.up_proj.weight", 30),
            ("model.norm.weight", 2),
        ];
        let lora = [("model.layers.0.mlp.up_proj.lora_A.weight", 5)];
        let parameters = Parameters::count(model, lora);
        assert_eq!((parameters.model, parameters.trained), (153, 5));
        let kinds: Vec<_> = parameters
            .kinds
            .iter()
            .map(|kind| (kind.kind, kind.parameters, kind.trained))
            .collect();
        let expected = [
            ("embedding", 100, 0),
            ("norms", 3, 0),
            ("attention", 20, 0),
            ("feed-forward", 30, 0),
            ("adapters", 5, 5),
        ];
        assert_eq!(kinds, expected);
        assert_eq!(Parameters::count(model, model).trained, 153);
    }

    #[test]
    fn work_is_the_sum_of_the_steps() {
        let lengths = [10, 20, 5];
        let work = Work::sum([vec![vec![0, 1], vec![2]], vec![vec![2], vec![1]]], &lengths);
        let expected = Work {
            steps: 2,
            epochs: 5.0 / 3.0,
            rows_seen: 5,
            tokens_seen: 60,
            largest_pass_tokens: 30,
            largest_pass_rows: 2,
            largest_step_tokens: 35,
        };
        assert_eq!(work, expected);
    }
}
