//! The `general.*` keys: what a file says of the model, for people and for programs that list models.
//!
//! In: a GGUF file's own keys; or a folder's model card, `config.json`, `generation_config.json` and name. Source:
//! llama.cpp gguf-py/gguf/metadata.py.

mod name;

use name::{Name, size_label, title};
use serde_json::{Map, Value as Json};

use super::provenance::folder_name;
use super::source::Weights;
use super::{ModelError, SourceModel};
use crate::arch::Architecture;
use crate::checkpoint::{Checkpoint, read_json_object};
use crate::front_matter::{self, FrontMatter};
use crate::gguf::Value;
use crate::quantize::FileType;

/// What a GGUF file says of how it is stored, rather than of the model.
const OF_THE_FILE: &[&str] = &[
    "general.architecture",
    "general.type",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
];

/// `general.*`: from a GGUF file all that it says of the model, from a folder what there is to find.
pub(super) fn general(
    model: &SourceModel,
    arch: &Architecture,
    file: FileType,
    parameters: u64,
) -> Result<Vec<(String, Value)>, ModelError> {
    let mut keys: Vec<(String, Value)> = vec![
        ("general.architecture".into(), arch.name.into()),
        ("general.type".into(), "model".into()),
    ];
    match &model.weights {
        Weights::Folder(checkpoint) => keys.extend(of_checkpoint(checkpoint, parameters)?),
        Weights::File(gguf) => {
            let said = gguf
                .metadata()
                .iter()
                .filter(|(key, _)| key.starts_with("general.") && !OF_THE_FILE.contains(&key.as_str()));
            keys.extend(said.cloned());
        }
    }
    keys.push(("general.quantization_version".into(), Value::U32(2)));
    keys.push(("general.file_type".into(), file.number().into()));
    Ok(keys)
}

fn of_checkpoint(checkpoint: &Checkpoint, parameters: u64) -> Result<Vec<(String, Value)>, ModelError> {
    let dir = checkpoint.dir();
    let generation = dir.join("generation_config.json");
    let generation = if generation.is_file() {
        read_json_object(&generation)?
    } else {
        Map::new()
    };
    let card = FrontMatter::of_folder(dir).map_err(|source| ModelError::Read {
        path: dir.join("README.md"),
        source,
    })?;
    let path = checkpoint.config().get("_name_or_path").and_then(Json::as_str);
    Ok(of_folder(
        &folder_name(dir),
        path.unwrap_or(""),
        &card,
        &generation,
        parameters,
    ))
}

/// The keys of a folder: the card's word counts most, then `_name_or_path` of `config.json` where that is a name,
/// then the folder's name.
fn of_folder(
    folder: &str,
    name_or_path: &str,
    card: &FrontMatter,
    generation: &Map<String, Json>,
    parameters: u64,
) -> Vec<(String, Value)> {
    let is_name =
        !name_or_path.is_empty() && !name_or_path.starts_with('.') && name_or_path.matches('/').count() <= 1;
    let names: Vec<_> = [Some(name_or_path).filter(|_| is_name), Some(folder)]
        .into_iter()
        .flatten()
        .map(|id| Name::parse(id, parameters))
        .collect();
    let from_names = |part: fn(&Name) -> Option<&String>| names.iter().find_map(part).cloned();

    let mut keys = sampling(generation);
    let mut add = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            keys.push((format!("general.{key}"), value.into()));
        }
    };
    let whole_name = names
        .iter()
        .map(|name| &name.full)
        .find(|full| !full.is_empty())
        .map_or_else(|| "Model".into(), |full| title(full));
    let organization = from_names(|name| name.organization.as_ref()).map(|name| title(&name));
    add("name", card.text(&["name", "model_name"]).or(Some(whole_name)));
    add("author", card.text(&["author", "model_author", "model_creator"]));
    for (key, keys, named) in [
        (
            "version",
            ["version", "model_version"].as_slice(),
            from_names(|name| name.version.as_ref()),
        ),
        (
            "organization",
            &["organization", "model_organization"],
            organization,
        ),
        (
            "finetune",
            &["finetune", "model_finetune"],
            from_names(|name| name.finetune.as_ref()),
        ),
        (
            "basename",
            &["basename", "model_basename", "model_type"],
            from_names(|name| name.basename.as_ref()),
        ),
        ("description", &["description", "model_description"], None),
        (
            "size_label",
            &["size_label", "model_size_label"],
            from_names(|name| name.size_label.as_ref()).or_else(|| Some(size_label(parameters))),
        ),
    ] {
        add(key, card.text(keys).or(named));
    }
    let licenses = card.texts(&["license"]);
    add("license", (!licenses.is_empty()).then(|| licenses.join(",")));
    add("license.name", card.text(&["license_name"]));
    add("license.link", card.text(&["license_link"]));
    for what in ["url", "doi", "uuid", "repo_url"] {
        let value = card.text(&[what, &format!("model_{what}")]);
        add(&format!("source.{what}"), value);
    }
    let sources: [(&str, &[&str]); 2] = [
        ("base_model", &["base_model", "base_models", "base_model_sources"]),
        ("dataset", &["datasets", "dataset", "dataset_sources"]),
    ];
    for (what, named) in sources {
        keys.extend(source_keys(what, &card.entries(named), parameters));
    }
    for (key, named) in [
        ("tags", ["tags", "pipeline_tag"]),
        ("languages", ["languages", "language"]),
    ] {
        let texts = card.texts(&named);
        if !texts.is_empty() {
            keys.push((format!("general.{key}"), texts.into()));
        }
    }
    keys
}

