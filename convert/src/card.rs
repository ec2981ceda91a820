//! The model card beside a GGUF file: what it is, what it was made of, its checksum, and how to run it.
//!
//! Everything in it comes from the file's own header, so that card and file cannot disagree. The front matter is the
//! one that Hugging Face's hub reads: <https://huggingface.co/docs/hub/model-cards>.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::gguf::{Array, Header, Value, WrittenFile};

/// What the card says beside what stands in the header.
#[derive(Debug, Clone, Copy)]
pub struct Card<'a> {
    /// The header of the file, or of all parts together.
    pub header: &'a Header,
    /// The file, or its parts in their order.
    pub files: &'a [WrittenFile],
    /// The quantisation, as llama.cpp spells it.
    pub kind: &'a str,
}

impl Card<'_> {
    /// The card as Markdown.
    pub fn markdown(&self) -> String {
        let mut out = self.front_matter();
        let title = self.text("general.name").unwrap_or_else(|| self.first_name());
        // Writing to a string cannot fail.
        let _ = writeln!(out, "# {}, {}\n", escape(&title), self.kind);
        out += &self.summary();
        out += "\n## Files\n| file | bytes | sha256 |\n|---|---|---|\n";
        for file in self.files {
            let name = file.path.file_name().unwrap_or_default().to_string_lossy();
            let _ = writeln!(out, "| {} | {} | `{}` |", escape(&name), file.bytes, file.sha256);
        }
        out += &self.tensors();
        out += &self.made_of();
        out += &self.how_to_run();
        out
    }

    fn get(&self, key: &str) -> Option<&Value> {
        let found = self.header.metadata.iter().find(|(k, _)| k == key);
        found.map(|(_, value)| value)
    }

    fn text(&self, key: &str) -> Option<String> {
        self.get(key)?.as_str().map(str::to_owned)
    }

    fn texts(&self, key: &str) -> &[String] {
        match self.get(key) {
            Some(Value::Array(Array::String(texts))) => texts,
            _ => &[],
        }
    }

    fn first_name(&self) -> String {
        let path = self.files.first().map(|file| file.path.as_path());
        let name = path.and_then(|path| path.file_name()).unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The models that this one comes from, as `ORGANISATION/NAME` where the header tells.
    fn bases(&self) -> Vec<String> {
        let count = self
            .get("general.base_model.count")
            .and_then(Value::as_u64)
            .unwrap_or(0);
        let base = |at: u64| {
            let url = self.text(&format!("general.base_model.{at}.repo_url"));
            let id = url
                .as_deref()
                .and_then(|url| url.strip_prefix("https://huggingface.co/"));
            id.map(str::to_owned)
                .or_else(|| self.text(&format!("general.base_model.{at}.name")))
        };
        (0..count.min(100)).filter_map(base).collect()
    }

    fn front_matter(&self) -> String {
        let mut out = String::from("---\n");
        if let Some(license) = self.text("general.license") {
            let _ = writeln!(out, "license: {}", yaml(&license));
        }
        for (key, link) in [
            ("license_name", "general.license.name"),
            ("license_link", "general.license.link"),
        ] {
            if let Some(text) = self.text(link) {
                let _ = writeln!(out, "{key}: {}", yaml(&text));
            }
        }
        let bases = self.bases();
        if !bases.is_empty() {
            out += "base_model:\n";
            for base in bases {
                let _ = writeln!(out, "- {}", yaml(&base));
            }
            out += "base_model_relation: quantized\n";
        }
        if !self.texts("general.languages").is_empty() {
            out += "language:\n";
            for language in self.texts("general.languages") {
                let _ = writeln!(out, "- {}", yaml(language));
            }
        }
        out +=
            "library_name: gguf\npipeline_tag: text-generation\ntags:\n- gguf\n- llama.cpp\n- pipit\n---\n";
        out
    }

    fn summary(&self) -> String {
        let architecture = self.text("general.architecture").unwrap_or_default();
        let parameters: u64 = self
            .header
            .tensors
            .iter()
            .map(|tensor| tensor.dimensions.iter().product::<u64>())
            .sum();
        let bytes: u64 = self.files.iter().map(|file| file.bytes).sum();
        let bits = bytes as f64 * 8.0 / parameters.max(1) as f64;
        let mut rows = vec![
            ("architecture", escape(&architecture)),
            ("parameters", parameters.to_string()),
            ("quantisation", self.kind.to_owned()),
            ("size", format!("{bytes} bytes, {bits:.2} bits per weight")),
        ];
        if let Some(length) = self
            .get(&format!("{architecture}.context_length"))
            .and_then(Value::as_u64)
        {
            rows.push(("context", format!("{length} tokens")));
        }
        rows.push((
            "licence",
            self.text("general.license").map_or_else(
                || "not known: the checkpoint does not name one".into(),
                |name| escape(&name),
            ),
        ));
        let bases = self.bases();
        if !bases.is_empty() {
            rows.push(("base", escape(&bases.join(", "))));
        }
        let ends = crate::modelfile::ends(self.header);
        if !ends.is_empty() {
            let ends: Vec<_> = ends.iter().map(|text| code_cell(text)).collect();
            rows.push(("an answer ends with", ends.join(" or ")));
        }
        let mut out = String::from("| | |\n|---|---|\n");
        for (name, value) in rows {
            let _ = writeln!(out, "| {name} | {value} |");
        }
        out
    }

    fn tensors(&self) -> String {
        let mut types: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
        for tensor in &self.header.tensors {
            let sum = types.entry(tensor.kind.name()).or_default();
            *sum = (sum.0 + 1, sum.1 + tensor.size().unwrap_or(0));
        }
        let mut out = String::from("\n## Tensors\n| type | tensors | bytes |\n|---|---|---|\n");
        for (kind, (n, bytes)) in types {
            let _ = writeln!(out, "| {kind} | {n} | {bytes} |");
        }
        if let Some(file) = self.text("pipit.imatrix.file") {
            let _ = writeln!(out, "\nQuantised with the importance matrix {}.", escape(&file));
        }
        out
    }

    fn made_of(&self) -> String {
        let mut out = String::from("\n## Made of\n| file | sha256 |\n|---|---|\n");
        for group in ["source", "adapter"] {
            let names = self.texts(&format!("pipit.{group}.files"));
            let sums = self.texts(&format!("pipit.{group}.sha256"));
            for (name, sum) in names.iter().zip(sums) {
                let _ = writeln!(out, "| {} | {} |", escape(name), code_cell(sum));
            }
        }
        if let (Some(name), Some(sum)) = (self.text("pipit.imatrix.file"), self.text("pipit.imatrix.sha256"))
        {
            let _ = writeln!(out, "| {} | {} |", escape(&name), code_cell(&sum));
        }
        out.push('\n');
        if let Some(Value::Array(Array::F32(scales))) = self.get("pipit.adapter.scale") {
            let bases = self.texts("pipit.adapter.base");
            for (at, (name, scale)) in self.texts("pipit.adapter.names").iter().zip(scales).enumerate() {
                let base = bases.get(at).filter(|base| !base.is_empty());
                let base = base.map_or_else(String::new, |base| format!(", trained on {}", escape(base)));
                let _ = writeln!(
                    out,
                    "- the adapter {} is merged, times {scale}{base}",
                    escape(name)
                );
            }
        }
        let version = self.text("pipit.version").unwrap_or_default();
        let llama_cpp = self.text("pipit.llama_cpp").unwrap_or_default();
        let _ = writeln!(
            out,
            "- by pipit-convert {} ({})",
            escape(&version),
            escape(&llama_cpp)
        );
        let arguments = self.texts("pipit.arguments");
        if !arguments.is_empty() {
            let _ = writeln!(out, "- with `pipit-convert {}`", code(&arguments.join(" ")));
        }
        out
    }

    fn how_to_run(&self) -> String {
        let name = code(&self.first_name());
        format!(
            "\n## Run\n```sh\npipit serve --model '{name}'       # answers over MQTT\nllama-cli -m '{name}'\n```\n\
             `pipit-convert inspect` shows all keys of the file, `sha256sum` must give the checksums above.\n"
        )
    }
}

