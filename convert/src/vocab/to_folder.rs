//! The tokenizer's files of a checkpoint folder.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::{CONTROL, Model, UNKNOWN, UNUSED, USER_DEFINED, Vocab};

/// Phi-3's added tokens that keep the white space behind them.
const NEVER_STRIP: &[&str] = &["<unk>", "<s>", "<|endoftext|>"];

impl Vocab {
    /// `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and, if there are templates,
    /// `chat_template.jinja` and `additional_chat_templates/NAME.jinja`. `context_length` becomes
    /// `model_max_length`.
    pub fn to_folder(&self, context_length: u64) -> Vec<(String, String)> {
        let mut files = vec![
            ("tokenizer.json".to_owned(), pretty(&self.tokenizer_json())),
            (
                "tokenizer_config.json".to_owned(),
                pretty(&self.tokenizer_config(context_length)),
            ),
            (
                "special_tokens_map.json".to_owned(),
                pretty(&Json::Object(self.special_tokens())),
            ),
        ];
        if let Some(template) = &self.templates.default {
            files.push(("chat_template.jinja".to_owned(), template.clone()));
        }
        for (name, template) in &self.templates.named {
            files.push((
                format!("additional_chat_templates/{name}.jinja"),
                template.clone(),
            ));
        }
        files
    }

    /// The text of a special token.
    fn text(&self, id: Option<u32>) -> Option<&str> {
        self.tokens.get(id? as usize).map(String::as_str)
    }

    fn special_tokens(&self) -> Map<String, Json> {
        // `eot` is not a role that transformers knows: generation_config.json has it among the end tokens.
        let roles = self.special.of_transformers();
        roles
            .filter_map(|(role, id)| Some((format!("{role}_token"), json!(self.text(id)?))))
            .collect()
    }

    /// `tokenizer.json`, with which transformers and the tokenizers crate give the identifiers that llama.cpp gives.
    pub(super) fn tokenizer_json(&self) -> Json {
        let mut vocab = Map::new();
        let mut added = Vec::new();
        for (id, (token, kind)) in self.tokens.iter().zip(&self.kinds).enumerate() {
            // Identifiers that only fill the matrix up are no tokens.
            if *kind == UNUSED && *token == format!("[PAD{id}]") {
                continue;
            }
            // Added tokens stand here too, so that they keep their identifiers whatever the reader does.
            vocab.insert(token.clone(), json!(id));
            if matches!(*kind, CONTROL | USER_DEFINED | UNKNOWN) {
                let strips = self.strips && !NEVER_STRIP.contains(&token.as_str());
                added.push(json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": strips,
                    "normalized": false, "special": *kind != USER_DEFINED,
                }));
            }
        }
        let (normalizer, pre_tokenizer, decoder, merges) = match &self.model {
            Model::Bpe { pre, merges } => (
                Json::Null,
                pre.to_json(),
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
                json!(merges),
            ),
            Model::SentencePiece { scores, .. } => {
                let (normalizer, decoder) = spaces(self.add_space_prefix.unwrap_or(true));
                (normalizer, Json::Null, decoder, self.merges(scores))
            }
        };
        let (ignore_merges, sentencepiece) = match &self.model {
            Model::Bpe { pre, .. } => (pre.ignore_merges, false),
            Model::SentencePiece { .. } => (false, true),
        };
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": decoder,
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": self.text(self.special.unk).filter(|_| sentencepiece),
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": sentencepiece,
                "byte_fallback": sentencepiece,
                "ignore_merges": ignore_merges,
                "vocab": vocab,
                "merges": merges,
            },
        })
    }

    /// Every pair of tokens whose joint text is a token, the highest score first: the order in which llama.cpp merges.
    fn merges(&self, scores: &[f32]) -> Json {
        let ids: HashMap<&str, usize> = self.tokens.iter().map(String::as_str).zip(0..).collect();
        let mut merges: Vec<(f32, usize, &str, &str)> = Vec::new();
        for (id, (token, kind)) in self.tokens.iter().zip(&self.kinds).enumerate() {
            // These are found before anything is merged.
            if matches!(*kind, CONTROL | USER_DEFINED | UNKNOWN) {
                continue;
            }
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if ids.contains_key(left) && ids.contains_key(right) {
                    merges.push((scores.get(id).copied().unwrap_or(0.0), id, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        merges
            .into_iter()
            .map(|(_, _, left, right)| json!([left, right]))
            .collect()
    }

    /// Adds the tokens that begin and end a text, if any.
    fn post_processor(&self) -> Json {
        let bos = self.special.bos.filter(|_| self.add_bos);
        let eos = self.special.eos.filter(|_| self.add_eos);
        if bos.is_none() && eos.is_none() {
            return Json::Null;
        }
        let piece = |id: Option<u32>, kind: u32| {
            self.text(id)
                .map(|text| json!({"SpecialToken": {"id": text, "type_id": kind}}))
        };
        let text = |name: &str, kind: u32| {
            let sequence = json!({"Sequence": {"id": name, "type_id": kind}});
            [piece(bos, kind), Some(sequence), piece(eos, kind)]
                .into_iter()
                .flatten()
        };
        let special: Map<String, Json> = [bos, eos]
            .into_iter()
            .filter_map(|id| {
                let text = self.text(id)?;
                Some((
                    text.to_owned(),
                    json!({"id": text, "ids": [id], "tokens": [text]}),
                ))
            })
            .collect();
        json!({
            "type": "TemplateProcessing",
            "single": text("A", 0).collect::<Vec<_>>(),
            "pair": text("A", 0).chain(text("B", 1)).collect::<Vec<_>>(),
            "special_tokens": special,
        })
    }

    fn tokenizer_config(&self, context_length: u64) -> Json {
        let mut config = self.special_tokens();
        if let Some(space) = self.add_space_prefix {
            config.insert("add_prefix_space".into(), json!(space));
        }
        let clean = matches!(&self.model, Model::Bpe { pre, .. } if pre.clean_spaces);
        config.insert("clean_up_tokenization_spaces".into(), json!(clean));
        config.insert("model_max_length".into(), json!(context_length));
        // The class that takes everything from tokenizer.json; the model's own class would cut text anew.
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        if let Some(template) = &self.templates.default {
            config.insert("chat_template".into(), json!(template));
        }
        Json::Object(config)
    }
}

/// The normalizer that turns spaces into U+2581, with one before every text or not, and the decoder that turns them
/// back (transformers convert_slow_tokenizer.py, `LlamaConverter`).
fn spaces(prefix: bool) -> (Json, Json) {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if !prefix {
        return (replace, json!({"type": "Sequence", "decoders": decoders}));
    }
    decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    let prepend = json!({"type": "Prepend", "prepend": "\u{2581}"});
    (
        json!({"type": "Sequence", "normalizers": [prepend, replace]}),
        json!({"type": "Sequence", "decoders": decoders}),
    )
}

/// JSON with two spaces of indentation and a newline at the end.
pub(crate) fn pretty(value: &Json) -> String {
    format!("{value:#}\n")
}
