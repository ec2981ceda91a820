//! config.json to the rules of its architecture: tensors, extra tensors, keys.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipit_convert::{arch, json};
use serde_json::{Map, Value};

fuzz_target!(|data: &[u8]| {
    let Ok(config) = json::from_slice::<Map<String, Value>>(data) else {
        return;
    };
    // Two billion layers are a valid promise, and one that no shard keeps.
    let layers = config.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0);
    let Ok(arch) = arch::of_config(&config) else {
        return;
    };
    if layers < 1000 {
        let _ = (arch.tensors)(&config);
    }
    let _ = (arch.extra_tensors)(&config);
    let _ = (arch.metadata)(&config);
});
