//! What a model's layers remember of the tokens that they have seen.
//!
//! In: the header's keys. Out: one [`Layer`] a layer: the width of its KV cache, its window, its recurrent state.
//! Source: llama.cpp src/llama-model.cpp (create_memory), src/llama-hparams.cpp and src/models/*.cpp
//! (load_arch_hparams). An architecture whose state is not known here gives an upper bound where one is known, and
//! says so.

use super::header::Keys;

/// More layers than any model has.
const MOST_LAYERS: u64 = 4096;

/// One layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// Elements of the keys of one token; 0 where the layer has no KV cache.
    pub k: u64,
    /// Elements of the values of one token.
    pub v: u64,
    /// Tokens that it looks back, where that is fewer than all.
    pub window: Option<u64>,
    /// Elements of the recurrent state of one sequence, each of 4 bytes.
    pub recurrent: u64,
    /// Heads of the queries.
    pub heads: u64,
    /// Elements of one head's query.
    pub head: u64,
    /// Width of the feed-forward part.
    pub feed_forward: u64,
}

/// All layers, and what is not known of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layers {
    /// In order.
    pub layers: Vec<Layer>,
    /// Why the true state may be another; `None` when all is known.
    pub unknown: Option<String>,
}

impl Layers {
    pub(super) fn of(architecture: &str, keys: &Keys) -> Self {
        let count = keys.number("block_count").unwrap_or(0);
        if count == 0 || count > MOST_LAYERS {
            return Self {
                layers: Vec::new(),
                unknown: Some(format!(
                    "its header does not say how many layers it has ({count})"
                )),
            };
        }
        let count = count.saturating_sub(keys.number("nextn_predict_layers").unwrap_or(0));
        let layers = (0..count)
            .map(|at| layer(architecture, keys, at, count))
            .collect();
        // Caches of their own kind, which this plan does not follow.
        let odd = [
            "deepseek32",
            "deepseek4",
            "glm-dsa",
            "glm5-next",
            "minimax-m3",
            "minimax-01",
            "dots3note",
            "qwen4exp",
            "kimi-linear",
            "kimi-k3",
            "bailingmoe3",
            "t5",
            "dflash",
            "eagle3",
        ];
        let unknown = if odd.contains(&architecture) {
            Some(format!(
                "the state of the architecture {architecture} is not known here"
            ))
        } else if keys.number("embedding_length").is_none() {
            Some("its header does not say embedding_length".to_owned())
        } else {
            None
        };
        Self { layers, unknown }
    }
}

fn layer(architecture: &str, keys: &Keys, at: u64, count: u64) -> Layer {
    let width = keys.number("embedding_length").unwrap_or(0);
    let heads = keys.at("attention.head_count", at).unwrap_or(0);
    let heads_kv = keys.at("attention.head_count_kv", at).unwrap_or(heads);
    let feed_forward = keys.at("feed_forward_length", at).unwrap_or(0);
    let default_head = width
        .checked_div(keys.at("attention.head_count", 0).unwrap_or(0))
        .unwrap_or(0);
    let window = window(architecture, keys, at, count);
    let length = |key: &str, key_swa: &str| {
        let all = keys.number(key).unwrap_or(default_head);
        if window.is_some() {
            keys.number(key_swa).unwrap_or(all)
        } else {
            all
        }
    };
    let k_head = length("attention.key_length", "attention.key_length_swa");
    let v_head = length("attention.value_length", "attention.value_length_swa");
    // Multi-head latent attention keeps one vector a token, and makes keys and values from it.
    let latent = keys.number("attention.key_length_mla").unwrap_or(0) > 0;
    let (attends, recurs) = parts(architecture, keys, at, heads_kv, feed_forward);
    let cached = attends && at < layers_with_cache(architecture, keys, count);
    Layer {
        k: if cached {
            k_head.saturating_mul(heads_kv)
        } else {
            0
        },
        v: if cached && !latent {
            v_head.saturating_mul(heads_kv)
        } else {
            0
        },
        window: window.filter(|_| cached),
        recurrent: if recurs { recurrent(keys, width) } else { 0 },
        heads,
        head: k_head,
        feed_forward,
    }
}

