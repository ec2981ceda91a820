//! A PEFT adapter folder: adapter_config.json and adapter_model.safetensors.
#![no_main]

use std::cell::OnceCell;

use libfuzzer_sys::fuzz_target;
use pipit_convert::adapter::PeftAdapter;
use pipit_convert_fuzz::{Folder, two};

thread_local!(static FOLDER: OnceCell<Folder> = const { OnceCell::new() });

fuzz_target!(|data: &[u8]| {
    let (config, weights) = two(data);
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(Folder::new);
        folder.put("adapter_config.json", config);
        folder.put("adapter_model.safetensors", weights);
        let _ = PeftAdapter::open(folder.path());
    });
});
