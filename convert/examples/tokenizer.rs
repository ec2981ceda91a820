//! The tokenizer alone: of a GGUF file as a folder, of a checkpoint folder as a GGUF file without tensors (proved), and
//! the identifiers that llama.cpp gives for texts.
//!
//! `cargo run -p pipit-convert --example tokenizer -- MODEL.gguf FOLDER`, or `-- FOLDER VOCABULARY.gguf`, or
//! `-- MODEL.gguf TEXTS.json` (a list of texts; a list of lists of numbers on stdout).
//! The scripts in tests/references compare all of it with what transformers and convert_hf_to_gguf.py make of them.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use llama_cpp_2::model::params::LlamaModelParams;
use pipit_convert::checkpoint::read_json_object;
use pipit_convert::gguf::{Gguf, Header, Writer};
use pipit_convert::llama_cpp;
use pipit_convert::vocab::Vocab;

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (from, to) = args.next().zip(args.next()).context("give two paths")?;
    if from.is_dir() {
        write_gguf(&from, &to)
    } else if to.extension().is_some_and(|extension| extension == "json") {
        print_ids(&from, &to)
    } else {
        write_folder(&from, &to)
    }
}

fn write_gguf(from: &Path, to: &Path) -> anyhow::Result<()> {
    let config = read_json_object(&from.join("config.json")).unwrap_or_default();
    let started = Instant::now();
    let mut vocab = Vocab::from_folder(from, &config)?;
    eprintln!("read in {:.3} s", started.elapsed().as_secs_f64());
    let started = Instant::now();
    let proof = vocab.prove(from, "tokenizer");
    let seconds = started.elapsed().as_secs_f64();
    let mut metadata = vec![("general.architecture".to_owned(), "llama".into())];
    metadata.extend(vocab.to_metadata());
    match proof {
        Ok(proof) => {
            println!(
                "{}: proved on {} texts in {seconds:.3} s",
                vocab.model.pre(),
                proof.texts
            );
            metadata.extend(proof.to_metadata());
        }
        Err(error) => println!("{}: not proved: {error}", vocab.model.pre()),
    }
    let header = Header {
        metadata,
        tensors: Vec::new(),
    };
    Writer::new(BufWriter::new(File::create(to)?), &header)?
        .finish()?
        .flush()?;
    Ok(())
}

fn write_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    for (name, text) in Vocab::from_gguf(&Gguf::open(from)?)?.to_folder(2048) {
        let path = to.join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(to))?;
        std::fs::write(path, text)?;
    }
    Ok(())
}

fn print_ids(gguf: &Path, texts: &Path) -> anyhow::Result<()> {
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(texts)?)?;
    let model = llama_cpp::load(gguf, &LlamaModelParams::default().with_vocab_only(true))?;
    let ids: Vec<Vec<i32>> = texts
        .iter()
        .map(|text| {
            let tokens = model.vocab().tokenize(text.as_bytes(), false, true);
            tokens.iter().map(|token| token.0).collect()
        })
        .collect();
    println!("{}", serde_json::to_string(&ids)?);
    Ok(())
}
