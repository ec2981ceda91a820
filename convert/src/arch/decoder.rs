//! What all decoder-only architectures share: their sizes, the keys that every one of them has, and the way back
//! from those keys to `config.json`.
//!
//! Source: llama.cpp conversion/base.py (`TextModel.set_gguf_parameters`).

use serde_json::{Map, Value as Json, json};

use super::rope::Rope;
use super::table::{Dim, Line, Place, rules};
use super::{ArchError, Config, TensorRule};
use crate::gguf::{Array, Gguf, GgufError, Value};

/// More layers than any model has: what is more is damage, and must not cost memory.
const MAX_LAYERS: usize = 4096;

/// The embeddings, whose rows say how many tokens there are.
const EMBEDDINGS: &str = "token_embd.weight";

/// The sizes that `config.json` gives.
pub(super) struct Sizes {
    pub(super) vocabulary: usize,
    pub(super) hidden: usize,
    pub(super) feed_forward: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// The length of short convolutions, 1 where there are none.
    pub(super) kernel: usize,
}

impl Sizes {
    pub(super) fn new(config: &Config<'_>) -> Result<Self, ArchError> {
        Self::with_feed_forward(config, config.size("intermediate_size")?)
    }

    pub(super) fn with_feed_forward(config: &Config<'_>, feed_forward: usize) -> Result<Self, ArchError> {
        let heads = config.size("num_attention_heads")?;
        let hidden = config.size("hidden_size")?;
        let head_dim = config.size_opt("head_dim")?.unwrap_or(hidden / heads);
        let sizes = Self {
            vocabulary: config.size("vocab_size")?,
            hidden,
            feed_forward,
            layers: config.size("num_hidden_layers")?,
            heads,
            kv_heads: config.size_opt("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            kernel: 1,
        };
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(config.error(
                "head_dim",
                format!("is {head_dim}; the rotation needs an even number"),
            ));
        }
        if sizes.layers > MAX_LAYERS {
            return Err(config.error(
                "num_hidden_layers",
                format!("is {}, more than {MAX_LAYERS}", sizes.layers),
            ));
        }
        if heads % sizes.kv_heads != 0 {
            return Err(config.error("num_key_value_heads", "does not divide num_attention_heads"));
        }
        Ok(sizes)
    }

    /// The length of a head that the class of the configuration has, where `config.json` says none.
    pub(super) fn head_dim_or(mut self, config: &Config<'_>, default: usize) -> Self {
        if config.get("head_dim").is_none() {
            self.head_dim = default;
        }
        self
    }

    /// Refuses heads that are not an even share of the embedding, where llama.cpp takes that for granted.
    pub(super) fn check_heads(&self, config: &Config<'_>) -> Result<(), ArchError> {
        if self.heads * self.head_dim == self.hidden {
            return Ok(());
        }
        Err(config.error(
            "head_dim",
            format!(
                "is {}; llama.cpp needs hidden_size / num_attention_heads in this architecture, {}",
                self.head_dim,
                self.hidden / self.heads
            ),
        ))
    }

    pub(super) fn of(&self, dim: Dim) -> usize {
        let (query, key_value) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match dim {
            Dim::Vocabulary => self.vocabulary,
            Dim::Hidden => self.hidden,
            Dim::Query => query,
            Dim::KeyValue => key_value,
            Dim::Head => self.head_dim,
            Dim::FeedForward => self.feed_forward,
            Dim::QueryKeyValue => query + 2 * key_value,
            Dim::GateUp => 2 * self.feed_forward,
            Dim::ConvInputs => 3 * self.hidden,
            Dim::One => 1,
            Dim::Kernel => self.kernel,
        }
    }
}

/// The rules of a model: `outside` its layers, `head` unless the embeddings are tied, and in every layer the
/// lines that `layer` gives for it.
pub(super) fn tensors<'t>(
    config: &Config<'_>,
    sizes: &Sizes,
    outside: &[Line],
    head: Option<&Line>,
    layer: impl Fn(usize) -> &'t [Line],
) -> Result<Vec<TensorRule>, ArchError> {
    let mut all = rules(outside, Place::Outside, config, sizes)?;
    if let Some(head) = head {
        all.extend(rules(&[*head], Place::Outside, config, sizes)?);
    }
    for at in 0..sizes.layers {
        all.extend(rules(layer(at), Place::Layer(at), config, sizes)?);
    }
    Ok(all)
}

