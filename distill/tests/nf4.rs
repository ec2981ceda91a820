//! NF4 against bitsandbytes: fixtures made by references/nf4.py.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use pipit_distill::model::QuantizedRows as _;
use pipit_distill::model::quantized::{Nf4, Scales, dynamic_map};
use safetensors::SafeTensors;

const CASES: [&str; 9] = [
    "codes_and_borders",
    "rows_inside_blocks",
    "odd",
    "one",
    "three",
    "a_zero_block",
    "all_zero",
    "tiny",
    "nested",
];

fn fixture() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/nf4.safetensors")).unwrap()
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let (chunks, rest) = file.tensor(name).unwrap().data().as_chunks::<4>();
    assert!(rest.is_empty());
    chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn quantize(file: &SafeTensors<'_>, case: &str, double_quant: bool) -> Nf4 {
    let input = file.tensor(&format!("{case}.input")).unwrap();
    let &[rows, columns] = input.shape() else {
        panic!("{case} is no matrix")
    };
    let values = floats(file, &format!("{case}.input"));
    Nf4::quantize(case.to_owned(), &values, [rows, columns], double_quant)
}

fn dequantize(matrix: &Nf4) -> Vec<f32> {
    let [rows, columns] = matrix.dims();
    let mut out = vec![f32::NAN; rows * columns];
    matrix.dequantize(0..rows, &mut out);
    out
}

fn assert_close(ours: &[f32], theirs: &[f32], case: &str) {
    assert_eq!(ours.len(), theirs.len(), "{case}");
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!(
            (a - b).abs() <= 1e-7 * b.abs().max(1.0),
            "{case}, element {i}: {a}, bitsandbytes {b}"
        );
    }
}

#[test]
fn codes_and_scales_are_those_of_bitsandbytes_bit_for_bit() {
    let bytes = fixture();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for case in CASES {
        let matrix = quantize(&file, case, false);
        assert_eq!(
            matrix.packed(),
            file.tensor(&format!("{case}.packed")).unwrap().data(),
            "{case}"
        );
        let Scales::Plain(absmax) = matrix.scales() else {
            panic!("{case} is nested")
        };
        assert_eq!(
            bits(absmax),
            bits(&floats(&file, &format!("{case}.absmax"))),
            "{case}"
        );
        assert_close(
            &dequantize(&matrix),
            &floats(&file, &format!("{case}.dequantized")),
            case,
        );
    }
}

#[test]
fn doubly_quantised_scales_are_those_of_bitsandbytes_bit_for_bit() {
    let bytes = fixture();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(bits(dynamic_map()), bits(&floats(&file, "dynamic_map")));
    for case in CASES {
        let matrix = quantize(&file, case, true);
        assert_eq!(
            matrix.packed(),
            file.tensor(&format!("{case}.packed")).unwrap().data(),
            "{case}"
        );
        let Scales::Double {
            codes,
            nested,
            offset,
        } = matrix.scales()
        else {
            panic!("{case} is not nested")
        };
        let theirs = |what: &str| floats(&file, &format!("{case}.double.{what}"));
        assert_eq!(offset.to_bits(), theirs("offset")[0].to_bits(), "{case}");
        assert_eq!(bits(nested), bits(&theirs("nested_absmax")), "{case}");
        assert_eq!(
            codes,
            file.tensor(&format!("{case}.double.absmax")).unwrap().data(),
            "{case}"
        );
        assert_close(&dequantize(&matrix), &theirs("dequantized"), case);
    }
}

#[test]
fn double_quantisation_takes_four_and_an_eighth_bits_a_weight() {
    let values: Vec<f32> = (0..512 * 512).map(|i| (i as f32).sin()).collect();
    let bits = |double| {
        let matrix = Nf4::quantize("w".into(), &values, [512, 512], double);
        matrix.bytes() as f64 * 8.0 / values.len() as f64
    };
    assert!((bits(false) - 4.5).abs() < 1e-3, "{}", bits(false));
    assert!((bits(true) - 4.127).abs() < 1e-3, "{}", bits(true));
}
