//! Headers, whole and damaged.

use proptest::prelude::*;

use super::*;

/// A value of a header, as the tests write it.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    U32(u32),
    Text(&'static str),
    U32s(Vec<u32>),
    Bools(Vec<bool>),
    Texts(Vec<&'static str>),
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_item(out: &mut Vec<u8>, item: &Item) {
    let array = |out: &mut Vec<u8>, kind: u32, count: usize| {
        out.extend(9_u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
    };
    match item {
        Item::U32(number) => {
            out.extend(4_u32.to_le_bytes());
            out.extend(number.to_le_bytes());
        }
        Item::Text(text) => {
            out.extend(8_u32.to_le_bytes());
            put_string(out, text);
        }
        Item::U32s(numbers) => {
            array(out, 4, numbers.len());
            numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
        }
        Item::Bools(bools) => {
            array(out, 7, bools.len());
            out.extend(bools.iter().map(|&value| u8::from(value)));
        }
        Item::Texts(texts) => {
            array(out, 8, texts.len());
            texts.iter().for_each(|text| put_string(out, text));
        }
    }
}

/// A GGUF of a llama with two layers and one F32 tensor of 8 elements; `more` comes after its keys and wins over them.
pub(crate) fn gguf(more: &[(&str, Item)]) -> Vec<u8> {
    let mut items = vec![
        ("general.architecture", Item::Text("llama")),
        ("general.file_type", Item::U32(15)),
        ("llama.block_count", Item::U32(2)),
        ("llama.context_length", Item::U32(8192)),
        ("llama.embedding_length", Item::U32(64)),
        ("llama.feed_forward_length", Item::U32(128)),
        ("llama.attention.head_count", Item::U32(4)),
        ("llama.attention.head_count_kv", Item::U32(2)),
        ("tokenizer.ggml.tokens", Item::Texts(vec!["a", "b", "c"])),
    ];
    items.extend(more.iter().cloned());
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend(1_u64.to_le_bytes());
    out.extend((items.len() as u64).to_le_bytes());
    for (key, item) in &items {
        put_string(&mut out, key);
        put_item(&mut out, item);
    }
    put_string(&mut out, "w");
    out.extend(1_u32.to_le_bytes());
    out.extend(8_u64.to_le_bytes());
    out.extend(0_u32.to_le_bytes());
    out.extend(0_u64.to_le_bytes());
    out.resize(out.len().next_multiple_of(32) + 32, 0);
    out
}

/// The header of [`gguf`].
pub(crate) fn header(more: &[(&str, Item)]) -> Header {
    look(&gguf(more)).unwrap()
}

fn look(content: &[u8]) -> Result<Header, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    std::fs::write(&path, content).unwrap();
    inspect(&path)
}

#[test]
fn whole_and_cut() {
    let content = gguf(&[]);
    let header = look(&content).unwrap();
    assert_eq!(
        (header.architecture.as_str(), header.quantisation.as_str()),
        ("llama", "Q4_K_M")
    );
    for cut in 8..content.len() {
        assert!(
            matches!(look(&content[..cut]), Err(ModelError::Truncated { .. })),
            "cut at {cut}"
        );
    }
    assert!(matches!(look(b"GGML whatever"), Err(ModelError::NotGguf { .. })));
    assert!(matches!(look(b""), Err(ModelError::NotGguf { .. })));
    assert!(matches!(
        inspect(Path::new("/nonexistent.gguf")),
        Err(ModelError::Io { .. })
    ));
    assert!(matches!(inspect(Path::new("/")), Err(ModelError::Io { .. })));
}

#[test]
fn what_the_plan_needs() {
    let header = header(&[]);
    assert_eq!(
        (
            header.context_trained,
            header.embedding,
            header.vocabulary,
            header.merges
        ),
        (8192, 64, 3, 0)
    );
    assert_eq!(header.tensors.len(), 1);
    assert_eq!((header.tensors[0].bytes, header.tensors[0].dimensions()), (32, 1));
    let layer = Layer {
        k: 32,
        v: 32,
        heads: 4,
        head: 16,
        feed_forward: 128,
        ..Layer::default()
    };
    assert_eq!(header.layers.layers, [layer, layer]);
    assert_eq!(header.layers.unknown, None);
}

#[test]
fn heads_by_layer_and_own_lengths() {
    let header = header(&[
        ("llama.attention.head_count_kv", Item::U32s(vec![1, 4])),
        ("llama.attention.key_length", Item::U32(32)),
        ("llama.attention.value_length", Item::U32(8)),
    ]);
    let cached: Vec<(u64, u64)> = header
        .layers
        .layers
        .iter()
        .map(|layer| (layer.k, layer.v))
        .collect();
    assert_eq!(cached, [(32, 8), (128, 32)]);
}

fn windows(more: &[(&str, Item)]) -> Vec<Option<u64>> {
    let layers = header(more).layers.layers;
    layers.iter().map(|layer| layer.window).collect()
}

#[test]
fn windows_as_llama_cpp_lays_them() {
    let gemma = |count: u32| {
        vec![
            ("general.architecture", Item::Text("gemma3")),
            ("gemma3.block_count", Item::U32(count)),
            ("gemma3.embedding_length", Item::U32(64)),
            ("gemma3.attention.head_count", Item::U32(4)),
            ("gemma3.attention.sliding_window", Item::U32(512)),
        ]
    };
    // Every sixth layer of a Gemma 3 sees everything (src/models/gemma3.cpp).
    let (all, some) = (None, Some(512));
    assert_eq!(windows(&gemma(7)), [some, some, some, some, some, all, some]);
    let mut listed = gemma(3);
    listed.push((
        "gemma3.attention.sliding_window_pattern",
        Item::Bools(vec![true, false, true]),
    ));
    assert_eq!(windows(&listed), [some, all, some]);
    let mut numbered = gemma(3);
    numbered.push(("gemma3.attention.sliding_window_pattern", Item::U32(2)));
    assert_eq!(windows(&numbered), [some, all, some]);
    // llama.cpp's llama has no window, whatever the header says (Mistral 7B v0.1 has the key).
    assert_eq!(
        windows(&[("llama.attention.sliding_window", Item::U32(512))]),
        [all, all]
    );
}

#[test]
fn recurrent_states() {
    let lfm2 = header(&[
        ("general.architecture", Item::Text("lfm2")),
        ("lfm2.block_count", Item::U32(2)),
        ("lfm2.embedding_length", Item::U32(64)),
        ("lfm2.attention.head_count", Item::U32(4)),
        ("lfm2.attention.head_count_kv", Item::U32s(vec![0, 2])),
        ("lfm2.shortconv.l_cache", Item::U32(3)),
    ]);
    let states: Vec<(u64, u64)> = lfm2
        .layers
        .layers
        .iter()
        .map(|layer| (layer.k, layer.recurrent))
        .collect();
    assert_eq!(states, [(0, 128), (32, 0)]);
    let mamba = header(&[
        ("general.architecture", Item::Text("mamba")),
        ("mamba.block_count", Item::U32(1)),
        ("mamba.embedding_length", Item::U32(768)),
        ("mamba.attention.head_count", Item::U32(0)),
        ("mamba.ssm.conv_kernel", Item::U32(4)),
        ("mamba.ssm.inner_size", Item::U32(1536)),
        ("mamba.ssm.state_size", Item::U32(16)),
    ]);
    assert_eq!(mamba.layers.layers[0].k, 0);
    // (conv_kernel - 1) · inner_size + state_size · inner_size, llama_hparams::n_embd_r and n_embd_s.
    assert_eq!(mamba.layers.layers[0].recurrent, 3 * 1536 + 16 * 1536);
}

#[test]
fn what_is_not_known_is_said() {
    let odd = header(&[
        ("general.architecture", Item::Text("kimi-linear")),
        ("kimi-linear.block_count", Item::U32(1)),
    ]);
    assert!(odd.layers.unknown.is_some_and(|why| why.contains("kimi-linear")));
    let nothing = header(&[("general.architecture", Item::Text("other"))]);
    assert!(nothing.layers.unknown.is_some());
    let many = header(&[("llama.block_count", Item::U32(u32::MAX))]);
    assert!(many.layers.layers.is_empty() && many.layers.unknown.is_some());
}

#[test]
fn sha256_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    std::fs::write(&path, b"abc").unwrap();
    // FIPS 180-2, appendix B.1.
    assert_eq!(
        sha256(&path).unwrap(),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}

proptest! {
    #[test]
    fn damage_never_panics(at in any::<prop::sample::Index>(), bytes in proptest::collection::vec(any::<u8>(), 1..12)) {
        let mut content = gguf(&[("llama.attention.sliding_window_pattern", Item::Bools(vec![true, false]))]);
        let at = at.index(content.len() - 8) + 8;
        for (offset, byte) in bytes.iter().enumerate() {
            if let Some(place) = content.get_mut(at + offset) { *place = *byte; }
        }
        if let Ok(header) = look(&content) {
            crate::plan::tests::plan_of(&header);
        }
    }

    #[test]
    fn numbers_of_any_size_never_panic(
        architecture in prop::sample::select(vec![
            "llama", "gemma3", "gemma3n", "gemma4", "lfm2", "mamba", "falcon-h1", "rwkv7", "qwen3next", "nemotron_h",
            "llama4", "smallthinker", "exaone4", "deepseek2", "kimi-linear",
        ]),
        numbers in proptest::collection::vec(prop_oneof![0_u32..100, any::<u32>()], 22),
        lists in proptest::collection::vec(any::<u32>(), 0..4),
    ) {
        let suffixes = [
            "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
            "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window",
            "attention.sliding_window_pattern", "attention.shared_kv_layers", "nextn_predict_layers",
            "full_attention_interval", "shortconv.l_cache", "ssm.conv_kernel", "ssm.group_count", "ssm.inner_size",
            "ssm.state_size", "token_shift_count", "wkv.head_size", "vocab_size", "attention.key_length_mla",
        ];
        let keys: Vec<String> = suffixes.iter().map(|suffix| format!("{architecture}.{suffix}")).collect();
        let mut items = vec![("general.architecture", Item::Text(architecture))];
        items.extend(keys.iter().zip(&numbers).map(|(key, number)| (key.as_str(), Item::U32(*number))));
        items.push((keys[5].as_str(), Item::U32s(lists)));
        if let Ok(header) = look(&gguf(&items)) {
            crate::plan::tests::plan_of(&header);
        }
    }
}
