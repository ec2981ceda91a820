//! What a file was made of stands in it, in the card beside it, and in `inspect`.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::path::Path;
use std::process::Command;

use pipit_convert::checksum::sha256;
use pipit_convert::gguf::{Array, Gguf, Value};
use serde_json::Value as Json;
use support::{Copy, fixture, names, pipit_convert, stderr};

fn strings<'a>(gguf: &'a Gguf, key: &str) -> Vec<&'a str> {
    gguf.strings(key).unwrap().iter().map(String::as_str).collect()
}

fn convert(args: &[&str]) -> Json {
    let output = pipit_convert(&[&["model"], args, &["--json"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_file_and_its_card_say_what_they_were_made_of() {
    let copy = Copy::new();
    std::fs::create_dir(copy.file("additional_chat_templates")).unwrap();
    let template = std::fs::read(copy.file("chat_template.jinja")).unwrap();
    std::fs::write(copy.file("additional_chat_templates/rag.jinja"), template).unwrap();
    std::fs::write(copy.file("README.md"), "---\nlicense: apache-2.0\n---\n").unwrap();
    let (dir, out, adapter) = (copy.dir(), copy.beside("a.gguf"), fixture("adapters/plain"));
    let (dir, adapter) = (dir.to_str().unwrap(), adapter.to_str().unwrap());
    let adapter = format!("{adapter}=0.5");
    let report = convert(&[
        dir,
        "--adapter",
        &adapter,
        "-t",
        "q8_0",
        "-o",
        out.to_str().unwrap(),
        "-q",
    ]);
    let gguf = Gguf::open(&out).unwrap();
    assert_eq!(gguf.string("pipit.version").unwrap(), env!("CARGO_PKG_VERSION"));
    assert!(
        gguf.string("pipit.llama_cpp")
            .unwrap()
            .contains("llama-cpp-sys-2")
    );
    assert_eq!(
        strings(&gguf, "pipit.arguments"),
        ["model", "copy", "--type", "q8_0", "--adapter", "plain=0.5"]
    );
    let files = strings(&gguf, "pipit.source.files");
    assert_eq!(
        files,
        [
            "model.safetensors",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "README.md",
            "additional_chat_templates/rag.jinja",
        ]
    );
    let sums = strings(&gguf, "pipit.source.sha256");
    for (file, sum) in files.iter().zip(&sums) {
        assert_eq!(sha256(&copy.file(file)).unwrap(), *sum, "{file}");
    }
    assert_eq!(strings(&gguf, "pipit.adapter.names"), ["plain"]);
    assert_eq!(strings(&gguf, "pipit.adapter.base"), ["tied"]);
    assert_eq!(
        gguf.get("pipit.adapter.scale"),
        Some(&Value::Array(Array::F32(vec![0.5])))
    );
    let adapter_files = strings(&gguf, "pipit.adapter.files");
    for (file, sum) in adapter_files.iter().zip(strings(&gguf, "pipit.adapter.sha256")) {
        assert_eq!(sha256(&fixture("adapters").join(file)).unwrap(), sum, "{file}");
    }

    let card = std::fs::read_to_string(copy.beside("a.gguf.md")).unwrap();
    assert_eq!(report["card"].as_str(), copy.beside("a.gguf.md").to_str());
    let sum = report["files"][0]["sha256"].as_str().unwrap();
    assert_eq!(sum, sha256(&out).unwrap());
    for part in [
        &[
            "license: \"apache-2.0\"",
            sum,
            "Q8_0",
            "plain is merged, times 0.5",
        ],
        &sums[..4],
    ]
    .concat()
    {
        assert!(card.contains(part), "{part} is not in\n{card}");
    }
    // Neither file names a folder of this machine.
    let home = copy.beside("").to_str().unwrap().trim_end_matches('/').to_owned();
    let bytes = std::fs::read(&out).unwrap();
    assert!(!bytes.windows(home.len()).any(|window| window == home.as_bytes()));
    assert!(!card.contains(&home));

    let output = pipit_convert(&["inspect", out.to_str().unwrap(), "--json", "--sha256"]);
    let report: Json = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["files"][0]["sha256"], sum);
    assert_eq!(
        report["provenance"]["source.files"].as_array().unwrap().len(),
        files.len()
    );
    let output = pipit_convert(&["inspect", out.to_str().unwrap(), "--sha256"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        &["\nmade of\n", "\ntokenizer\n", sum, "bits per weight"],
        &sums[..],
    ]
    .concat()
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn the_same_inputs_give_the_same_bytes_from_any_folder_and_under_any_name() {
    let copies = [Copy::new(), Copy::new()];
    let sums = ["x.gguf", "another name.gguf"]
        .iter()
        .zip(&copies)
        .map(|(name, copy)| {
            let output = Command::new(env!("CARGO_BIN_EXE_pipit-convert"))
                .current_dir(copy.beside(""))
                .args(["model", "copy", "-o", name, "-t", "Q8_0"])
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            sha256(&copy.beside(name)).unwrap()
        });
    let sums: Vec<_> = sums.collect();
    assert_eq!(sums[0], sums[1]);
}

#[test]
fn the_card_and_the_modelfile_are_written_when_asked_for_and_replaced_only_with_force() {
    let copy = Copy::new();
    std::fs::write(copy.file("LICENSE"), "Do as you like.\n").unwrap();
    let (dir, out) = (copy.dir(), copy.beside("a.gguf"));
    let args = [dir.to_str().unwrap(), "-o", out.to_str().unwrap()];
    convert(&[&args[..], &["--no-card"]].concat());
    assert_eq!(names(&copy.beside("")), ["a.gguf", "copy"]);
    std::fs::remove_file(&out).unwrap();
    for beside in ["a.gguf.md", "a.gguf.Modelfile"] {
        std::fs::write(copy.beside(beside), "mine").unwrap();
        let output = pipit_convert(&[&["model"], &args[..], &["--modelfile"]].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(&format!("{beside} exists already")));
        assert_eq!(std::fs::read_to_string(copy.beside(beside)).unwrap(), "mine");
        std::fs::remove_file(copy.beside(beside)).unwrap();
    }
    convert(&[&args[..], &["--modelfile", "--force"]].concat());
    assert_eq!(
        names(&copy.beside("")),
        ["a.gguf", "a.gguf.Modelfile", "a.gguf.md", "copy"]
    );
    let modelfile = std::fs::read_to_string(copy.beside("a.gguf.Modelfile")).unwrap();
    for part in [
        "FROM ./a.gguf\n",
        "PARAMETER stop \"\"\"<|im_end|>\"\"\"\n",
        "LICENSE \"\"\"Do as you like.\n\"\"\"\n",
    ] {
        assert!(modelfile.contains(part), "{part} is not in\n{modelfile}");
    }
}

#[test]
fn inspect_reads_what_is_no_model() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("adapter.gguf");
    let header = pipit_convert::gguf::Header {
        metadata: vec![
            ("general.type".into(), "adapter".into()),
            ("adapter.lora.alpha".into(), Value::F32(16.0)),
            ("imatrix.chunk_count".into(), Value::U32(3)),
        ],
        tensors: Vec::new(),
    };
    write(&path, &header);
    let output = pipit_convert(&["inspect", path.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "\nadapter\n",
        "adapter.lora.alpha",
        "\nimportance matrix\n",
        "no tensors",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

fn write(path: &Path, header: &pipit_convert::gguf::Header) {
    let writer = pipit_convert::gguf::Writer::new(Vec::new(), header).unwrap();
    std::fs::write(path, writer.finish().unwrap()).unwrap();
}
