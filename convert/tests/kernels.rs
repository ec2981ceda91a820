//! ggml's kernels: the bits that they have without contraction, and what would make them abort.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pipit_convert::gguf::TensorType;
use pipit_convert::quantize::{QuantizeError, is_target, quantize};
use proptest::prelude::*;
use sha2::{Digest, Sha256};

const COLUMNS: usize = 1024;

fn fixture(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantize");
    folder.join(name)
}

/// A weight for each column, as in make_quantized_rows.py.
fn importance() -> Vec<f32> {
    let exponents = (0..COLUMNS).map(|column| (column * 7 % 11) as i32 - 5);
    exponents.map(|exponent| 2.0f32.powi(exponent)).collect()
}

/// The golden sums come from kernels that were compiled with -ffp-contract=off. With `-mfma -ffp-contract=fast`, 22 of
/// them are others (references/make_quantized_rows.py shows which), so this fails if .cargo/config.toml is not heeded
/// on a machine whose compiler fuses.
#[test]
fn the_kernels_are_compiled_without_contraction() {
    let bytes = std::fs::read(fixture("rows.bf16")).unwrap();
    let rows: Vec<f32> = bytes
        .chunks_exact(2)
        .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
        .collect();
    let golden = std::fs::read(fixture("contraction-off.json")).unwrap();
    let golden: BTreeMap<String, String> = serde_json::from_slice(&golden).unwrap();
    assert!(golden.len() > 50);
    // The tables of IQ1 and IQ2 take seconds to build; the script checks them too.
    let quick = |name: &str| !name.starts_with("IQ1") && !name.starts_with("IQ2");
    for (name, sum) in golden.into_iter().filter(|(name, _)| quick(name)) {
        let (kind, weights) = match name.strip_suffix(" with importance") {
            Some(kind) => (kind, Some(importance())),
            None => (name.as_str(), None),
        };
        let kind = TensorType::from_name(kind).unwrap();
        let mut blocks = Vec::new();
        quantize(kind, &rows, COLUMNS, weights.as_deref(), &mut blocks).unwrap();
        let ours: String = Sha256::digest(&blocks)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(ours, sum, "{name}");
    }
}

/// Magnitudes from nothing to more than any block holds.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -1.0f32..1.0,
        1 => Just(0.0f32),
        1 => (-40.0f32..40.0).prop_map(|e| e.exp2()),
        1 => (-149.0f32..-100.0).prop_map(|e| -e.exp2()),
        1 => any::<f32>(),
    ]
}

fn weight() -> impl Strategy<Value = f32> {
    prop_oneof![4 => 0.0f32..10.0, 1 => Just(0.0f32), 1 => (-140.0f32..120.0).prop_map(|e| e.exp2())]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// An assert in a kernel ends the process, and with it this test.
    #[test]
    fn no_numbers_make_a_kernel_abort(
        rows in proptest::collection::vec(value(), 512),
        scale in prop_oneof![3 => Just(1.0f32), 1 => Just(0.0f32), 1 => (-120.0f32..120.0).prop_map(|e| e.exp2())],
        weights in proptest::collection::vec(weight(), 512),
        zero_weights: bool,
    ) {
        let finite = |value: &f32| value.is_finite();
        let rows: Vec<f32> = rows.iter().map(|value| value * scale).map(|v| if finite(&v) { v } else { 1.0 }).collect();
        let weights: Vec<f32> = weights.iter().map(|w| if zero_weights { 0.0 } else { *w }).collect();
        for kind in TensorType::ALL.iter().copied().filter(|kind| is_target(*kind)) {
            for weights in [None, Some(&weights[..])] {
                let mut blocks = Vec::new();
                match quantize(kind, &rows, 512, weights, &mut blocks) {
                    Ok(()) => prop_assert_eq!(blocks.len() as u64, kind.row_bytes(512).unwrap()),
                    Err(QuantizeError::Overflow { .. } | QuantizeError::Importance { .. }) => {}
                    Err(QuantizeError::NeedsImatrix { .. }) => prop_assert!(weights.is_none()),
                    Err(e) => return Err(TestCaseError::fail(e.to_string())),
                }
            }
        }
    }
}
