//! The strict JSON reader: what it takes, serde_json takes, and no key stands twice in what is left.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    if let Ok(value) = pipit_convert::json::from_slice::<Value>(data) {
        assert_eq!(serde_json::from_slice::<Value>(data).unwrap(), value);
        let again = value.to_string();
        assert_eq!(pipit_convert::json::from_slice::<Value>(again.as_bytes()).unwrap(), value);
    }
});
