//! tokenizer.json and tokenizer_config.json to a vocabulary.
#![no_main]

use std::cell::OnceCell;

use libfuzzer_sys::fuzz_target;
use pipit_convert::vocab::Vocab;
use pipit_convert_fuzz::{Folder, two};

thread_local!(static FOLDER: OnceCell<Folder> = const { OnceCell::new() });

fuzz_target!(|data: &[u8]| {
    let (config, tokenizer) = two(data);
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(Folder::new);
        folder.put("tokenizer_config.json", config);
        folder.put("tokenizer.json", tokenizer);
        let config = serde_json::json!({"vocab_size": 400, "eos_token_id": 2});
        if let Ok(vocab) = Vocab::from_folder(folder.path(), config.as_object().expect("an object")) {
            assert_eq!(vocab.tokens.len(), 400);
            let _ = vocab.to_metadata();
        }
    });
});