/// Refuses another activation than those named.
pub(super) fn check_activation(config: &Config<'_>, key: &str, known: &[&str]) -> Result<(), ArchError> {
    match config.get(key).and_then(Json::as_str) {
        Some(other) if !known.contains(&other) => {
            Err(config.error(key, format!("is {other}; llama.cpp has only {} here", known[0])))
        }
        _ => Ok(()),
    }
}

/// The gated activation of most architectures.
pub(super) fn check_silu(config: &Config<'_>) -> Result<(), ArchError> {
    check_activation(config, "hidden_act", &["silu", "swish"])
}

/// Refuses flags of transformers' configuration that llama.cpp does not know in this architecture.
pub(super) fn check_off(config: &Config<'_>, flags: &[&str]) -> Result<(), ArchError> {
    for key in flags {
        if config.flag(key)? {
            return Err(config.error(key, "is true, which llama.cpp does not know in this architecture"));
        }
    }
    Ok(())
}

/// Warns of a sliding window where llama.cpp attends to everything: within the window both do the same.
pub(super) fn warn_of_window(config: &Config<'_>) -> Result<(), ArchError> {
    if let Some(window) = config.size_opt("sliding_window")?
        && window < config.size("max_position_embeddings")?
    {
        tracing::warn!(
            "sliding_window is {window}, which llama.cpp does not have in this architecture: beyond {window} tokens it \
             sees more than the model was trained on"
        );
    }
    Ok(())
}

/// Refuses layers that see a window in another order than llama.cpp's: it has one for the architecture, which no
/// key changes in the files that its converter writes.
pub(super) fn check_windows(
    config: &Config<'_>,
    sizes: &Sizes,
    window: impl Fn(usize) -> bool,
) -> Result<(), ArchError> {
    let Some(types) = config.get("layer_types").and_then(Json::as_array) else {
        return Ok(());
    };
    let wanted = layer_types(sizes.layers, window);
    if *types == wanted {
        return Ok(());
    }
    Err(config.error(
        "layer_types",
        "differs from the order of windows that llama.cpp has for this architecture",
    ))
}

/// `layer_types` of `config.json`.
pub(super) fn layer_types(layers: usize, window: impl Fn(usize) -> bool) -> Vec<Json> {
    let name = |window| {
        if window {
            "sliding_attention"
        } else {
            "full_attention"
        }
    };
    (0..layers).map(|layer| json!(name(window(layer)))).collect()
}

/// Refuses another scale of the attention than llama.cpp's for Gemma: one over the root of a head's length, but
/// for the model of 27 billion parameters, which it tells by its `layers_of_27b` layers.
pub(super) fn check_gemma_scale(
    config: &Config<'_>,
    sizes: &Sizes,
    layers_of_27b: usize,
) -> Result<(), ArchError> {
    let wanted = gemma_scale(
        sizes.layers,
        sizes.hidden,
        sizes.heads,
        sizes.head_dim,
        layers_of_27b,
    );
    match config.number_opt("query_pre_attn_scalar")? {
        Some(scalar) if scalar != wanted as f64 => Err(config.error(
            "query_pre_attn_scalar",
            format!("is {scalar}; llama.cpp has {wanted} for these sizes"),
        )),
        _ => Ok(()),
    }
}

/// `query_pre_attn_scalar` as llama.cpp has it (src/models/gemma2.cpp, gemma3.cpp).
pub(super) fn gemma_scale(
    layers: usize,
    hidden: usize,
    heads: usize,
    head_dim: usize,
    layers_of_27b: usize,
) -> usize {
    if layers == layers_of_27b {
        hidden / heads
    } else {
        head_dim
    }
}

/// Whether the embeddings are the output matrix too; `default` is what the class of the configuration has, which
/// transformers leaves out of `config.json`.
pub(super) fn tied(config: &Config<'_>, default: bool) -> Result<bool, ArchError> {
    match config.get("tie_word_embeddings") {
        None => Ok(default),
        Some(_) => config.flag("tie_word_embeddings"),
    }
}