/// Whether a layer has a KV cache, and whether it has a recurrent state.
fn parts(architecture: &str, keys: &Keys, at: u64, heads_kv: u64, feed_forward: u64) -> (bool, bool) {
    match architecture {
        "mamba" | "mamba2" | "rwkv6" | "rwkv6qwen2" | "rwkv7" | "arwkv7" => (false, true),
        "falcon-h1" => (true, true),
        "jamba" | "plamo2" | "granitehybrid" | "lfm2" | "lfm2moe" => (heads_kv > 0, heads_kv == 0),
        "nemotron_h" | "nemotron_h_moe" => (
            heads_kv > 0 && feed_forward == 0,
            heads_kv == 0 && feed_forward == 0,
        ),
        "qwen3next" | "qwen35" | "qwen35moe" => {
            let recurs = keys.at("attention.recurrent_layers", at).map_or_else(
                || {
                    let interval = keys.number("full_attention_interval").unwrap_or(4).max(1);
                    !(at + 1).is_multiple_of(interval)
                },
                |recurs| recurs != 0,
            );
            (!recurs, recurs)
        }
        _ => (true, false),
    }
}

/// Elements of a sequence's state in a layer that has one (llama_hparams::n_embd_r and n_embd_s).
fn recurrent(keys: &Keys, width: u64) -> u64 {
    let number = |key: &str| keys.number(key).unwrap_or(0);
    if number("wkv.head_size") > 0 {
        let shifted = keys.number("token_shift_count").unwrap_or(2);
        return width.saturating_mul(shifted.saturating_add(number("wkv.head_size")));
    }
    if number("shortconv.l_cache") > 0 {
        return width.saturating_mul(number("shortconv.l_cache") - 1);
    }
    let (inner, state) = (number("ssm.inner_size"), number("ssm.state_size"));
    let channels = inner.saturating_add(number("ssm.group_count").saturating_mul(2).saturating_mul(state));
    number("ssm.conv_kernel")
        .saturating_sub(1)
        .saturating_mul(channels)
        .saturating_add(state.saturating_mul(inner))
}

/// The first layers that have a cache; the ones after them use those.
fn layers_with_cache(architecture: &str, keys: &Keys, count: u64) -> u64 {
    match architecture {
        "gemma3n" => 20,
        "gemma4" => count.saturating_sub(keys.number("attention.shared_kv_layers").unwrap_or(0)),
        _ => count,
    }
}

/// The window of a layer, where llama.cpp gives it a cache of that size.
fn window(architecture: &str, keys: &Keys, at: u64, count: u64) -> Option<u64> {
    let said = keys.number("attention.sliding_window");
    // The window, and every which layer has none; the others of the list in src/models ignore the key.
    let (window, pattern) = match architecture {
        "gemma2" => (said.unwrap_or(4096), 2),
        "gemma3" => (said?, 6),
        "gemma3n" => (said?, 5),
        "gemma4" => (said?, 1),
        "cohere2" | "olmo2" => (said?, 4),
        "gpt-oss" => (said?, 2),
        "llama4" if said != Some(0) => (8192, 4),
        "exaone4" if count == 64 => (said.unwrap_or(4096), 4),
        "exaone-moe" => (said.unwrap_or(128), 4),
        "smallthinker" if said.unwrap_or(0) > 0 => (4096, 4),
        "lfm2" => return said.filter(|&window| window > 0),
        _ => return None,
    };
    let key = "attention.sliding_window_pattern";
    let slides = if keys.is_list(key) {
        keys.at(key, at) == Some(1)
    } else {
        match keys.number(key).unwrap_or(pattern) {
            0 => true,
            pattern if architecture == "smallthinker" => !at.is_multiple_of(pattern),
            pattern => at % pattern < pattern - 1,
        }
    };
    (slides && window > 0).then_some(window)
}
