//! The keys of a GGUF file, put together by what they are about.

use pipit_convert::gguf::Value;

/// The groups in the order in which they are shown, with the starts of their keys.
const GROUPS: &[(&str, &[&str])] = &[
    ("model", &["general."]),
    ("made of", &["pipit."]),
    ("parts", &["split."]),
    ("adapter", &["adapter."]),
    ("importance matrix", &["imatrix.", "quantize.imatrix."]),
    ("tokenizer", &["tokenizer."]),
];

/// What belongs to none of them: mostly the sizes of the architecture.
const REST: &str = "architecture";

/// A title with its keys.
type Group<'a> = (&'static str, Vec<(&'a str, &'a Value)>);

/// The groups that have keys, each in the file's order.
pub(super) fn of(metadata: &[(String, Value)]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = GROUPS.iter().map(|(title, _)| (*title, Vec::new())).collect();
    // The sizes are shown before the tokenizer.
    let rest = groups.len() - 1;
    groups.insert(rest, (REST, Vec::new()));
    for (key, value) in metadata {
        let title = GROUPS
            .iter()
            .find(|(_, starts)| starts.iter().any(|start| key.starts_with(start)))
            .map_or(REST, |(title, _)| *title);
        if let Some((_, keys)) = groups.iter_mut().find(|(own, _)| *own == title) {
            keys.push((key, value));
        }
    }
    groups.retain(|(_, keys)| !keys.is_empty());
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_in_one_group() {
        let keys = [
            "llama.block_count",
            "general.name",
            "tokenizer.ggml.model",
            "pipit.version",
            "quantize.imatrix.file",
            "odd",
        ];
        let metadata: Vec<_> = keys.iter().map(|key| (key.to_string(), Value::U32(1))).collect();
        let groups: Vec<_> = of(&metadata)
            .into_iter()
            .map(|(title, keys)| (title, keys.into_iter().map(|(key, _)| key).collect::<Vec<_>>()))
            .collect();
        assert_eq!(
            groups,
            [
                ("model", vec!["general.name"]),
                ("made of", vec!["pipit.version"]),
                ("importance matrix", vec!["quantize.imatrix.file"]),
                ("architecture", vec!["llama.block_count", "odd"]),
                ("tokenizer", vec!["tokenizer.ggml.model"]),
            ]
        );
    }
}
