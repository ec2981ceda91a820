//! The tokenizer alone: of a GGUF file as a folder, of a checkpoint folder as a GGUF file without tensors.
//!
//! `cargo run -p pipit-convert --example tokenizer -- MODEL.gguf FOLDER`, or `-- FOLDER VOCABULARY.gguf`.
//! The scripts in tests/references compare both with what transformers and llama.cpp make of them.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::Context;
use pipit_convert::checkpoint::read_json_object;
use pipit_convert::gguf::{Gguf, Header, Writer};
use pipit_convert::vocab::Vocab;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (from, to) = args
        .next()
        .zip(args.next())
        .context("give a GGUF file and a folder, or a folder and a GGUF file")?;
    if from.is_dir() {
        let config = read_json_object(&from.join("config.json"))?;
        let mut metadata = vec![("general.architecture".to_owned(), "llama".into())];
        metadata.extend(Vocab::from_folder(&from, &config)?.to_metadata());
        let header = Header {
            metadata,
            tensors: Vec::new(),
        };
        let file = BufWriter::new(File::create(&to)?);
        Writer::new(file, &header)?.finish()?.flush()?;
    } else {
        for (name, text) in Vocab::from_gguf(&Gguf::open(&from)?)?.to_folder(2048) {
            let path = to.join(name);
            std::fs::create_dir_all(path.parent().unwrap_or(&to))?;
            std::fs::write(path, text)?;
        }
    }
    Ok(())
}
