//! Tiny tokenizers of every kind: their keys against those of llama.cpp's convert_hf_to_gguf.py, what llama.cpp reads
//! against what the tokenizers library reads, and the way back. The fixtures are made by
//! tests/references/make_tokenizers.py.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use pipit_convert::checkpoint::read_json_object;
use pipit_convert::gguf::{Array, Gguf, Header, Value, Writer};
use pipit_convert::vocab::proof::ProofError;
use pipit_convert::vocab::{Limit, Model, Vocab};
use serde_json::{Value as Json, json};
use support::fixture;

const NAMES: &[&str] = &[
    "dbrx",
    "gemma",
    "gpt-2",
    "gpt-4o",
    "llama-bpe",
    "qwen2",
    "refact",
    "smollm",
    "spm",
    "spm-first",
    "spm-json",
    "spm-model",
    "tekken",
];

/// Keys that we write and convert_hf_to_gguf.py does not, or that differ, with the reason. `*` is every fixture.
const OURS: &[(&str, &str, &str)] = &[
    (
        "*",
        "eot_token_id",
        "without it the loader takes any token from a list of texts, whichever its hash map yields first",
    ),
    (
        "*",
        "add_space_prefix",
        "always written for SentencePiece, where the loader's default is true",
    ),
    (
        "gpt-2",
        "add_bos_token",
        "the loader's default depends on the name of the pre-tokenizer",
    ),
    ("gpt-2", "add_eos_token", "as above"),
    (
        "llama-bpe",
        "eom_token_id",
        "the third end of generation_config.json, which llama.cpp does not know by its text",
    ),
    (
        "llama-bpe",
        "chat_template.tool_use",
        "transformers reads the files beside chat_template.jinja too",
    ),
    ("llama-bpe", "chat_templates", "as above"),
    (
        "spm-model",
        "bos_token_id",
        "tokenizer.model names it; they look only at tokenizer.json",
    ),
    ("spm-model", "eos_token_id", "as above"),
    ("spm-model", "padding_token_id", "as above"),
    (
        "spm-json",
        "scores",
        "rebuilt from the merges: with the same score for all, llama.cpp merges from left to right",
    ),
    ("spm-first", "scores", "as above"),
    (
        "spm-json",
        "tokens",
        "filled up to the rows of the embeddings, which the loader compares",
    ),
    ("spm-first", "tokens", "as above"),
    (
        "spm-json",
        "token_type",
        "as above, and <unk> is a control token as with tokenizer.model",
    ),
    ("spm-first", "token_type", "as above"),
];

/// Keys that convert_hf_to_gguf.py writes and we do not.
const THEIRS: &[(&str, &str)] = &[(
    "add_sep_token",
    "read off the template for pairs of texts, which no language model uses; the loader's default is the same",
)];

fn folder(name: &str) -> std::path::PathBuf {
    fixture("tokenizers").join(name)
}

fn read(dir: &Path) -> Vocab {
    Vocab::from_folder(dir, &read_json_object(&dir.join("config.json")).unwrap()).unwrap()
}

fn spelled(value: &Value) -> Json {
    let (kind, value) = match value {
        Value::U32(v) => ("UINT32", json!(v)),
        Value::Bool(v) => ("BOOL", json!(v)),
        Value::String(v) => ("STRING", json!(v)),
        Value::Array(Array::String(v)) => ("ARRAY/STRING", json!(v)),
        Value::Array(Array::I32(v)) => ("ARRAY/INT32", json!(v)),
        Value::Array(Array::F32(v)) => ("ARRAY/FLOAT32", json!(v)),
        other => panic!("a key of another type: {other:?}"),
    };
    json!({"type": kind, "value": value})
}

/// The vocabulary as a GGUF file without tensors, read again.
fn through_gguf(vocab: &Vocab, path: &Path) -> Vocab {
    let header = Header {
        metadata: vocab.to_metadata(),
        tensors: Vec::new(),
    };
    Writer::new(std::fs::File::create(path).unwrap(), &header)
        .unwrap()
        .finish()
        .unwrap();
    Vocab::from_gguf(&Gguf::open(path).unwrap()).unwrap()
}

