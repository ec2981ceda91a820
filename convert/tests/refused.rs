//! What a checkpoint may not bring is refused by name, and nothing is written.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::fs::{remove_file, rename, write};
use std::os::unix::fs::symlink;

use serde_json::json;
use support::{Copy, safetensors};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[test]
fn pickled_weights_are_named_and_the_way_out_too() {
    for file in ["pytorch_model.bin", "consolidated.00.pth", "model.pt"] {
        let copy = Copy::new();
        rename(copy.file(WEIGHTS), copy.file(file)).unwrap();
        write(copy.file("training_args.bin"), "").unwrap();
        copy.refused(&[file, "a pickle", "hint:", "save_pretrained"]);
    }
    // Beside safetensors they are nobody's business.
    let copy = Copy::new();
    write(copy.file("pytorch_model.bin"), "").unwrap();
    copy.accepted();
}

#[test]
fn code_that_comes_with_a_checkpoint_is_never_run_nor_ignored() {
    for file in ["config.json", "tokenizer_config.json"] {
        let copy = Copy::new();
        copy.edit(file, |json| {
            json["auto_map"] = json!({"AutoModel": "modeling.Mine"})
        });
        copy.refused(&[file, "`auto_map`", "Python code", "hint:"]);
        copy.edit(file, |json| json["auto_map"] = json!({}));
        copy.accepted();
        copy.edit(file, |json| json["trust_remote_code"] = json!(true));
        remove_file(copy.beside("out.gguf")).unwrap();
        copy.refused(&[file, "`trust_remote_code`"]);
    }
}

#[test]
fn an_index_that_leaves_the_folder_is_refused() {
    for name in [
        "../model.safetensors",
        "/etc/hostname",
        "sub/model.safetensors",
        "..",
        "",
        "./model.safetensors",
        "model.safetensors/",
        "..\\model.safetensors",
    ] {
        let copy = Copy::new();
        let index = json!({"weight_map": {"model.norm.weight": name}});
        write(copy.file(INDEX), index.to_string()).unwrap();
        copy.refused(&[INDEX, "model.norm.weight", "leaves the folder"]);
    }
    let copy = Copy::new();
    write(
        copy.file(INDEX),
        r#"{"weight_map": {"model.norm.weight": "a.bin"}}"#,
    )
    .unwrap();
    copy.refused(&["a.bin", "no safetensors file"]);
}

#[test]
fn an_index_and_its_shards_must_agree() {
    let copy = Copy::new();
    let bytes = std::fs::read(copy.file(WEIGHTS)).unwrap();
    let (header, _) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let text = std::str::from_utf8(&bytes[8..8 + header]).unwrap();
    let header: serde_json::Map<_, _> = serde_json::from_str(text).unwrap();
    let mut map: serde_json::Map<_, _> = header
        .keys()
        .filter(|name| *name != "__metadata__")
        .map(|name| (name.clone(), json!(WEIGHTS)))
        .collect();
    let index = |map: &serde_json::Map<String, serde_json::Value>| {
        write(
            copy.file(INDEX),
            json!({"metadata": {}, "weight_map": map}).to_string(),
        )
        .unwrap();
    };
    index(&map);
    copy.accepted();
    remove_file(copy.beside("out.gguf")).unwrap();
    map.insert("model.extra.weight".into(), json!(WEIGHTS));
    index(&map);
    copy.refused(&[INDEX, "model.extra.weight", "is not in model.safetensors"]);
    map.remove("model.extra.weight");
    map.remove("model.norm.weight");
    index(&map);
    copy.refused(&[INDEX, "model.norm.weight", "the index does not name it"]);
    map.insert(
        "model.norm.weight".into(),
        json!("model-00002-of-00002.safetensors"),
    );
    index(&map);
    copy.refused(&["the shard model-00002-of-00002.safetensors is not there", "hint:"]);
    let second = safetensors(
        r#"{"model.norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        &[0; 4],
    );
    write(copy.file("model-00002-of-00002.safetensors"), second).unwrap();
    copy.refused(&["model.norm.weight", "stands in two shards"]);
}

