//! Our GGUF files against those of llama.cpp's convert_hf_to_gguf.py and `llama_model_quantize`, tensor by tensor and
//! key by key. The fixtures are made by tests/references/make_fixtures.py.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::ffi::CString;

use pipit_convert::adapter::PeftAdapter;
use pipit_convert::gguf::{Array, Gguf, TensorType, Value};
use pipit_convert::merge::ScaledAdapter;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use support::{convert, fixture};

const KINDS: [(TensorType, &str); 4] = [
    (TensorType::F32, "f32"),
    (TensorType::F16, "f16"),
    (TensorType::BF16, "bf16"),
    (TensorType::Q8_0, "q8_0"),
];

/// Keys that we write and convert_hf_to_gguf.py does not write for these fixtures.
const ONLY_OURS: &[&str] = &[
    // The loader's default depends on the name of the pre-tokenizer, so both are always written.
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    // Without it the loader takes any token from a list of texts, whichever its hash map yields first.
    "tokenizer.ggml.eot_token_id",
    // What the tokenizer was proved on.
    "pipit.tokenizer.proof.texts",
    "pipit.tokenizer.proof.pieces",
    "pipit.tokenizer.proof.sha256",
    // Where the file comes from.
    "pipit.version",
    "pipit.llama_cpp",
    "pipit.source.files",
    "pipit.source.sha256",
];

/// Keys that convert_hf_to_gguf.py writes and we do not.
const ONLY_THEIRS: &[&str] = &[
    // Read off the template for pairs of texts, which no language model uses; the loader's default is the same.
    "tokenizer.ggml.add_sep_token",
];

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn expected(name: &str) -> Json {
    serde_json::from_str(&std::fs::read_to_string(fixture(name).join("expected.json")).unwrap()).unwrap()
}

fn check_against_convert_hf(name: &str) {
    let expected = expected(name);
    let scratch = tempfile::tempdir().unwrap();
    for (kind, theirs) in KINDS {
        let gguf = convert(&fixture(name), &[], kind, &scratch.path().join(theirs)).unwrap();
        let ours: BTreeMap<_, _> = gguf
            .tensors()
            .iter()
            .map(|tensor| {
                let found = json!({"type": tensor.kind.name(), "dimensions": tensor.dimensions,
                    "sha256": sha256(gguf.data(tensor))});
                (tensor.name.clone(), found)
            })
            .collect();
        let theirs: BTreeMap<String, Json> =
            serde_json::from_value(expected["tensors"][theirs].clone()).unwrap();
        assert_eq!(ours, theirs, "{kind}");
    }
}

#[test]
fn tied_tensors_are_llama_cpps_bit_for_bit() {
    check_against_convert_hf("tied");
}

#[test]
fn untied_tensors_with_biases_and_scaled_frequencies_are_llama_cpps_bit_for_bit() {
    check_against_convert_hf("untied");
}

fn spelled(value: &Value) -> Json {
    let (kind, array, value) = match value {
        Value::U32(v) => ("UINT32", false, json!(v)),
        Value::I32(v) => ("INT32", false, json!(v)),
        Value::F32(v) => ("FLOAT32", false, json!(f64::from(*v))),
        Value::Bool(v) => ("BOOL", false, json!(v)),
        Value::String(v) => ("STRING", false, json!(v)),
        Value::Array(Array::String(v)) => ("STRING", true, json!(v)),
        Value::Array(Array::I32(v)) => ("INT32", true, json!(v)),
        other => panic!("a key of another type: {other:?}"),
    };
    json!({"type": kind, "array": array, "value": value})
}

#[test]
fn keys_are_those_of_convert_hf_to_gguf() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["tied", "untied"] {
        let gguf = convert(&fixture(name), &[], TensorType::Q8_0, &scratch.path().join(name)).unwrap();
        let expected = expected(name);
        let theirs = expected["keys"].as_object().unwrap();
        for (key, value) in theirs {
            match gguf.get(key) {
                Some(ours) => assert_eq!(&spelled(ours), value, "{name}: {key}"),
                None => assert!(ONLY_THEIRS.contains(&key.as_str()), "{name}: {key} is missing"),
            }
        }
        for (key, _) in gguf.metadata() {
            assert!(
                theirs.contains_key(key) || ONLY_OURS.contains(&key.as_str()),
                "{name}: {key} is new"
            );
        }
    }
}

