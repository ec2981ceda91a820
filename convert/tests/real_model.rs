//! SmolLM2-135M-Instruct through `import` and `model`: nothing is lost on the way, and the tokens stay.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::path::Path;

use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use pipit_convert::gguf::{Gguf, TensorType};
use pipit_convert::import::import;
use pipit_convert::progress::Silent;
use pipit_convert::quantize::dequantize;
use support::{convert, floats, smollm2};
use tokenizers::Tokenizer;

const TEXTS: &[&str] = &[
    "Zet het licht in de keuken aan",
    "Allume la lumière dans la cuisine, s'il te plaît.",
    "Schalte das Licht in der Küche ein! Größe: 12,5 m²",
    "<|im_start|>user\nTurn on the light<|im_end|>\n<|im_start|>assistant\n",
    "👩‍👩‍👧‍👦 🇳🇱 🎉🎉",
    "a  b   c    d\t\te\n\n\nf \n g  ",
    "3.14159 1234567890 1,000,000 ½ ² Ⅷ ٣",
    "it's I'LL we've 's'S",
    "日本語のテキスト 한국어 עברית",
    "\u{a0}x\u{2003}y\u{3000}z\u{200b}",
    "<|im_end|",
    " <|im_end|> ",
    "<|im_start|><|endoftext|>x<repo_name>",
    "",
    " ",
    "\n",
    "e\u{301}",
];

fn llama_cpp_tokens(backend: &LlamaBackend, model: &Path) -> Vec<Vec<u32>> {
    let model = LlamaModel::load_from_file(backend, model, &LlamaModelParams::default()).unwrap();
    let ids = |text: &&str| model.vocab().tokenize(text.as_bytes(), false, true);
    TEXTS
        .iter()
        .map(|text| ids(text).iter().map(|token| token.0 as u32).collect())
        .collect()
}

#[test]
fn smollm2_survives_the_way_to_a_checkpoint_and_back() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("smollm2");
    let original = Gguf::open(&smollm2()).unwrap();
    let done = import(&original, &folder, TensorType::F32, &Silent).unwrap();
    assert_eq!(done.parameters, 134_515_008);
    let path = scratch.path().join("f32.gguf");
    let back = convert(&folder, &[], TensorType::F32, &path).unwrap();

    assert_eq!(back.tensors().len(), original.tensors().len());
    for tensor in original.tensors() {
        let mut values = vec![0.0; tensor.elements() as usize];
        dequantize(
            tensor.kind,
            original.data(tensor),
            tensor.row_elements() as usize,
            &mut values,
        )
        .unwrap();
        assert!(values == floats(&back, &tensor.name), "{} changed", tensor.name);
    }
    for (key, value) in original.metadata() {
        let kept = key.starts_with("llama.")
            || key.starts_with("tokenizer.")
            || ["general.name", "general.license"].contains(&key.as_str());
        if kept {
            assert_eq!(back.get(key), Some(value), "{key}");
        }
    }

    let backend = pipit_convert::llama_cpp::backend().unwrap();
    let theirs = llama_cpp_tokens(backend, &smollm2());
    assert_eq!(llama_cpp_tokens(backend, &path), theirs);
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    for (text, theirs) in TEXTS.iter().zip(theirs) {
        assert_eq!(
            tokenizer.encode(*text, true).unwrap().get_ids(),
            theirs,
            "{text:?}"
        );
    }
}

#[test]
fn gemma_3_survives_the_way_to_a_checkpoint_and_back() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("gemma");
    let original = Gguf::open(&support::gemma3()).unwrap();
    let done = import(&original, &folder, TensorType::F32, &Silent).unwrap();
    assert_eq!(done.parameters, 268_098_176);
    let file = scratch.path().join("f32.gguf");
    let back = support::architectures::convert(&folder, TensorType::F32, &file).unwrap();
    assert_eq!(back.tensors().len(), original.tensors().len());
    for tensor in original.tensors() {
        // A row at a time: the embeddings alone are 640 MiB.
        let columns = tensor.row_elements() as usize;
        let bytes = tensor.kind.row_bytes(columns as u64).unwrap() as usize;
        let mut values = vec![0.0; columns];
        let rows = original.data(tensor).chunks_exact(bytes);
        let other = back.tensor(&tensor.name).unwrap();
        for (row, other) in rows.zip(back.data(other).chunks_exact(4 * columns)) {
            dequantize(tensor.kind, row, columns, &mut values).unwrap();
            let same = values
                .iter()
                .zip(other.as_chunks::<4>().0)
                .all(|(a, b)| a.to_le_bytes() == *b);
            assert!(same, "{} changed", tensor.name);
        }
    }
    for (key, value) in original
        .metadata()
        .iter()
        .filter(|(key, _)| key.starts_with("gemma3."))
    {
        assert_eq!(back.get(key), Some(value), "{key}");
    }
}