#[test]
fn links_that_leave_the_folder_are_refused_and_those_of_the_hub_cache_are_followed() {
    let copy = Copy::new();
    rename(copy.file(WEIGHTS), copy.file("weights")).unwrap();
    symlink("weights", copy.file(WEIGHTS)).unwrap();
    symlink("nowhere", copy.file("dangling")).unwrap();
    copy.accepted();

    let copy = Copy::new();
    let elsewhere = tempfile::tempdir().unwrap();
    for file in [WEIGHTS, "tokenizer.json", "LICENSE"] {
        let target = elsewhere.path().join(file);
        if copy.file(file).exists() {
            rename(copy.file(file), &target).unwrap();
        } else {
            write(&target, "secret").unwrap();
        }
        symlink(&target, copy.file(file)).unwrap();
        copy.refused(&[file, "is a link to", "outside of its folder", "hint: copy"]);
        remove_file(copy.file(file)).unwrap();
        rename(&target, copy.file(file)).unwrap();
    }

    remove_file(copy.file("LICENSE")).unwrap();

    // models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/SHA256
    let hub = tempfile::tempdir().unwrap();
    let model = hub.path().join("models--org--name");
    let (snapshot, blobs) = (model.join("snapshots/0123abcd"), model.join("blobs"));
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir(&blobs).unwrap();
    for (at, entry) in std::fs::read_dir(copy.dir()).unwrap().enumerate() {
        let entry = entry.unwrap();
        rename(entry.path(), blobs.join(at.to_string())).unwrap();
        symlink(format!("../../blobs/{at}"), snapshot.join(entry.file_name())).unwrap();
    }
    let out = hub.path().join("out.gguf");
    support::convert(&snapshot, &[], pipit_convert::gguf::TensorType::F16, &out).unwrap();
    // The same folder may not link to anything else.
    write(hub.path().join("secret"), "").unwrap();
    symlink(hub.path().join("secret"), snapshot.join("LICENSE")).unwrap();
    let error = support::convert(&snapshot, &[], pipit_convert::gguf::TensorType::F16, &out).unwrap_err();
    assert!(error.to_string().contains("outside of its folder"), "{error}");
}