/// The keys of a GGUF file that start with the architecture's name.
pub(super) struct Keys {
    arch: &'static str,
    all: Vec<(String, Value)>,
}

impl Keys {
    /// The keys that every architecture has. The head count of keys and values is not among them.
    pub(super) fn new(
        arch: &'static str,
        config: &Config<'_>,
        sizes: &Sizes,
        rope: &Rope,
    ) -> Result<Self, ArchError> {
        let mut keys = Self {
            arch,
            all: Vec::new(),
        };
        let epsilon = match config.number_opt("rms_norm_eps")? {
            Some(epsilon) => epsilon,
            None => config.number_opt("norm_eps")?.unwrap_or(1e-6),
        };
        keys.size("block_count", sizes.layers);
        keys.size("context_length", config.size("max_position_embeddings")?);
        keys.size("embedding_length", sizes.hidden);
        keys.size("feed_forward_length", sizes.feed_forward);
        keys.size("attention.head_count", sizes.heads);
        rope.add_keys(&mut keys);
        keys.float("attention.layer_norm_rms_epsilon", epsilon);
        Ok(keys)
    }

    /// The head count of keys and values, the same in every layer.
    pub(super) fn kv_heads(&mut self, sizes: &Sizes) {
        self.size("attention.head_count_kv", sizes.kv_heads);
    }

    /// The length of a head; without these keys it is the embedding's length over the number of heads.
    pub(super) fn head_dim(&mut self, sizes: &Sizes) {
        self.size("attention.key_length", sizes.head_dim);
        self.size("attention.value_length", sizes.head_dim);
    }

    /// The same, where `config.json` says it.
    pub(super) fn head_dim_if_given(&mut self, config: &Config<'_>, sizes: &Sizes) {
        if config.get("head_dim").is_some() {
            self.head_dim(sizes);
        }
    }

    pub(super) fn size(&mut self, key: &str, value: usize) {
        self.add(key, Value::U32(value as u32));
    }

    pub(super) fn float(&mut self, key: &str, value: f64) {
        self.add(key, Value::F32(value as f32));
    }

    pub(super) fn add(&mut self, key: &str, value: Value) {
        self.all.push((format!("{}.{key}", self.arch), value));
    }

    pub(super) fn done(self) -> Vec<(String, Value)> {
        self.all
    }
}

/// A GGUF file of a known architecture, read key by key.
pub(super) struct Source<'a> {
    pub(super) gguf: &'a Gguf,
    arch: &'static str,
}

impl<'a> Source<'a> {
    /// Refuses mixtures of experts, which share names with dense models.
    pub(super) fn new(gguf: &'a Gguf, arch: &'static str) -> Result<Self, ArchError> {
        let source = Self { gguf, arch };
        if source.unsigned_opt("expert_count")?.unwrap_or(0) > 0 {
            return Err(ArchError::Unsupported(format!(
                "{} is a mixture of experts, which is not built",
                gguf.path().display()
            )));
        }
        Ok(source)
    }

    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    pub(super) fn error(&self, name: &str, why: &str) -> ArchError {
        self.gguf.key_error(&self.key(name), why).into()
    }

    pub(super) fn unsigned(&self, name: &str) -> Result<u64, ArchError> {
        Ok(self.gguf.unsigned(&self.key(name))?)
    }

    pub(super) fn unsigned_opt(&self, name: &str) -> Result<Option<u64>, ArchError> {
        Ok(self.gguf.unsigned_opt(&self.key(name))?)
    }

    /// The shortest decimal number that is this f32, so that 1e-5 does not become 0.000009999999747378752.
    pub(super) fn float(&self, name: &str) -> Result<f64, ArchError> {
        Ok(shortest(self.gguf.float(&self.key(name))?))
    }

    pub(super) fn float_opt(&self, name: &str) -> Result<Option<f64>, ArchError> {
        self.gguf
            .get(&self.key(name))
            .map(|_| self.float(name))
            .transpose()
    }

