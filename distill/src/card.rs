//! The model card of a run's result, `README.md`: what it is, of what and how it was made, how good it was seen to be,
//! and how to use it.
//!
//! The front matter is the one that Hugging Face's hub reads, <https://huggingface.co/docs/hub/model-cards>; the names
//! in it are those that PEFT's own cards have.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use pipit_convert::card::{code, escape, yaml};
use pipit_convert::checkpoint::read_json_object;
use pipit_convert::front_matter::FrontMatter;
use pipit_convert::gguf::Gguf;

use crate::data::DataReport;
use crate::plan::{DataFile, Plan};
use crate::report::{duration, mebibytes, number, thousands};
use crate::trainer::Outcome;

/// What a run's result was made from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Base {
    /// ORGANISATION/NAME on the hub, where the checkpoint says so.
    pub hub_id: Option<String>,
    /// The folder's name.
    pub name: String,
    /// Its licence, its licence's name and its licence's address, where its card names them.
    pub license: [Option<String>; 3],
}

impl Base {
    /// Reads what a checkpoint's `config.json` and `README.md` say, or the keys of a GGUF file.
    pub fn read(path: &Path) -> io::Result<Self> {
        match path.is_file() {
            true => Self::of_file(path),
            false => Self::of_folder(path),
        }
    }

    fn of_file(path: &Path) -> io::Result<Self> {
        let file = Gguf::open(path).map_err(io::Error::other)?;
        let said = |key: &str| file.get(key).and_then(|value| value.as_str()).map(str::to_owned);
        let repository = said("general.source.huggingface.repository");
        Ok(Self {
            hub_id: repository.filter(|id| is_hub_id(id)),
            name: path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            license: ["general.license", "general.license.name", "general.license.link"].map(said),
        })
    }

    fn of_folder(dir: &Path) -> io::Result<Self> {
        let config = read_json_object(&dir.join("config.json")).map_err(io::Error::other)?;
        let card = FrontMatter::of_folder(dir)?;
        let said = [
            config.get("_name_or_path").and_then(|value| value.as_str()),
            dir.to_str(),
        ];
        let name = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        Ok(Self {
            hub_id: said
                .into_iter()
                .flatten()
                .find(|id| !Path::new(id).exists() && is_hub_id(id))
                .map(str::to_owned),
            name: name
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            license: [
                Some(card.texts(&["license"]).join(",")).filter(|text| !text.is_empty()),
                card.text(&["license_name"]),
                card.text(&["license_link"]),
            ],
        })
    }
}

/// ORGANISATION/NAME, in the hub's letters.
fn is_hub_id(id: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !part.starts_with(['.', '-'])
    };
    id.split_once('/')
        .is_some_and(|(organisation, name)| part(organisation) && part(name))
}

/// A language of ISO 639, perhaps with a region, as the hub has them.
fn is_language(text: &str) -> bool {
    let mut parts = text.split('-');
    let first = parts.next().unwrap_or_default();
    matches!(first.len(), 2 | 3)
        && first.chars().all(|c| c.is_ascii_lowercase())
        && parts.all(|part| part.len() <= 8 && part.chars().all(|c| c.is_ascii_alphanumeric()))
}

/// All that a card says.
#[derive(Debug, Clone, Copy)]
pub struct Card<'a> {
    /// The run's name.
    pub name: &'a str,
    /// What it was made from.
    pub base: &'a Base,
    /// Whether the result is an adapter for the base, and not a whole model.
    pub adapter: bool,
    /// The values of the data's column `language`, where it has one.
    pub languages: &'a [String],
    /// The plan: the data and what was trained.
    pub plan: &'a Plan,
    /// What came of it.
    pub outcome: &'a Outcome,
    /// Whom it has learned from, where it was distilled.
    pub teacher: Option<&'a str>,
    /// `config.resolved.toml`.
    pub settings: &'a str,
}