#[test]
fn keys_that_stand_twice_are_refused_in_every_json_file() {
    for (file, from, to) in [
        ("config.json", "\"head_dim\"", "\"hidden_size\": 64, \"head_dim\""),
        (
            "generation_config.json",
            "\"transformers_version\"",
            "\"eos_token_id\": 1, \"transformers_version\"",
        ),
        ("tokenizer_config.json", "{", "{\"eos_token\": \"x\","),
        ("tokenizer.json", "\"merges\"", "\"vocab\": {}, \"merges\""),
    ] {
        let copy = Copy::new();
        copy.replace(file, from, to);
        copy.refused(&[file, "stands twice", "line "]);
    }
    let copy = Copy::new();
    write(copy.file(INDEX), r#"{"weight_map": {"a": "x", "a": "y"}}"#).unwrap();
    copy.refused(&[INDEX, "\"a\" stands twice"]);
    let copy = Copy::new();
    let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    write(
        copy.file(WEIGHTS),
        safetensors(&format!(r#"{{"a":{entry},"a":{entry}}}"#), &[0; 4]),
    )
    .unwrap();
    copy.refused(&[WEIGHTS, "its header", "\"a\" stands twice"]);
}

#[test]
fn json_without_end_or_bottom_is_refused() {
    let copy = Copy::new();
    write(copy.file("config.json"), "[".repeat(100_000)).unwrap();
    copy.refused(&["config.json", "recursion limit"]);
    let copy = Copy::new();
    let file = std::fs::File::create(copy.file("tokenizer.json")).unwrap();
    file.set_len(300 << 20).unwrap();
    copy.refused(&["tokenizer.json", "256 MiB"]);
}

#[test]
fn headers_of_safetensors_files_are_not_believed() {
    let header = |header: &str, data: usize, parts: &[&str]| {
        let copy = Copy::new();
        write(copy.file(WEIGHTS), safetensors(header, &vec![0; data])).unwrap();
        copy.refused(&[&[WEIGHTS], parts].concat());
    };
    let f32s = |shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    // Out of the file, a hole, an overlap, a size that is not the shape's, a range that runs backwards.
    header(&format!(r#"{{"a":{}}}"#, f32s("[2]", 0, 8)), 4, &["truncated"]);
    header(&format!(r#"{{"a":{}}}"#, f32s("[1]", 4, 8)), 8, &["a"]);
    header(
        &format!(r#"{{"a":{},"b":{}}}"#, f32s("[2]", 0, 8), f32s("[2]", 4, 12)),
        12,
        &["b"],
    );
    header(&format!(r#"{{"a":{}}}"#, f32s("[3]", 0, 8)), 8, &["no valid"]);
    header(&format!(r#"{{"a":{}}}"#, f32s("[0]", 8, 0)), 8, &["no valid"]);
    // Shapes whose product or bytes leave 64 bits, or whose sides leave 32.
    header(
        &format!(r#"{{"a":{}}}"#, f32s("[4294967296,4294967296]", 0, 0)),
        0,
        &["no valid"],
    );
    header(
        &format!(r#"{{"a":{}}}"#, f32s("[9223372036854775807]", 0, 4)),
        4,
        &["no valid"],
    );
    header(
        &format!(r#"{{"a":{}}}"#, f32s("[0,4294967296]", 0, 0)),
        0,
        &["a has the shape [0, 4294967296]"],
    );
    header(
        r#"{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}"#,
        4,
        &["F33"],
    );
    // A header of more than 100 MB, without a file of that size.
    let copy = Copy::new();
    let file = std::fs::File::create(copy.file(WEIGHTS)).unwrap();
    std::io::Write::write_all(&mut &file, &(200_000_000u64).to_le_bytes()).unwrap();
    file.set_len(300_000_000).unwrap();
    copy.refused(&[WEIGHTS, "no valid safetensors", "header too large"]);
}

#[test]
fn weights_of_other_types_are_named_with_their_type() {
    for (kind, size) in [("I64", 8), ("F64", 8), ("U8", 1), ("BOOL", 1), ("I8", 1)] {
        let copy = Copy::new();
        let bytes = std::fs::read(copy.file(WEIGHTS)).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let norm = vec![0u8; 32 * size];
        let kinds = [
            ("I64", safetensors::Dtype::I64),
            ("F64", safetensors::Dtype::F64),
            ("U8", safetensors::Dtype::U8),
            ("BOOL", safetensors::Dtype::BOOL),
            ("I8", safetensors::Dtype::I8),
        ];
        let dtype = kinds.iter().find(|(name, _)| *name == kind).unwrap().1;
        let views = tensors.tensors().into_iter().map(|(name, view)| {
            if name == "model.norm.weight" {
                let view = safetensors::tensor::TensorView::new(dtype, vec![32], &norm).unwrap();
                return (name, view);
            }
            (name, view)
        });
        let bytes = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
        write(copy.file(WEIGHTS), bytes).unwrap();
        copy.refused(&["model.norm.weight", kind, "are read", "hint:"]);
    }
}

#[test]
fn adapters_are_read_as_strictly() {
    let plain = support::fixture("adapters/plain");
    let base = support::fixture("tied");
    let refused = |spoil: &dyn Fn(&std::path::Path), parts: &[&str]| {
        let scratch = tempfile::tempdir().unwrap();
        let (dir, out) = (scratch.path().join("run"), scratch.path().join("out.gguf"));
        std::fs::create_dir(&dir).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(plain.join(file), dir.join(file)).unwrap();
        }
        spoil(&dir);
        let paths = [&base, &dir, &out].map(|path| path.to_str().unwrap());
        let args = ["model", paths[0], "--adapter", paths[1], "-o", paths[2]];
        let output = support::pipit_convert(&args);
        let message = support::stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message}");
        }
        assert_eq!(support::names(scratch.path()), ["run"]);
    };
    refused(
        &|dir| {
            let path = dir.join("adapter_config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            write(path, text.replacen('{', "{\"r\": 2,", 1)).unwrap();
        },
        &["adapter_config.json", "\"r\" stands twice"],
    );
    refused(
        &|dir| {
            rename(
                dir.join("adapter_model.safetensors"),
                dir.join("adapter_model.bin"),
            )
            .unwrap();
        },
        &["adapter_model.bin", "a pickle"],
    );
    refused(
        &|dir| {
            remove_file(dir.join("adapter_model.safetensors")).unwrap();
            let target = plain.join("adapter_model.safetensors");
            symlink(target, dir.join("adapter_model.safetensors")).unwrap();
        },
        &["is a link to", "outside of its folder"],
    );
    refused(
        &|dir| {
            let path = dir.join("adapter_model.safetensors");
            let mut bytes = std::fs::read(&path).unwrap();
            let n = bytes.len();
            bytes[n - 4..].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
            write(path, bytes).unwrap();
        },
        &["NaN or infinity"],
    );
}
