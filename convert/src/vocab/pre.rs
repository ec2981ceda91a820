//! Pre-tokenizers: how text is cut into pieces before merges are applied, as `tokenizer.json` spells it out and
//! as llama.cpp names it.
//!
//! A file is recognised by its structure, never by a hash of what it does to some text. Only those stand here
//! that llama.cpp follows exactly (llama-vocab.cpp, `llm_tokenizer_bpe`).

use serde_json::{Value as Json, json};

/// One way to cut text.
#[derive(Debug)]
pub struct PreTokenizer {
    /// The name in `tokenizer.ggml.pre`.
    pub name: &'static str,
    /// Whether llama.cpp adds the begin-of-sequence token when the file does not say.
    pub add_bos: bool,
    /// Whether a piece that is a token as a whole is taken without looking at the merges.
    pub ignore_merges: bool,
    /// The steps before the byte-level spelling.
    steps: &'static [Step],
}

#[derive(Debug)]
enum Step {
    /// Every digit is a piece.
    Digits,
    /// Every match of the expression is a piece, and so is what lies between.
    Split(&'static str),
    /// GPT-2's own expression, part of the byte-level step.
    Gpt2,
}

/// Llama 3's expression.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// All that are built.
pub const ALL: &[PreTokenizer] = &[
    PreTokenizer {
        name: "smollm",
        add_bos: false,
        ignore_merges: false,
        steps: &[Step::Digits, Step::Gpt2],
    },
    PreTokenizer {
        name: "gpt-2",
        add_bos: false,
        ignore_merges: false,
        steps: &[Step::Gpt2],
    },
    PreTokenizer {
        name: "llama-bpe",
        add_bos: true,
        ignore_merges: true,
        steps: &[Step::Split(LLAMA3)],
    },
];

/// The names, for messages.
pub(super) fn names() -> String {
    ALL.iter().map(|pre| pre.name).collect::<Vec<_>>().join(", ")
}

/// The one with this name.
pub fn by_name(name: &str) -> Option<&'static PreTokenizer> {
    ALL.iter().find(|pre| pre.name == name)
}

/// The one with this structure in `tokenizer.json`.
pub fn by_structure(pre_tokenizer: &Json, ignore_merges: bool) -> Option<&'static PreTokenizer> {
    let found = canonical(pre_tokenizer);
    ALL.iter()
        .find(|pre| pre.ignore_merges == ignore_merges && canonical(&pre.to_json()) == found)
}

impl PreTokenizer {
    /// `pre_tokenizer` of `tokenizer.json`.
    pub fn to_json(&self) -> Json {
        let gpt2 = self.steps.iter().any(|step| matches!(step, Step::Gpt2));
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": gpt2});
        let mut parts: Vec<Json> = Vec::new();
        for step in self.steps {
            match step {
                Step::Digits => parts.push(json!({"type": "Digits", "individual_digits": true})),
                Step::Split(regex) => parts.push(json!({
                    "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false,
                })),
                Step::Gpt2 => {}
            }
        }
        parts.push(byte_level.clone());
        if parts.len() == 1 {
            byte_level
        } else {
            json!({"type": "Sequence", "pretokenizers": parts})
        }
    }
}

/// The parts as a flat list, without what does not change the pieces.
fn canonical(pre_tokenizer: &Json) -> Vec<Json> {
    if let Some(parts) = pre_tokenizer.get("pretokenizers").and_then(Json::as_array) {
        return parts.iter().flat_map(canonical).collect();
    }
    let mut part = pre_tokenizer.clone();
    if let Some(part) = part.as_object_mut() {
        part.remove("trim_offsets");
        if part.get("type").is_some_and(|kind| kind == "ByteLevel") {
            part.entry("use_regex").or_insert(Json::Bool(true));
        }
    }
    vec![part]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_is_recognised_and_a_strange_one_is_not() {
        for pre in ALL {
            assert_eq!(
                by_structure(&pre.to_json(), pre.ignore_merges).unwrap().name,
                pre.name
            );
        }
        let old = json!({"pretokenizers": [{"individual_digits": true, "type": "Digits"},
            {"add_prefix_space": false, "trim_offsets": false, "type": "ByteLevel"}], "type": "Sequence"});
        assert_eq!(by_structure(&old, false).unwrap().name, "smollm");
        assert!(by_structure(&old, true).is_none());
        let grouped = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]});
        assert!(by_structure(&grouped, false).is_none());
    }
}
