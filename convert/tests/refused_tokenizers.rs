//! Tokenizers that are refused, each by name: what cannot be, what llama.cpp has no part for, and what would end its
//! process.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use pipit_convert::checkpoint::read_json_object;
use pipit_convert::gguf::{Array, Gguf, Header, Value, Writer};
use pipit_convert::vocab::{Limit, Vocab};
use serde_json::{Value as Json, json};
use support::fixture;

/// A copy of a fixture, in a folder that goes away with the first of the two.
fn copy(name: &str) -> (tempfile::TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join(name);
    fs::create_dir(&dir).unwrap();
    for entry in fs::read_dir(fixture("tokenizers").join(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
        }
    }
    (scratch, dir)
}

fn edit(path: &Path, change: impl FnOnce(&mut Json)) {
    let mut json: Json = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

fn read(dir: &Path) -> Result<Vocab, String> {
    let config = read_json_object(&dir.join("config.json")).unwrap();
    Vocab::from_folder(dir, &config).map_err(|error| error.to_string())
}

/// What is said of the fixture `name` after `file` was changed.
fn refusal(name: &str, file: &str, change: impl FnOnce(&mut Json)) -> String {
    let (_scratch, dir) = copy(name);
    edit(&dir.join(file), change);
    read(&dir).unwrap_err()
}

#[track_caller]
fn says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

#[test]
fn vocabularies_with_holes_doubles_and_numbers_out_of_range() {
    let tokenizer = |change: fn(&mut Json)| refusal("dbrx", "tokenizer.json", change);
    says(
        &tokenizer(|t| t["model"]["vocab"]["x1"] = json!(7)),
        &["\"x1\" are both number 7"],
    );
    says(
        &tokenizer(|t| t["model"]["vocab"]["x1"] = json!(413)),
        &[
            "\"x1\" is number 413, and vocab_size in config.json is 413",
            "hint:",
        ],
    );
    says(
        &tokenizer(|t| t["model"]["vocab"]["x1"] = json!(u64::MAX)),
        &["\"x1\" is number"],
    );
    says(
        &tokenizer(|t| t["model"]["vocab"]["x1"] = json!(-1)),
        &["it is no tokenizer"],
    );
    says(
        &tokenizer(|t| t["added_tokens"][0]["id"] = json!(413)),
        &["is number 413, and vocab_size"],
    );
    says(
        &tokenizer(|t| t["added_tokens"][0]["id"] = json!(7)),
        &["are both number 7"],
    );
    says(
        &tokenizer(|t| t["added_tokens"][0]["content"] = Json::Null),
        &["has no id or no content"],
    );
    // 408 is a hole that is filled up as [PAD408]: the text must be free.
    says(
        &tokenizer(|t| t["model"]["vocab"]["[PAD408]"] = json!(409)),
        &["tokens 408 and 409 are both \"[PAD408]\""],
    );
    says(
        &tokenizer(|t| t["model"]["vocab"][""] = json!(409)),
        &["token 409 is empty"],
    );
    let special = refusal("gpt-2", "config.json", |config| {
        config["mask_token_id"] = json!(408)
    });
    says(&special, &["the mask token is 408, and there are 408 tokens"]);
    let twice = |text: &str| text.replace("\"vocab\":{", "\"vocab\":{\"!\":0,");
    let (_scratch, dir) = copy("dbrx");
    let path = dir.join("tokenizer.json");
    fs::write(&path, twice(&fs::read_to_string(&path).unwrap())).unwrap();
    assert!(read(&dir).is_err(), "the same key twice");
}

#[test]
fn merges_whose_parts_are_missing() {
    for name in ["dbrx", "spm-json"] {
        for merge in [
            json!(["a", "☃"]),
            json!(["☃", "a"]),
            json!(["z", "q"]),
            json!("z q"),
        ] {
            let error = refusal(name, "tokenizer.json", |t| {
                t["model"]["merges"].as_array_mut().unwrap().push(merge);
            });
            says(&error, &["needs a token that is not in the vocabulary"]);
        }
        let error = refusal(name, "tokenizer.json", |t| t["model"]["merges"][0] = json!(["a"]));
        says(&error, &["a merge has 1 parts"]);
    }
}

#[test]
fn algorithms_and_parts_that_llama_cpp_does_not_have() {
    for kind in ["WordPiece", "Unigram", "WordLevel"] {
        let error = refusal("dbrx", "tokenizer.json", |t| t["model"]["type"] = json!(kind));
        says(&error, &[kind, "is not supported", "hint:"]);
    }
    let unigram = refusal("dbrx", "tokenizer.json", |t| {
        t["model"] = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]});
    });
    says(&unigram, &["Unigram"]);
    let part = |key: &'static str, value: Json| refusal("dbrx", "tokenizer.json", |t| t[key] = value);
    says(
        &part("normalizer", json!({"type": "NFKC"})),
        &["the normalizer", "NFKC"],
    );
    says(
        &part("normalizer", json!({"type": "Lowercase"})),
        &["the normalizer", "Lowercase"],
    );
    says(
        &part("pre_tokenizer", json!({"type": "Whitespace"})),
        &["the pre_tokenizer", "Whitespace"],
    );
    says(
        &part("decoder", json!({"type": "BPEDecoder"})),
        &["the decoder", "BPEDecoder"],
    );
    says(
        &part(
            "post_processor",
            json!({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}),
        ),
        &["the post_processor", "RobertaProcessing"],
    );
    let two = json!({"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<tool>"}}, {"SpecialToken": {"id": "<tool>"}}, {"Sequence": {"id": "A"}}]});
    says(&part("post_processor", two), &["the post_processor"]);
    for (key, value) in [("dropout", json!(0.1)), ("end_of_word_suffix", json!("</w>"))] {
        let error = refusal("dbrx", "tokenizer.json", |t| t["model"][key] = value);
        says(&error, &[key, "is not supported"]);
    }
    let spm = |key: &'static str, value: Json| refusal("spm-json", "tokenizer.json", |t| t[key] = value);
    says(
        &spm("normalizer", json!({"type": "Precompiled"})),
        &["the normalizer", "Precompiled"],
    );
    says(&spm("normalizer", Json::Null), &["U+2581"]);
    says(
        &spm("pre_tokenizer", json!({"type": "Punctuation"})),
        &["the pre_tokenizer", "Punctuation"],
    );
    let byte = refusal("spm-json", "tokenizer.json", |t| {
        t["model"]["vocab"].as_object_mut().unwrap().remove("<0x7F>");
    });
    says(&byte, &["the token <0x7F> is missing", "byte_fallback"]);
}