impl Card<'_> {
    /// The card as Markdown.
    pub fn markdown(&self) -> String {
        let mut out = self.front_matter();
        let (name, method) = (escape(self.name), escape(&self.plan.method));
        let base = self.base.hub_id.as_deref().unwrap_or(&self.base.name);
        let what = match (self.adapter, self.teacher) {
            (true, _) => "An adapter for",
            (false, None) => "A fine-tuned copy of",
            (false, Some(_)) => "A distilled copy of",
        };
        let by = match self.teacher {
            Some(teacher) => format!(" by the teacher {}", escape(teacher)),
            None => String::new(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "# {name}\n\n{what} {}, trained{by} with `pipit-distill {} --method {method}`.\n",
            escape(base),
            self.command()
        );
        out += &self.figures();
        out += &self.made_of();
        out += &self.use_it();
        out += &self.limits();
        out
    }

    fn command(&self) -> &'static str {
        match self.teacher {
            Some(_) => "opd",
            None => "sft",
        }
    }

    fn front_matter(&self) -> String {
        let mut out = String::from("---\n");
        if let Some(id) = &self.base.hub_id {
            let relation = if self.adapter { "adapter" } else { "finetune" };
            let _ = writeln!(out, "base_model: {}\nbase_model_relation: {relation}", yaml(id));
        }
        for (key, text) in ["license", "license_name", "license_link"]
            .iter()
            .zip(&self.base.license)
        {
            if let Some(text) = text {
                let _ = writeln!(out, "{key}: {}", yaml(text));
            }
        }
        let languages: Vec<&String> = self.languages.iter().filter(|text| is_language(text)).collect();
        if !languages.is_empty() {
            out += "language:\n";
            for language in languages {
                let _ = writeln!(out, "- {}", yaml(language));
            }
        }
        let library = if self.adapter { "peft" } else { "transformers" };
        let _ = writeln!(
            out,
            "library_name: {library}\npipeline_tag: text-generation\ntags:"
        );
        for tag in ["pipit", self.command(), self.plan.method.as_str()] {
            let _ = writeln!(out, "- {}", yaml(tag));
        }
        if let (true, Some(id)) = (self.adapter, &self.base.hub_id) {
            let _ = writeln!(out, "- {}", yaml(&format!("base_model:adapter:{id}")));
        }
        out + "---\n"
    }

    fn figures(&self) -> String {
        let Self { plan, outcome, .. } = self;
        let count = |number: usize| thousands(number as f64);
        let rows = [
            (
                "trained parameters",
                Some(format!(
                    "{} of {}",
                    count(plan.parameters.trained),
                    count(plan.parameters.model)
                )),
            ),
            ("steps", Some(count(outcome.steps))),
            ("tokens", Some(count(outcome.tokens))),
            ("time", Some(duration(outcome.seconds))),
            ("loss at the end, nats a token", Some(number(outcome.loss))),
            (
                match self.teacher {
                    None => "loss on the evaluation data",
                    Some(_) => "distance from the teacher on the evaluation data, nats a token",
                },
                outcome.eval_loss.map(number),
            ),
            (
                "perplexity on the evaluation data",
                outcome
                    .eval_loss
                    .filter(|_| self.teacher.is_none())
                    .map(|loss| number(loss.exp())),
            ),
            ("memory, as planned", Some(mebibytes(plan.memory.peak_bytes))),
        ];
        let mut out = String::from("| | |\n|---|---|\n");
        for (name, value) in rows {
            if let Some(value) = value {
                let _ = writeln!(out, "| {name} | {value} |");
            }
        }
        out
    }

    fn made_of(&self) -> String {
        let mut out =
            String::from("\n## Made of\n| | file | rows | tokens | sha256 |\n|---|---|---|---|---|\n");
        let mut row = |what: &str, file: &DataFile, report: &DataReport| {
            let name = file.path.file_name().unwrap_or_default().to_string_lossy();
            let _ = writeln!(
                out,
                "| {what} | {} | {} | {} | `{}` |",
                escape(&name),
                report.used,
                report.tokens,
                file.sha256.as_deref().unwrap_or("-")
            );
        };
        row("training data", &self.plan.data_file, &self.plan.data);
        if let (Some(file), Some(report)) = (&self.plan.eval_file, &self.plan.eval_data) {
            row("evaluation data", file, report);
        }
        let leaks = self
            .plan
            .eval_data
            .as_ref()
            .map_or(0, |report| report.in_training_data.len());
        if leaks > 0 {
            let _ = writeln!(out, "\n{leaks} rows of the evaluation data were trained on too.");
        }
        // Indented, so that nothing in it can end the block.
        out += "\nSettings:\n\n";
        for line in self.settings.lines() {
            let _ = writeln!(out, "    {line}");
        }
        let _ = writeln!(out, "\nMade by pipit-distill {}.", env!("CARGO_PKG_VERSION"));
        out
    }

    fn use_it(&self) -> String {
        let name = code(self.name);
        let base = code(self.base.hub_id.as_deref().unwrap_or(&self.base.name));
        let mut out = String::from("\n## Use\n```python\n");
        match self.adapter {
            true => {
                let _ = writeln!(
                    out,
                    "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                     tokenizer = AutoTokenizer.from_pretrained('{base}')\n\
                     model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), '{name}')"
                );
            }
            false => {
                let _ = writeln!(
                    out,
                    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                     tokenizer = AutoTokenizer.from_pretrained('{name}')\n\
                     model = AutoModelForCausalLM.from_pretrained('{name}')"
                );
            }
        }
        let _ = match self.adapter {
            true => write!(
                out,
                "```\n\n```sh\npipit-convert model '{base}' --adapter '{name}' -t Q8_0 -o model.gguf"
            ),
            false => write!(
                out,
                "```\n\n```sh\npipit-convert model '{name}' -t Q8_0 -o model.gguf"
            ),
        };
        out + "\npipit serve --model model.gguf      # answers over MQTT\n```\n"
    }

    fn limits(&self) -> String {
        let license = match &self.base.license[0] {
            Some(license) => format!("The base's licence ({}) applies.", escape(license)),
            None => "The base does not name its licence: ask its makers before you pass this on.".to_owned(),
        };
        format!(
            "\n## Limits\nIt was trained on the rows above and measured on no others; what it answers to other questions is not \
             known. It can be wrong, and it has what was wrong with its base and with its data. {license}\n\n\
             Its answers are made by AI. Where people could take them for a person's, tell them: Article 50 of Regulation \
             (EU) 2024/1689 asks for that. `pipit serve` marks every answer with `ai_generated`.\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_named_as_the_hub_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "config.json",
            r#"{"_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}"#,
        );
        write(
            "README.md",
            "---\nlicense: apache-2.0\nbase_model: other/one\n---\n# text\n",
        );
        let base = Base::read(dir.path()).unwrap();
        assert_eq!(
            base.hub_id.as_deref(),
            Some("HuggingFaceTB/SmolLM2-135M-Instruct")
        );
        assert_eq!(base.license, [Some("apache-2.0".into()), None, None]);
        write("config.json", r#"{"_name_or_path": "/home/ann/models/x"}"#);
        assert_eq!(Base::read(dir.path()).unwrap().hub_id, None);
    }

    #[test]
    fn languages_are_codes() {
        assert!(["nl", "fr-BE", "gsw", "zh-Hant-TW"].into_iter().all(is_language));
        assert!(!["", "Dutch", "n", "NL", "nl\n- x"].into_iter().any(is_language));
    }
}