/// Text in Markdown that may come from anywhere: one line, without anything that Markdown or HTML would take up.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '&' => out += "&amp;",
            '|' | '`' | '*' | '[' | ']' | '\\' | '#' | '!' => out.extend(['\\', c]),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// Text between backticks or in a code block: one line, without quotation marks that would end it.
pub fn code(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '`' | '\'' => '?',
            c if c.is_control() => ' ',
            c => c,
        })
        .collect()
}

/// Text between backticks in a table, where a bar must be taken for itself.
fn code_cell(text: &str) -> String {
    format!("`{}`", code(text).replace('|', "\\|"))
}

/// A JSON string is a YAML string.
pub fn yaml(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{TensorPlan, TensorType};

    #[test]
    fn the_card_says_what_the_header_says_and_nothing_of_it_breaks_out() {
        let header = Header {
            metadata: vec![
                ("general.architecture".into(), "llama".into()),
                ("general.name".into(), "Tiny <script>\n# x | y".into()),
                ("general.license".into(), "apache-2.0\nevil: yes".into()),
                ("general.base_model.count".into(), Value::U32(1)),
                (
                    "general.base_model.0.repo_url".into(),
                    "https://huggingface.co/org/base".into(),
                ),
                ("llama.context_length".into(), Value::U32(2048)),
                ("tokenizer.ggml.tokens".into(), vec!["<|end|>".to_owned()].into()),
                ("tokenizer.ggml.eos_token_id".into(), Value::U32(0)),
                (
                    "pipit.source.files".into(),
                    vec!["model.safetensors".to_owned()].into(),
                ),
                ("pipit.source.sha256".into(), vec!["abc".to_owned()].into()),
                ("pipit.adapter.names".into(), vec!["run".to_owned()].into()),
                ("pipit.adapter.base".into(), vec!["org/base".to_owned()].into()),
                ("pipit.adapter.scale".into(), Value::Array(Array::F32(vec![0.5]))),
                (
                    "pipit.arguments".into(),
                    vec!["model".to_owned(), "`rm`".into()].into(),
                ),
            ],
            tensors: vec![TensorPlan {
                name: "a".into(),
                dimensions: vec![32, 4],
                kind: TensorType::Q8_0,
            }],
        };
        let files = [WrittenFile {
            path: "/home/ann/tiny.gguf".into(),
            bytes: 300,
            sha256: "def".into(),
        }];
        let card = Card {
            header: &header,
            files: &files,
            kind: "Q8_0",
        };
        let text = card.markdown();
        for part in [
            "license: \"apache-2.0\\nevil: yes\"\n",
            "base_model:\n- \"org/base\"\nbase_model_relation: quantized\n",
            "\n# Tiny &lt;script&gt; \\# x \\| y, Q8_0\n",
            "| parameters | 128 |",
            "| size | 300 bytes, 18.75 bits per weight |",
            "| context | 2048 tokens |",
            "| an answer ends with | `<\\|end\\|>` |",
            "| tiny.gguf | 300 | `def` |",
            "| Q8_0 | 1 | 136 |",
            "| model.safetensors | `abc` |",
            "- the adapter run is merged, times 0.5, trained on org/base\n",
            "- with `pipit-convert model ?rm?`\n",
            "pipit serve --model 'tiny.gguf'",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(!text.contains("/home/ann"));
    }
}