#[test]
fn folders_without_a_tokenizer_and_files_that_are_none() {
    let (_scratch, dir) = copy("dbrx");
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    says(
        &read(&dir).unwrap_err(),
        &["tokenizer.json", "it is no tokenizer"],
    );
    fs::remove_file(dir.join("tokenizer.json")).unwrap();
    says(
        &read(&dir).unwrap_err(),
        &["there is no tokenizer.model", "hint:"],
    );
    let (_scratch, dir) = copy("spm-model");
    fs::write(dir.join("tokenizer.model"), b"\x00\x01 no protobuf").unwrap();
    says(&read(&dir).unwrap_err(), &["it is no SentencePiece model"]);
}

#[test]
fn hostile_and_endless_templates_wherever_they_stand() {
    let bad = "{{ messages.__class__ }}";
    let config = |value: Json| refusal("gpt-2", "tokenizer_config.json", |c| c["chat_template"] = value);
    says(
        &config(json!(bad)),
        &["the chat template \"default\"", "__class__"],
    );
    let named = json!([{"name": "default", "template": "x"}, {"name": "rag", "template": bad}]);
    says(&config(named), &["the chat template \"rag\"", "__class__"]);
    let endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    says(&config(json!(endless)), &["does not end"]);
    says(&config(json!("{% include 'x' %}")), &["{% include %}", "hint:"]);
    says(&config(json!("{% if %}")), &["is no Jinja"]);
    says(&config(json!("x".repeat(300_000))), &["has 300000 bytes"]);
    let (_scratch, dir) = copy("smollm");
    fs::write(dir.join("chat_template.jinja"), bad).unwrap();
    says(&read(&dir).unwrap_err(), &["__class__"]);
    fs::write(dir.join("chat_template.jinja"), "x").unwrap();
    fs::create_dir(dir.join("additional_chat_templates")).unwrap();
    fs::write(dir.join("additional_chat_templates/a b.jinja"), bad).unwrap();
    says(
        &read(&dir).unwrap_err(),
        &["the chat template \"a_b\"", "__class__"],
    );
}

