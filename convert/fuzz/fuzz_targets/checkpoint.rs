//! A checkpoint folder: an index or a quantised configuration, and a safetensors file.
#![no_main]

use std::cell::OnceCell;

use libfuzzer_sys::fuzz_target;
use pipit_convert::checkpoint::Checkpoint;
use pipit_convert_fuzz::{Folder, two};

thread_local!(static FOLDER: OnceCell<Folder> = const { OnceCell::new() });

fuzz_target!(|data: &[u8]| {
    let (config, weights) = two(data);
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(Folder::new);
        folder.put("config.json", config);
        folder.put("model.safetensors", weights);
        let index = folder.path().join("model.safetensors.index.json");
        let _ = std::fs::remove_file(&index);
        if config.windows(12).any(|window| window == b"\"weight_map\"") {
            std::fs::copy(folder.path().join("config.json"), index).expect("a file in memory");
        }
        let Ok(checkpoint) = Checkpoint::open(folder.path()) else {
            return;
        };
        for name in checkpoint.names() {
            if let Ok(tensor) = checkpoint.tensor(name)
                && tensor.elements() < 1 << 16
            {
                let values = tensor.to_f32().expect("the type was checked");
                assert_eq!(values.len(), tensor.elements());
            }
        }
    });
});