/// What a card says of the models and data that a model was made of: names on the hub, addresses, or mappings.
fn source_keys(what: &str, entries: &[&Json], parameters: u64) -> Vec<(String, Value)> {
    let mut keys = Vec::new();
    if entries.is_empty() {
        return keys;
    }
    keys.push((format!("general.{what}.count"), Value::U32(entries.len() as u32)));
    for (at, entry) in entries.iter().enumerate() {
        let mut add = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                keys.push((format!("general.{what}.{at}.{key}"), value.into()));
            }
        };
        match entry {
            Json::String(id) => {
                let is_address = ["http://", "https://", "ssh://"]
                    .iter()
                    .any(|scheme| id.starts_with(scheme));
                let on_hub = match id.split_once("://huggingface.co/") {
                    Some(("http" | "https", rest)) => {
                        Some(rest).filter(|rest| rest.matches('/').count() == 1)
                    }
                    _ if is_address => None,
                    _ => Some(id.as_str()),
                };
                let Some(on_hub) = on_hub else {
                    add("repo_url", Some(id.clone()));
                    continue;
                };
                let name = Name::parse(on_hub, parameters);
                add("name", Some(title(&name.full)));
                add("version", name.version);
                let organization = name.organization.as_deref();
                add("organization", organization.map(title));
                let address = organization.map(|it| format!("https://huggingface.co/{it}/{}", name.full));
                add("repo_url", if is_address { Some(id.clone()) } else { address });
            }
            Json::Object(entry) => {
                for key in [
                    "name",
                    "author",
                    "version",
                    "organization",
                    "description",
                    "url",
                    "doi",
                    "uuid",
                    "repo_url",
                ] {
                    add(key, entry.get(key).and_then(front_matter::text));
                }
            }
            _ => {}
        }
    }
    keys
}

/// The sampler's settings that the model's makers recommend.
fn sampling(config: &Map<String, Json>) -> Vec<(String, Value)> {
    let number = |key: &str| config.get(key).and_then(Json::as_f64);
    let float = |key: &str| number(key).map(|value| Value::F32(value as f32));
    let whole = |key: &str| number(key).map(|value| Value::I32(value as i32));
    [
        (
            "sequence",
            config.get("sequence").and_then(Json::as_str).map(Value::from),
        ),
        ("top_k", whole("top_k")),
        ("top_p", float("top_p")),
        ("min_p", float("min_p")),
        ("xtc_probability", float("xtc_probability")),
        ("xtc_threshold", float("xtc_threshold")),
        ("temp", float("temperature")),
        ("penalty_last_n", whole("penalty_last_n")),
        (
            "penalty_repeat",
            float("penalty_repeat").or_else(|| float("repetition_penalty")),
        ),
        ("mirostat", whole("mirostat")),
        ("mirostat_tau", float("mirostat_tau")),
        ("mirostat_eta", float("mirostat_eta")),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some((format!("general.sampling.{key}"), value?)))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Array;

    /// A model as people publish it, and what gguf-py's Metadata makes of it.
    #[derive(serde::Deserialize)]
    struct Case {
        folder: String,
        name_or_path: String,
        parameters: u64,
        card: String,
        generation: Map<String, Json>,
        keys: Map<String, Json>,
    }

    #[test]
    fn keys_are_those_of_gguf_py() {
        let cases = include_str!("../../tests/fixtures/cards.json");
        let cases: Vec<Case> = serde_json::from_str(cases).unwrap();
        assert!(cases.len() > 10);
        for case in cases {
            let card = FrontMatter::parse(&case.card).unwrap();
            let keys = of_folder(
                &case.folder,
                &case.name_or_path,
                &card,
                &case.generation,
                case.parameters,
            );
            let keys: Map<String, Json> = keys
                .into_iter()
                .map(|(key, value)| {
                    let value = match value {
                        Value::String(text) => Json::from(text),
                        Value::U32(number) => Json::from(number),
                        Value::I32(number) => Json::from(number),
                        Value::F32(number) => Json::from(f64::from(number)),
                        Value::Array(Array::String(texts)) => Json::from(texts),
                        other => panic!("{key}: {other:?}"),
                    };
                    (key, value)
                })
                .collect();
            assert_eq!(keys, case.keys, "{}", case.folder);
        }
    }

    #[test]
    fn a_card_that_is_no_yaml_is_an_error_and_one_without_front_matter_says_nothing() {
        assert!(FrontMatter::parse("---\nlicense: [mit\n---\n").is_err());
        assert!(FrontMatter::parse("---\n- a\n---\n").is_err());
        assert!(
            FrontMatter::parse("# Title\n")
                .unwrap()
                .text(&["license"])
                .is_none()
        );
        assert!(
            FrontMatter::parse("---\n---\n")
                .unwrap()
                .text(&["license"])
                .is_none()
        );
        let card = FrontMatter::parse("---\nlanguage:\n- no\n- 1\n---\n").unwrap();
        assert_eq!(card.texts(&["language"]), ["no", "1"]);
    }
}
