//! A GGUF file: its header, its tensors, and the configuration and the vocabulary that are made of its keys.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipit_convert::gguf::Gguf;
use pipit_convert::{arch, vocab::Vocab};

fuzz_target!(|data: &[u8]| {
    let Ok(gguf) = Gguf::from_bytes(data.to_vec()) else {
        return;
    };
    for tensor in gguf.tensors() {
        assert_eq!(gguf.data(tensor).len() as u64, tensor.size);
    }
    if let Ok(arch) = gguf.string("general.architecture").map_err(drop).and_then(|name| arch::of_gguf(name).map_err(drop))
        && let Ok(config) = (arch.config)(&gguf)
    {
        let _ = (arch.tensors)(&config);
    }
    let _ = Vocab::from_gguf(&gguf);
});
