//! The types of large models' tensors are those of llama.cpp's own snapshots (its tests/snapshots, copied to
//! fixtures/selection; MIT). A snapshot lists, for every mix, the tensors that do not get the mix's own type.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::path::Path;

use pipit_convert::gguf::TensorType;
use pipit_convert::quantize::{Candidate, FileType, ModelFacts, Recipe};

/// Everything that the snapshot's second line and the model's architecture say.
struct Model {
    snapshot: &'static str,
    arch: &'static str,
    hidden: u64,
    feed_forward: u64,
    vocabulary: u64,
    layers: usize,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    tied: bool,
}

const MODELS: &[Model] = &[
    Model {
        snapshot: "qwen3-0.6b",
        arch: "qwen3",
        hidden: 1024,
        feed_forward: 3072,
        vocabulary: 151936,
        layers: 28,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        tied: false,
    },
    Model {
        snapshot: "gemma-3-4b-it",
        arch: "gemma3",
        hidden: 2560,
        feed_forward: 10240,
        vocabulary: 262144,
        layers: 34,
        heads: 8,
        kv_heads: 4,
        head_dim: 256,
        tied: true,
    },
    Model {
        snapshot: "meta-llama-3.1-70b-instruct",
        arch: "llama",
        hidden: 8192,
        feed_forward: 28672,
        vocabulary: 128256,
        layers: 80,
        heads: 64,
        kv_heads: 8,
        head_dim: 128,
        tied: false,
    },
];

impl Model {
    fn matrices(&self) -> Vec<(String, [u64; 2])> {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut matrices = vec![("token_embd.weight".to_owned(), [self.hidden, self.vocabulary])];
        if !self.tied {
            matrices.push(("output.weight".to_owned(), [self.hidden, self.vocabulary]));
        }
        for layer in 0..self.layers {
            for (name, shape) in [
                ("attn_q", [self.hidden, queries]),
                ("attn_k", [self.hidden, keys]),
                ("attn_v", [self.hidden, keys]),
                ("attn_output", [queries, self.hidden]),
                ("ffn_gate", [self.hidden, self.feed_forward]),
                ("ffn_up", [self.hidden, self.feed_forward]),
                ("ffn_down", [self.feed_forward, self.hidden]),
            ] {
                matrices.push((format!("blk.{layer}.{name}.weight"), shape));
            }
        }
        matrices
    }
}

/// The sections of a snapshot: the mix, and the tensors that do not get its own type.
fn sections(text: &str) -> Vec<(FileType, BTreeMap<&str, TensorType>)> {
    let mut sections: Vec<(FileType, BTreeMap<_, _>)> = Vec::new();
    for line in text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        if let Some((mix, default)) = line.strip_prefix('[').and_then(|line| line.split_once("] ")) {
            let file = FileType::from_name(mix).unwrap();
            assert_eq!(file.default_type(), TensorType::from_name(default).unwrap());
            sections.push((file, BTreeMap::new()));
        } else {
            let (tensor, kind) = line.rsplit_once(' ').unwrap();
            let section = &mut sections.last_mut().unwrap().1;
            section.insert(tensor, TensorType::from_name(kind).unwrap());
        }
    }
    sections
}

#[test]
fn large_models_get_the_types_of_llama_cpps_snapshots() {
    for model in MODELS {
        let path = format!("tests/fixtures/selection/{}.schema", model.snapshot);
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
        let facts = ModelFacts {
            arch: model.arch.into(),
            layers: model.layers,
            gqa: (model.heads / model.kv_heads) as usize,
            grouped: model.heads != model.kv_heads,
        };
        let matrices = model.matrices();
        let candidates: Vec<_> = matrices
            .iter()
            .map(|(name, dimensions)| Candidate {
                name,
                dimensions,
                stored: TensorType::BF16,
                always_f32: false,
            })
            .collect();
        let sections = sections(&text);
        assert!(
            sections.len() > 30,
            "{} has {} mixes",
            model.snapshot,
            sections.len()
        );
        for (file, others) in sections {
            let choices = Recipe::new(file).choose(&facts, &candidates).unwrap();
            for (tensor, choice) in candidates.iter().zip(&choices) {
                let theirs = others.get(tensor.name).copied().unwrap_or(file.default_type());
                assert_eq!(choice.kind, theirs, "{} {file} {}", model.snapshot, tensor.name);
            }
            let known = |name: &&&str| candidates.iter().any(|tensor| tensor.name == **name);
            assert_eq!(others.keys().filter(known).count(), others.len());
        }
    }
}
