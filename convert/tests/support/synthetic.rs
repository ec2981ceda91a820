//! Checkpoints that are made up: any shape, with weights that look like those of a trained model.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

/// The shape of a llama model. The vocabulary is the fixture's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) feed_forward: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) tied: bool,
}

pub(crate) const SMALL: Shape = Shape {
    hidden: 64,
    feed_forward: 96,
    layers: 2,
    heads: 2,
    kv_heads: 1,
    head_dim: 32,
    tied: true,
};

const VOCABULARY: usize = 340;

/// What the weights are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weights {
    /// Bell-shaped, with a few large ones, in bf16.
    Trained,
    /// Zeros: for what depends on the shapes only. The kernels are done with them at once.
    Zero,
}

/// Writes a checkpoint folder.
pub(crate) fn checkpoint(dir: &Path, shape: &Shape, weights: Weights) {
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        std::fs::copy(super::fixture("tied").join(name), dir.join(name)).unwrap();
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let Shape {
        hidden, feed_forward, ..
    } = *shape;
    let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if !shape.tied {
        tensors.push(("lm_head.weight".to_owned(), vec![VOCABULARY, hidden]));
    }
    for layer in 0..shape.layers {
        let mut add = |name: &str, shape: Vec<usize>| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        };
        add("input_layernorm", vec![hidden]);
        add("self_attn.q_proj", vec![queries, hidden]);
        add("self_attn.k_proj", vec![keys, hidden]);
        add("self_attn.v_proj", vec![keys, hidden]);
        add("self_attn.o_proj", vec![hidden, queries]);
        add("post_attention_layernorm", vec![hidden]);
        add("mlp.gate_proj", vec![feed_forward, hidden]);
        add("mlp.up_proj", vec![feed_forward, hidden]);
        add("mlp.down_proj", vec![hidden, feed_forward]);
    }
    let mut random = Random(1);
    let tensors: Vec<_> = tensors
        .into_iter()
        .map(|(name, shape)| {
            let bytes: Vec<u8> = (0..shape.iter().product::<usize>())
                .flat_map(|_| match weights {
                    Weights::Zero => [0, 0],
                    Weights::Trained => half::bf16::from_f32(random.weight()).to_le_bytes(),
                })
                .collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// SplitMix64: the same numbers everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// In 0..1.
    pub(crate) fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    }

    /// The sum of four is bell-shaped enough; one weight of a hundred is ten times as large.
    fn weight(&mut self) -> f32 {
        let bell = (0..4).map(|_| self.unit() - 0.5).sum::<f32>() * 0.05;
        if self.unit() < 0.01 { bell * 10.0 } else { bell }
    }
}