    pub(super) fn string_opt(&self, name: &str) -> Result<Option<&'a str>, ArchError> {
        let key = self.key(name);
        match self.gguf.get(&key) {
            None => Ok(None),
            Some(_) => Ok(Some(self.gguf.string(&key)?)),
        }
    }

    pub(super) fn has(&self, tensor: &str) -> bool {
        self.gguf.tensor(tensor).is_some()
    }

    /// The elements of an F32 tensor that follows from the configuration, where there is one.
    pub(super) fn floats(&self, tensor: &str) -> Option<Vec<f32>> {
        let (chunks, _) = self.gguf.data(self.gguf.tensor(tensor)?).as_chunks::<4>();
        Some(chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// The length of a head, all of which must be rotated.
    pub(super) fn rotated_head_dim(&self) -> Result<u64, ArchError> {
        let head_dim = self.head_dim()?;
        match self.unsigned_opt("rope.dimension_count")? {
            Some(rotated) if rotated != head_dim => {
                Err(self.error("rope.dimension_count", "differs from the length of a head"))
            }
            _ => Ok(head_dim),
        }
    }

    /// The length of a head.
    pub(super) fn head_dim(&self) -> Result<u64, ArchError> {
        let heads = self.unsigned("attention.head_count")?;
        if heads == 0 {
            return Err(self.error("attention.head_count", "is 0"));
        }
        let head_dim = match self.unsigned_opt("attention.key_length")? {
            Some(length) => length,
            None => self.unsigned("embedding_length")? / heads,
        };
        if self
            .unsigned_opt("attention.value_length")?
            .is_some_and(|n| n != head_dim)
        {
            return Err(self.error("attention.value_length", "differs from the key length"));
        }
        Ok(head_dim)
    }

    /// The head count of keys and values in each layer, or the one for all.
    pub(super) fn kv_heads(&self) -> Result<Vec<u64>, ArchError> {
        match self.gguf.get(&self.key("attention.head_count_kv")) {
            Some(Value::Array(Array::I32(heads))) => heads
                .iter()
                .map(|n| u64::try_from(*n))
                .collect::<Result<_, _>>()
                .map_err(|_| self.error("attention.head_count_kv", "has a negative element")),
            Some(Value::Array(Array::U32(heads))) => Ok(heads.iter().map(|n| u64::from(*n)).collect()),
            Some(_) => Ok(vec![self.unsigned("attention.head_count_kv")?]),
            None => Ok(vec![self.unsigned("attention.head_count")?]),
        }
    }

    /// `config.json` as far as all architectures spell it alike.
    pub(super) fn config(
        &self,
        class: &str,
        model_type: &str,
        rope: &Json,
    ) -> Result<Map<String, Json>, ArchError> {
        let embeddings = self
            .gguf
            .tensor(EMBEDDINGS)
            .ok_or_else(|| GgufError::MissingTensor {
                path: self.gguf.path().to_path_buf(),
                tensor: EMBEDDINGS.into(),
            })?;
        let scaled = rope["rope_type"] != "default";
        let kv_heads = self.kv_heads()?.into_iter().max().unwrap_or(0);
        if kv_heads == 0 {
            return Err(self.error("attention.head_count_kv", "is 0"));
        }
        let config = json!({
            "architectures": [class],
            "attention_dropout": 0.0,
            "hidden_size": self.unsigned("embedding_length")?,
            "intermediate_size": self.unsigned("feed_forward_length")?,
            "max_position_embeddings": self.unsigned("context_length")?,
            "model_type": model_type,
            "num_attention_heads": self.unsigned("attention.head_count")?,
            "num_hidden_layers": self.unsigned("block_count")?,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": self.float("attention.layer_norm_rms_epsilon")?,
            // transformers 5 reads `rope_parameters`, older ones read the other two.
            "rope_parameters": rope,
            "rope_scaling": if scaled { rope.clone() } else { Json::Null },
            "rope_theta": rope["rope_theta"],
            "tie_word_embeddings": !self.has("output.weight"),
            "use_cache": true,
            "vocab_size": embeddings.rows(),
        });
        match config {
            Json::Object(config) => Ok(config),
            _ => Err(ArchError::Unsupported("the configuration is no object".into())),
        }
    }
}

/// The shortest decimal number that is this f32.
pub(crate) fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(value.into())
}

/// Adds the entries of a JSON object to a configuration, over what stands there.
pub(super) fn with(mut config: Map<String, Json>, own: Json) -> Map<String, Json> {
    if let Json::Object(own) = own {
        config.extend(own);
    }
    config
}