/// What is said of a GGUF file of the fixture `name` with other keys.
fn refusal_of_gguf(name: &str, changed: &[(&str, Value)]) -> String {
    let (scratch, dir) = copy(name);
    let mut metadata = read(&dir).unwrap().to_metadata();
    for (key, value) in changed {
        metadata.retain(|(known, _)| known != key);
        metadata.push(((*key).to_owned(), value.clone()));
    }
    let path = scratch.path().join("vocab.gguf");
    let header = Header {
        metadata,
        tensors: Vec::new(),
    };
    Writer::new(fs::File::create(&path).unwrap(), &header)
        .unwrap()
        .finish()
        .unwrap();
    Vocab::from_gguf(&Gguf::open(&path).unwrap())
        .unwrap_err()
        .to_string()
}

#[test]
fn gguf_files_whose_keys_do_not_fit_together() {
    let scores = |scores| ("tokenizer.ggml.scores", Value::Array(Array::F32(scores)));
    says(
        &refusal_of_gguf("spm", &[scores(vec![0.0; 3])]),
        &["485 tokens, but 3 scores"],
    );
    says(
        &refusal_of_gguf("spm", &[scores(vec![f32::NAN; 485])]),
        &["the score of token 0 is NaN"],
    );
    let kinds = ("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![1])));
    says(
        &refusal_of_gguf("spm", &[kinds]),
        &["485 tokens, but 1 token types"],
    );
    for model in ["bert", "t5", "rwkv", "gemma4"] {
        let error = refusal_of_gguf("spm", &[("tokenizer.ggml.model", model.into())]);
        says(&error, &["the tokenizer model", model, "is not supported"]);
    }
    let bos = ("tokenizer.ggml.bos_token_id", Value::U32(485));
    says(&refusal_of_gguf("spm", &[bos]), &["the bos token is 485"]);
    let template = ("tokenizer.chat_template.x", Value::from("{{ x.__init__ }}"));
    says(
        &refusal_of_gguf("dbrx", &[template]),
        &["the chat template \"x\"", "__init__"],
    );
    let tokens = ("tokenizer.ggml.tokens", Value::from(vec!["a".to_owned(); 485]));
    says(
        &refusal_of_gguf("spm", &[tokens]),
        &["tokens 0 and 1 are both \"a\""],
    );
}

#[test]
fn a_token_without_a_row_is_left_out_where_gemma_has_one() {
    let vocab = read(&fixture("tokenizers").join("gemma")).unwrap();
    assert_eq!(vocab.tokens.len(), 480);
    assert!(!vocab.tokens.iter().any(|token| token == "<image_soft_token>"));
}

#[test]
fn white_space_beside_added_tokens_is_a_limit_except_in_phi_3() {
    let (_scratch, dir) = copy("spm-json");
    edit(&dir.join("tokenizer.json"), |t| {
        for token in t["added_tokens"].as_array_mut().unwrap() {
            let strips = !["<unk>", "<s>"].contains(&token["content"].as_str().unwrap());
            token["rstrip"] = json!(strips);
        }
        t["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": 482, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}));
    });
    for (name, limits) in [("Some Model", &[Limit::Strip][..]), ("Phi 3 but Phi-3", &[])] {
        let mut vocab = read(&dir).unwrap();
        vocab.prove(&dir, name).unwrap();
        assert_eq!(vocab.limits, limits, "{name}");
    }
}
