//! The tokenizer's files of a checkpoint folder.

use serde_json::{Map, Value as Json, json};

use super::{CONTROL, UNUSED, USER_DEFINED, Vocab};

impl Vocab {
    /// `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and, if there is a template,
    /// `chat_template.jinja`. `context_length` becomes `model_max_length`.
    pub fn to_folder(&self, context_length: u64) -> Vec<(&'static str, String)> {
        let mut files = vec![
            ("tokenizer.json", pretty(&self.tokenizer_json())),
            (
                "tokenizer_config.json",
                pretty(&self.tokenizer_config(context_length)),
            ),
            (
                "special_tokens_map.json",
                pretty(&Json::Object(self.special_tokens())),
            ),
        ];
        if let Some(template) = &self.chat_template {
            files.push(("chat_template.jinja", template.clone()));
        }
        files
    }

    /// The text of a special token.
    fn text(&self, id: Option<u32>) -> Option<&str> {
        self.tokens.get(id? as usize).map(String::as_str)
    }

    fn special_tokens(&self) -> Map<String, Json> {
        // `eot` is not a role that transformers knows: generation_config.json has it among the end tokens.
        let roles = self
            .special
            .roles()
            .into_iter()
            .filter(|(role, ..)| *role != "eot");
        roles
            .filter_map(|(role, _, id)| Some((format!("{role}_token"), json!(self.text(id)?))))
            .collect()
    }

    fn tokenizer_json(&self) -> Json {
        let mut vocab = Map::new();
        let mut added = Vec::new();
        for (id, (token, kind)) in self.tokens.iter().zip(&self.kinds).enumerate() {
            // Identifiers that only fill the matrix up are no tokens.
            if *kind == UNUSED && *token == format!("[PAD{id}]") {
                continue;
            }
            // Added tokens stand here too, so that they keep their identifiers whatever the reader does.
            vocab.insert(token.clone(), json!(id));
            if *kind == CONTROL || *kind == USER_DEFINED {
                added.push(json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind == CONTROL,
                }));
            }
        }
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": self.pre.to_json(),
            "post_processor": self.post_processor(),
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": self.pre.ignore_merges,
                "vocab": vocab,
                "merges": self.merges,
            },
        })
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
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        config.insert("model_max_length".into(), json!(context_length));
        // The class that takes everything from tokenizer.json; the model's own class would cut text anew.
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".into(), json!(template));
        }
        Json::Object(config)
    }
}

/// JSON with two spaces of indentation and a newline at the end.
pub(crate) fn pretty(value: &Json) -> String {
    format!("{value:#}\n")
}
