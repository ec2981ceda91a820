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
    /// Whether llama.cpp takes spaces before signs out when it puts tokens together (`clean_up_tokenization_spaces`).
    pub clean_spaces: bool,
    /// The steps before the byte-level spelling.
    steps: &'static [Step],
    /// What llama.cpp does instead, where it only comes near.
    runtime: Option<&'static str>,
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

/// The expressions of tokenizer.json files.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const MINICPM5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What llama.cpp does for the two above: a letter that is no small one of ASCII, a letter that is no large one.
const GPT4O_RUNTIME: &str = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN_RUNTIME: &str = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The most common: nothing added, merges looked at, exact.
const PLAIN: PreTokenizer = PreTokenizer {
    name: "",
    add_bos: false,
    ignore_merges: false,
    clean_spaces: false,
    steps: &[],
    runtime: None,
};

/// All that are built. Of those with the same steps and flags the first is taken.
pub const ALL: &[PreTokenizer] = &[
    PreTokenizer {
        name: "smollm",
        steps: &[Step::Digits, Step::Gpt2],
        ..PLAIN
    },
    // Granite 3.
    PreTokenizer {
        name: "refact",
        clean_spaces: true,
        steps: &[Step::Digits, Step::Gpt2],
        ..PLAIN
    },
    PreTokenizer {
        name: "starcoder",
        clean_spaces: true,
        steps: &[Step::Digits, Step::Gpt2],
        ..PLAIN
    },
    PreTokenizer {
        name: "gpt-2",
        clean_spaces: true,
        steps: &[Step::Gpt2],
        ..PLAIN
    },
    // Llama 3, LFM 2, SmolLM 3.
    PreTokenizer {
        name: "llama-bpe",
        add_bos: true,
        ignore_merges: true,
        clean_spaces: true,
        steps: &[Step::Split(LLAMA3)],
        ..PLAIN
    },
    PreTokenizer {
        name: "lfm2",
        add_bos: true,
        ignore_merges: true,
        clean_spaces: true,
        steps: &[Step::Split(LLAMA3)],
        ..PLAIN
    },
    // OLMo 2, Granite 4, Phi 4.
    PreTokenizer {
        name: "dbrx",
        clean_spaces: true,
        steps: &[Step::Split(LLAMA3)],
        ..PLAIN
    },
    PreTokenizer {
        name: "smaug-bpe",
        clean_spaces: true,
        steps: &[Step::Split(LLAMA3)],
        ..PLAIN
    },
    // Qwen 2, 2.5 and 3.
    PreTokenizer {
        name: "qwen2",
        steps: &[Step::Split(QWEN2)],
        ..PLAIN
    },
    PreTokenizer {
        name: "stablelm2",
        clean_spaces: true,
        steps: &[Step::Split(QWEN2)],
        ..PLAIN
    },
    PreTokenizer {
        name: "qwen35",
        steps: &[Step::Split(QWEN35)],
        ..PLAIN
    },
    PreTokenizer {
        name: "minicpm5",
        ignore_merges: true,
        clean_spaces: true,
        steps: &[Step::Split(r"\p{N}{1,3}"), Step::Split(MINICPM5)],
        ..PLAIN
    },
    // Phi 4 mini.
    PreTokenizer {
        name: "gpt-4o",
        steps: &[Step::Split(GPT4O)],
        runtime: Some(GPT4O_RUNTIME),
        ..PLAIN
    },
    // Mistral NeMo, Ministral.
    PreTokenizer {
        name: "tekken",
        add_bos: true,
        ignore_merges: true,
        steps: &[Step::Split(TEKKEN)],
        runtime: Some(TEKKEN_RUNTIME),
        ..PLAIN
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

/// The one with this structure in `tokenizer.json`. Of several it is the one with the same `ignore_merges`, then the
/// one with the same `clean_up_tokenization_spaces` where the checkpoint says it: for llama.cpp the two flags are part
/// of the name. One with another `ignore_merges` is better than none, because most vocabularies do not depend on it;
/// the proof shows whether this one does.
pub fn by_structure(
    pre_tokenizer: &Json,
    ignore_merges: bool,
    clean_spaces: Option<bool>,
) -> Option<&'static PreTokenizer> {
    let found = canonical(pre_tokenizer);
    let same = ALL.iter().filter(|pre| canonical(&pre.to_json()) == found);
    // The first of the smallest.
    same.min_by_key(|pre| {
        (
            pre.ignore_merges != ignore_merges,
            clean_spaces.is_some_and(|clean| pre.clean_spaces != clean),
        )
    })
}

impl PreTokenizer {
    /// The expression with which llama.cpp only comes near what `tokenizer.json` says.
    pub(super) fn runtime(&self) -> Option<&'static str> {
        self.runtime
    }

    /// `pre_tokenizer` of `tokenizer.json`, as llama.cpp does it.
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

/// The text of a token in byte-level spelling, if its bytes are text. Source: GPT-2 encoder.py, `bytes_to_unicode`:
/// the bytes that are visible in Latin-1 stand for themselves, the others follow from U+0100 on.
pub(super) fn decode(token: &str) -> Option<String> {
    let bytes = token.chars().map(|c| match u32::from(c) {
        c @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(c).ok(),
        c @ 0x100..=0x120 => u8::try_from(c - 0x100).ok(),
        c @ 0x121..=0x142 => u8::try_from(c - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    });
    String::from_utf8(bytes.collect::<Option<_>>()?).ok()
}

/// The parts as a flat list, without what does not change the pieces.
fn canonical(pre_tokenizer: &Json) -> Vec<Json> {
    if let Some(parts) = pre_tokenizer.get("pretokenizers").and_then(Json::as_array) {
        return parts.iter().flat_map(canonical).collect();
    }
    let mut part = pre_tokenizer.clone();
    if let Some(part) = part.as_object_mut() {
        part.remove("trim_offsets");
        let kind = part.get("type").and_then(Json::as_str).unwrap_or_default();
        if kind == "ByteLevel" {
            part.entry("use_regex").or_insert(Json::Bool(true));
        } else if kind == "Split"
            && part.get("behavior").is_some_and(|behavior| behavior == "Removed")
            && part.get("invert") == Some(&Json::Bool(true))
        {
            // Keeping what matches is isolating it, with an expression that matches everything.
            part.insert("behavior".into(), "Isolated".into());
            part.insert("invert".into(), false.into());
        }
    }
    vec![part]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spelled_as_gpt_2_spells_them() {
        assert_eq!(decode("ĠtheĊ").as_deref(), Some(" the\n"));
        assert_eq!(
            decode("ÃŃ").as_deref(),
            Some("í"),
            "0xc3 0xad, the last of the spelled bytes"
        );
        assert_eq!(decode("ł").as_deref(), None, "0xa0 alone is no text");
        assert_eq!(decode("日"), None);
    }

    #[test]
    fn a_structure_is_recognised_and_a_strange_one_is_not() {
        for pre in ALL {
            let found = by_structure(&pre.to_json(), pre.ignore_merges, Some(pre.clean_spaces)).unwrap();
            assert_eq!(
                (found.ignore_merges, found.clean_spaces),
                (pre.ignore_merges, pre.clean_spaces)
            );
            assert_eq!(canonical(&found.to_json()), canonical(&pre.to_json()));
        }
        let old = json!({"pretokenizers": [{"individual_digits": true, "type": "Digits"},
            {"add_prefix_space": false, "trim_offsets": false, "type": "ByteLevel"}], "type": "Sequence"});
        let name = |ignore, clean| by_structure(&old, ignore, clean).unwrap().name;
        assert_eq!(
            [
                name(false, None),
                name(false, Some(false)),
                name(false, Some(true)),
                name(true, None)
            ],
            ["smollm", "smollm", "refact", "smollm"]
        );
        let llama3 = by_name("dbrx").unwrap().to_json();
        let name = |ignore| by_structure(&llama3, ignore, None).unwrap().name;
        assert_eq!([name(true), name(false)], ["llama-bpe", "dbrx"]);
        let removed = llama3
            .to_string()
            .replace("Isolated", "Removed")
            .replace(r#""invert":false"#, r#""invert":true"#);
        let removed: Json = serde_json::from_str(&removed).unwrap();
        assert_eq!(by_structure(&removed, false, None).unwrap().name, "dbrx");
        let grouped = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]});
        assert!(by_structure(&grouped, false, None).is_none());
        let prefix =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        assert!(by_structure(&prefix, false, None).is_none());
    }
}