fn write_folder(vocab: &Vocab, dir: &Path) {
    for (name, text) in vocab.to_folder(64) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let config = json!({"vocab_size": vocab.tokens.len()});
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn every_fixture_is_tested() {
    assert_eq!(support::names(&fixture("tokenizers")), NAMES);
}

#[test]
fn keys_are_those_of_convert_hf_to_gguf() {
    for name in NAMES {
        let listed = |key: &str| {
            OURS.iter()
                .any(|(fixture, known, _)| (*fixture == "*" || fixture == name) && *known == key)
        };
        let short = |key: &str| {
            key.trim_start_matches("tokenizer.")
                .trim_start_matches("ggml.")
                .to_owned()
        };
        let expected = std::fs::read_to_string(folder(name).join("expected.json")).unwrap();
        let expected: BTreeMap<String, Json> = serde_json::from_str(&expected).unwrap();
        let theirs: BTreeMap<_, _> = expected
            .into_iter()
            .map(|(key, value)| (short(&key), value))
            .collect();
        let ours: BTreeMap<_, _> = read(&folder(name))
            .to_metadata()
            .into_iter()
            .filter(|(key, _)| key.starts_with("tokenizer."))
            .map(|(key, value)| (short(&key), spelled(&value)))
            .collect();
        for (key, value) in &ours {
            if theirs.get(key) != Some(value) {
                assert!(
                    listed(key),
                    "{name}: {key} is {value}, theirs is {:?}",
                    theirs.get(key)
                );
            }
        }
        for key in theirs.keys().filter(|key| !ours.contains_key(*key)) {
            assert!(
                THEIRS.iter().any(|(known, _)| known == key),
                "{name}: {key} is missing"
            );
        }
        for (_, key, _) in OURS.iter().filter(|(fixture, ..)| fixture == name) {
            assert_ne!(
                ours.get(*key),
                theirs.get(*key),
                "{name}: {key} is listed, and no different"
            );
        }
    }
}

#[test]
fn llama_cpp_and_the_tokenizers_library_give_the_same_identifiers() {
    for name in NAMES {
        let mut vocab = read(&folder(name));
        let proof = vocab.prove(&folder(name), name).unwrap();
        assert!(proof.texts > 500 && proof.pieces > 100, "{name}: {proof:?}");
        let again = read(&folder(name)).prove(&folder(name), name).unwrap();
        assert_eq!(proof, again, "{name}: the corpus does not change");
        let limits: &[Limit] = match *name {
            "qwen2" => &[Limit::Nfc],
            "gpt-4o" | "tekken" => &[Limit::Case],
            "spm-first" => &[Limit::SpaceOnce],
            "gemma" => &[Limit::Runs],
            _ => &[],
        };
        assert_eq!(vocab.limits, limits, "{name}");
    }
}

#[test]
fn a_vocabulary_goes_to_gguf_and_back_to_a_folder_that_reads_text_alike() {
    let scratch = tempfile::tempdir().unwrap();
    for name in NAMES {
        let vocab = read(&folder(name));
        let back = through_gguf(&vocab, &scratch.path().join("vocab.gguf"));
        assert_eq!(
            (&back.tokens, &back.kinds),
            (&vocab.tokens, &vocab.kinds),
            "{name}"
        );
        assert_eq!(
            (&back.special, &back.templates),
            (&vocab.special, &vocab.templates),
            "{name}"
        );
        let dir = scratch.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        write_folder(&back, &dir);
        let mut again = read(&dir);
        assert_eq!(
            (&again.tokens, &again.kinds),
            (&vocab.tokens, &vocab.kinds),
            "{name}"
        );
        assert_eq!(again.templates, vocab.templates, "{name}");
        assert_eq!(
            (again.add_bos, again.add_eos, again.model.pre()),
            (vocab.add_bos, vocab.add_eos, vocab.model.pre()),
            "{name}"
        );
        again.prove(&dir, name).unwrap();
    }
}

#[test]
fn a_vocabulary_that_llama_cpp_reads_otherwise_is_refused_with_the_text_and_both_readings() {
    // The scores that convert_hf_to_gguf.py writes where there is no tokenizer.model.
    let mut vocab = read(&folder("spm-json"));
    if let Model::SentencePiece { scores, .. } = &mut vocab.model {
        scores.fill(-1000.0);
    }
    let Err(ProofError::Differs {
        text,
        tokenizer,
        llama_cpp,
        ..
    }) = vocab.prove(&folder("spm-json"), "x")
    else {
        panic!("equal scores were proved")
    };
    assert!(text.chars().count() < 12 && tokenizer != llama_cpp, "{text:?}");

    // The name of another pre-tokenizer.
    let mut vocab = read(&folder("dbrx"));
    let Model::Bpe { pre, .. } = &mut vocab.model else {
        panic!()
    };
    *pre = pipit_convert::vocab::pre::by_name("gpt-2").unwrap();
    let error = vocab.prove(&folder("dbrx"), "x").unwrap_err().to_string();
    assert!(
        error.contains("llama.cpp would read this tokenizer otherwise"),
        "{error}"
    );
    assert!(error.contains("hint:"), "{error}");
}
