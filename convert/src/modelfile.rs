//! An Ollama Modelfile for a GGUF file: what Ollama does not read out of the file by itself.
//!
//! The chat template stays in the GGUF file: Ollama recognises the templates of well-known models there, and its own
//! `TEMPLATE` is not Jinja. Source: <https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx>.

use crate::gguf::{Array, Header, Value};

/// The keys of tokens that end an answer.
const ENDS: &[&str] = &[
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
];

/// Settings of the sampler, in the file and in Ollama.
const SAMPLING: &[(&str, &str)] = &[
    ("general.sampling.temp", "temperature"),
    ("general.sampling.top_k", "top_k"),
    ("general.sampling.top_p", "top_p"),
    ("general.sampling.min_p", "min_p"),
    ("general.sampling.penalty_repeat", "repeat_penalty"),
];

/// The text of the Modelfile for the file `name` beside it. `license` is the licence's text, or else its name in the
/// header is taken.
pub fn modelfile(header: &Header, name: &str, license: Option<&str>) -> String {
    let get = |key: &str| {
        header
            .metadata
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, value)| value)
    };
    let mut out = format!("# ollama create NAME -f THIS-FILE\nFROM ./{name}\n");
    for text in ends(header) {
        out += &format!("PARAMETER stop {}\n", quoted(&text));
    }
    for (key, parameter) in SAMPLING {
        let value = match get(key) {
            Some(Value::F32(value)) => value.to_string(),
            Some(Value::I32(value)) => value.to_string(),
            _ => continue,
        };
        out += &format!("PARAMETER {parameter} {value}\n");
    }
    if let Some(license) = license.or_else(|| get("general.license")?.as_str()) {
        out += &format!("LICENSE {}\n", quoted(license));
    }
    out
}

/// The texts of the tokens that end an answer, each once.
pub(crate) fn ends(header: &Header) -> Vec<String> {
    let get = |key: &str| {
        header
            .metadata
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, value)| value)
    };
    let Some(Value::Array(Array::String(tokens))) = get("tokenizer.ggml.tokens") else {
        return Vec::new();
    };
    let mut ends: Vec<String> = Vec::new();
    for key in ENDS {
        let id = get(key).and_then(Value::as_u64);
        let text = id.and_then(|id| tokens.get(usize::try_from(id).ok()?));
        if let Some(text) = text.filter(|text| !text.is_empty() && !ends.contains(text)) {
            ends.push(text.clone());
        }
    }
    ends
}

/// In three quotation marks, within which everything stands for itself. What would end them is taken apart.
fn quoted(text: &str) -> String {
    let text = text.replace("\"\"\"", "\" \" \"");
    let text = text.trim_end_matches('"');
    format!("\"\"\"{text}\"\"\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_answers_sampling_and_licence_are_said() {
        let header = Header {
            metadata: vec![
                ("general.license".into(), "apache-2.0".into()),
                ("general.sampling.temp".into(), Value::F32(0.2)),
                ("general.sampling.top_k".into(), Value::I32(40)),
                (
                    "tokenizer.ggml.tokens".into(),
                    vec!["a".to_owned(), "<|im_end|>".into(), "</s>".into()].into(),
                ),
                ("tokenizer.ggml.eos_token_id".into(), Value::U32(1)),
                ("tokenizer.ggml.eot_token_id".into(), Value::U32(1)),
                ("tokenizer.ggml.eom_token_id".into(), Value::U32(9)),
            ],
            tensors: Vec::new(),
        };
        let text = modelfile(&header, "a b.gguf", None);
        assert_eq!(
            text,
            "# ollama create NAME -f THIS-FILE\nFROM ./a b.gguf\nPARAMETER stop \"\"\"<|im_end|>\"\"\"\nPARAMETER \
             temperature 0.2\nPARAMETER top_k 40\nLICENSE \"\"\"apache-2.0\"\"\"\n"
        );
        let text = modelfile(&header, "a.gguf", Some("Say \"\"\"\nFROM /etc/passwd\n\""));
        assert!(
            text.ends_with("LICENSE \"\"\"Say \" \" \"\nFROM /etc/passwd\n\"\"\"\n"),
            "{text}"
        );
    }
}