#[test]
fn quantised_tensors_are_those_of_llama_model_quantize() {
    extern "C" fn quiet(_: u32, _: *const std::ffi::c_char, _: *mut std::ffi::c_void) {}
    // SAFETY: the callback is a function that looks at nothing.
    #[expect(unsafe_code, reason = "the reference is C")]
    unsafe {
        llama_cpp_sys_2::llama_log_set(Some(quiet), std::ptr::null_mut());
    }
    let scratch = tempfile::tempdir().unwrap();
    let f32 = scratch.path().join("f32");
    convert(&fixture("tied"), &[], TensorType::F32, &f32).unwrap();
    let path = |path: &std::path::Path| CString::new(path.to_str().unwrap()).unwrap();
    for (kind, file_type) in [
        (TensorType::F16, llama_cpp_sys_2::LLAMA_FTYPE_MOSTLY_F16),
        (TensorType::BF16, llama_cpp_sys_2::LLAMA_FTYPE_MOSTLY_BF16),
        (TensorType::Q8_0, llama_cpp_sys_2::LLAMA_FTYPE_MOSTLY_Q8_0),
    ] {
        let theirs = scratch.path().join("theirs");
        // SAFETY: both paths are C strings that outlive the call, and the parameters are the defaults but for the
        // type.
        #[expect(unsafe_code, reason = "the reference is C")]
        let failed = unsafe {
            let mut params = llama_cpp_sys_2::llama_model_quantize_default_params();
            params.ftype = file_type;
            llama_cpp_sys_2::llama_model_quantize(path(&f32).as_ptr(), path(&theirs).as_ptr(), &params)
        };
        assert_eq!(failed, 0);
        let theirs = Gguf::open(&theirs).unwrap();
        let ours = convert(&fixture("tied"), &[], kind, &scratch.path().join("ours")).unwrap();
        assert_eq!(ours.tensors().len(), theirs.tensors().len());
        for tensor in theirs.tensors() {
            let mine = ours.tensor(&tensor.name).unwrap();
            assert_eq!(
                (mine.kind, &mine.dimensions),
                (tensor.kind, &tensor.dimensions),
                "{}",
                tensor.name
            );
            assert!(
                ours.data(mine) == theirs.data(tensor),
                "{kind}: {} differs",
                tensor.name
            );
        }
    }
}

#[test]
fn a_gguf_file_converts_as_the_checkpoint_that_it_was_made_of() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, adapter) in [("tied", Some("rslora")), ("untied", None)] {
        let adapters: Vec<_> = adapter
            .iter()
            .map(|adapter| ScaledAdapter {
                adapter: PeftAdapter::open(&fixture("adapters").join(adapter)).unwrap(),
                scale: 1.0,
            })
            .collect();
        let file = scratch.path().join(format!("{name}.gguf"));
        convert(&fixture(name), &[], TensorType::F32, &file).unwrap();
        let direct = convert(
            &fixture(name),
            &adapters,
            TensorType::Q8_0,
            &scratch.path().join("a"),
        )
        .unwrap();
        let through = convert(&file, &adapters, TensorType::Q8_0, &scratch.path().join("b")).unwrap();
        for tensor in direct.tensors() {
            let other = through.tensor(&tensor.name).unwrap();
            assert!(
                direct.data(tensor) == through.data(other),
                "{name}: {}",
                tensor.name
            );
        }
        let keys = |gguf: &Gguf| -> BTreeMap<_, _> {
            let of_model = gguf
                .metadata()
                .iter()
                .filter(|(key, _)| !key.starts_with("pipit."));
            of_model
                .map(|(key, value)| (key.clone(), format!("{value:?}")))
                .collect()
        };
        assert_eq!(keys(&direct), keys(&through));
    }
}
