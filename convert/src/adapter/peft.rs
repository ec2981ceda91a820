//! Reads a LoRA adapter as PEFT saves it: what the configuration asks for, and the weights.
//!
//! Every field of the configuration that is active and not understood is refused by name, so that nothing of an
//! adapter is left out silently. Source: peft/tuners/lora/{config,layer,model}.py.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::weights::{AdapterWeights, LoraModule, TokenRows};
use super::{AdapterConfig, PatternError};
use crate::checkpoint::{self, CheckpointError, TensorFiles, TensorView};
use crate::json;

/// What can be wrong with an adapter folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The path is not a folder with `adapter_config.json` and `adapter_model.safetensors`.
    #[error(
        "{path} is no adapter: {why}\nhint: an adapter is a folder with adapter_config.json and adapter_model.safetensors, as PEFT and pipit-distill write it"
    )]
    NoAdapter {
        /// The path that was named.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// `adapter_config.json` cannot be understood.
    #[error("{path}: {why}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The adapter has a part that is not built, or that the place where it is to go cannot have.
    #[error("{path}: `{key}` is active ({value}), and that is not supported here")]
    Unsupported {
        /// The configuration, or the weights.
        path: PathBuf,
        /// The key of the configuration, or the name of the tensor.
        key: String,
        /// What stands there.
        value: String,
    },
    /// A module's two matrices are not both there, or do not fit together or the rank.
    #[error("{path}: module {module}: {why}")]
    Module {
        /// The weights.
        path: PathBuf,
        /// The module, without `base_model.model.`.
        module: String,
        /// What does not fit.
        why: String,
    },
    /// The weights cannot be read.
    #[error(transparent)]
    Tensors(#[from] CheckpointError),
}

/// An adapter folder. The matrices of its modules are read, what it replaces whole stays on disk.
#[derive(Debug)]
pub struct PeftAdapter {
    dir: PathBuf,
    config: AdapterConfig,
    files: TensorFiles,
    weights: AdapterWeights,
}

impl PeftAdapter {
    /// Reads the folder: LoRA with all that PEFT puts beside it (DoRA, biases, embeddings, trained tokens, tensors
    /// saved whole).
    pub fn open(dir: &Path) -> Result<Self, AdapterError> {
        let no = |why: &str| AdapterError::NoAdapter {
            path: dir.to_path_buf(),
            why: why.to_owned(),
        };
        if !dir.is_dir() {
            return Err(no(if dir.exists() {
                "it is not a folder"
            } else {
                "it does not exist"
            }));
        }
        let config_path = dir.join("adapter_config.json");
        if !config_path.is_file() {
            return Err(no("it has no adapter_config.json"));
        }
        checkpoint::refuse_links(dir)?;
        let weights = Self::weights_path(dir);
        if !weights.is_file() {
            checkpoint::refuse_pickle(dir)?;
            return Err(no("it has no adapter_model.safetensors"));
        }
        let text = json::read_bytes(&config_path).map_err(|source| CheckpointError::Read {
            path: config_path.clone(),
            source,
        })?;
        let config: AdapterConfig = json::from_slice(&text).map_err(|e| AdapterError::Config {
            path: config_path.clone(),
            why: e.to_string(),
        })?;
        check(&config_path, &config)?;
        let bad = |key: &'static str| {
            let path = config_path.clone();
            move |e: PatternError| AdapterError::Config {
                path,
                why: format!("{key}: {e}"),
            }
        };
        let ranks = config.rank_pattern.compile().map_err(bad("rank_pattern"))?;
        let alphas = config.alpha_pattern.compile().map_err(bad("alpha_pattern"))?;
        let files = TensorFiles::open(&weights)?;
        let weights = AdapterWeights::read(&weights, &files, &config, |module| {
            let rank = ranks.find(module).map_or(config.r, |(_, rank)| rank);
            let alpha = alphas.find(module).map_or(config.lora_alpha, |(_, alpha)| alpha);
            let divisor = if config.use_rslora {
                (rank as f64).sqrt()
            } else {
                rank as f64
            };
            (rank, (alpha / divisor) as f32)
        })?;
        if weights.modules.is_empty() {
            return Err(no("its weights hold no lora_A and lora_B"));
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            config,
            files,
            weights,
        })
    }

    /// Where the weights of an adapter folder stand.
    pub fn weights_path(dir: &Path) -> PathBuf {
        dir.join("adapter_model.safetensors")
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `adapter_config.json`.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The adapted modules by name (`model.layers.0.self_attn.q_proj`), sorted.
    pub fn modules(&self) -> &BTreeMap<String, LoraModule> {
        &self.weights.modules
    }

    /// The adapter of one module.
    pub fn module(&self, name: &str) -> Option<&LoraModule> {
        self.weights.modules.get(name)
    }

    /// The scale of one module.
    pub fn scale(&self, name: &str) -> Option<f32> {
        self.module(name).map(|module| module.scale)
    }

    /// The tensors that it brings whole, by the name that they have in the checkpoint.
    pub fn replaced(&self) -> impl Iterator<Item = (&str, TensorView<'_>)> {
        let whole = self.weights.replaced.iter();
        whole.filter_map(|(name, key)| Some((name.as_str(), self.files.tensor(key)?)))
    }

    /// The rows of embeddings that it brings, by the name of the module.
    pub fn tokens(&self) -> &BTreeMap<String, TokenRows> {
        &self.weights.tokens
    }

    /// The first thing that it has beyond `W + s·B·A` on linear layers, as the error that refuses it.
    pub fn beyond_plain(&self) -> Option<AdapterError> {
        let modules = self.modules().iter().find_map(|(name, module)| {
            let what = if module.embedding {
                "lora_embedding_A"
            } else if module.magnitude.is_some() {
                "lora_magnitude_vector"
            } else if module.bias.is_some() {
                "lora_B.bias"
            } else {
                return None;
            };
            Some((format!("{name}.{what}"), "not plain LoRA on a linear layer"))
        });
        let tokens = self.tokens().keys().next();
        let tokens = tokens.map(|name| (format!("{name}.token_adapter"), "trained rows of embeddings"));
        let whole = self.weights.replaced.keys().next();
        let whole = whole.map(|name| (name.clone(), "a tensor that is saved whole"));
        let (key, value) = modules.or(tokens).or(whole)?;
        Some(AdapterError::Unsupported {
            path: Self::weights_path(&self.dir),
            key,
            value: value.into(),
        })
    }
}

/// Keys that say how the adapter was trained or found and change nothing of how it is merged, and those whose effect
/// is in the weights: the tensors say which layers, biases and tokens are adapted.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "revision",
    "peft_version",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "lora_bias",
    "trainable_token_indices",
    "ensure_weight_tying",
];

fn check(path: &Path, config: &AdapterConfig) -> Result<(), AdapterError> {
    let unsupported = |key: &str, value: String| {
        Err(AdapterError::Unsupported {
            path: path.to_path_buf(),
            key: key.to_owned(),
            value,
        })
    };
    let wrong = |why: &str| {
        Err(AdapterError::Config {
            path: path.to_path_buf(),
            why: why.into(),
        })
    };
    if config.peft_type != "LORA" {
        return unsupported("peft_type", config.peft_type.clone());
    }
    if config.r == 0 || config.rank_pattern.0.iter().any(|(_, rank)| *rank == 0) {
        return wrong("a rank is 0");
    }
    let alphas = config.alpha_pattern.0.iter().map(|(_, alpha)| *alpha);
    if !alphas.chain([config.lora_alpha]).all(f64::is_finite) {
        return wrong("an alpha is no finite number");
    }
    if !matches!(config.bias.as_str(), "none" | "all" | "lora_only") {
        return unsupported("bias", config.bias.clone());
    }
    for (key, value) in &config.other {
        let active = match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(items) => !items.is_empty(),
            // PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights when training starts, so the
            // adapter belongs to a base that is not the published one. The others leave it alone.
            Value::String(init) if key == "init_lora_weights" => {
                !matches!(init.as_str(), "gaussian" | "eva" | "orthogonal")
            }
            Value::Bool(true) if key == "init_lora_weights" => false,
            _ => true,
        };
        if active && !HARMLESS.contains(&key.as_str()) {
            return unsupported(key, value.to_string());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{"peft_type":"LORA","task_type":"CAUSAL_LM","r":2,"lora_alpha":8,"target_modules":["q_proj"],
        "rank_pattern":{"^model.layers.1.*":1},"alpha_pattern":{"o_proj":3,".*":5},"megatron_core":"megatron.core",
        "init_lora_weights":true,"lora_bias":false,"use_bdlora":null,"eva_config":null}"#;

    fn write(config: &str, tensors: &[(&str, &[usize])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
        let data: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, shape)| {
                (0..shape.iter().product::<usize>())
                    .flat_map(|i| (i as f32).to_le_bytes())
                    .collect()
            })
            .collect();
        let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
            (
                *name,
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), data).unwrap(),
            )
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        std::fs::write(PeftAdapter::weights_path(dir.path()), bytes).unwrap();
        dir
    }

    #[test]
    fn patterns_give_rank_and_scale_in_their_order() {
        let dir = write(
            CONFIG,
            &[
                (
                    "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight",
                    &[2, 3],
                ),
                (
                    "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight",
                    &[4, 2],
                ),
                (
                    "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
                    &[1, 3],
                ),
                (
                    "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
                    &[4, 1],
                ),
            ],
        );
        let adapter = PeftAdapter::open(dir.path()).unwrap();
        assert_eq!(adapter.scale("model.layers.0.self_attn.o_proj"), Some(1.5));
        assert_eq!(adapter.scale("model.layers.1.self_attn.q_proj"), Some(5.0));
        let module = adapter.module("model.layers.0.self_attn.o_proj").unwrap();
        assert_eq!((module.rank, module.n_in, module.n_out), (2, 3, 4));
        assert_eq!(module.lora_b, [0., 1., 2., 3., 4., 5., 6., 7.]);
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        let pair: &[(&str, &[usize])] = &[("m.lora_A.weight", &[2, 3]), ("m.lora_B.weight", &[4, 2])];
        let error = |config: &str, tensors| {
            let error = PeftAdapter::open(write(config, tensors).path());
            error.unwrap_err().to_string()
        };
        for (key, value) in [
            ("bias", "\"some\""),
            ("target_parameters", "[\"experts\"]"),
            ("init_lora_weights", "\"pissa\""),
            ("use_qalora", "true"),
            ("alora_invocation_tokens", "[1, 2]"),
            ("layer_replication", "[[0, 4]]"),
            ("arrow_config", "{\"top_k\": 3}"),
            ("some_new_field", "7"),
        ] {
            let config = format!(r#"{{"peft_type":"LORA","r":2,"lora_alpha":8,"{key}":{value}}}"#);
            let error = error(&config, pair);
            assert!(error.contains(&format!("`{key}`")), "{error}");
        }
        let plain = r#"{"peft_type":"LORA","r":2,"lora_alpha":8}"#;
        type Tensors<'a> = &'a [(&'a str, &'a [usize])];
        let cases: &[(&str, Tensors<'_>, &str)] = &[
            (plain, &[("m.lora_A.weight", &[2, 3])], "only one of"),
            (
                plain,
                &[("m.lora_A.weight", &[3, 3]), ("m.lora_B.weight", &[4, 3])],
                "rank 3",
            ),
            (
                plain,
                &[pair[0], pair[1], ("m.lora_A.default.weight", &[2, 3])],
                "unknown meaning",
            ),
            (
                plain,
                &[pair[0], pair[1], ("m.lora_magnitude_vector", &[4])],
                "use_dora is false",
            ),
            (
                plain,
                &[
                    pair[0],
                    pair[1],
                    ("e.token_adapter.trainable_tokens_delta", &[1, 3]),
                ],
                "does not list",
            ),
            (plain, &[("m.weight", &[2, 3])], "no lora_A and lora_B"),
            (
                r#"{"peft_type":"LORA","r":0,"lora_alpha":8}"#,
                pair,
                "a rank is 0",
            ),
            (
                r#"{"peft_type":"LORA","r":2,"r":3,"lora_alpha":8}"#,
                pair,
                "twice",
            ),
            (r#"{"peft_type":"IA3","r":2,"lora_alpha":8}"#, pair, "IA3"),
            (
                r#"{"peft_type":"LORA","r":2,"lora_alpha":8,"rank_pattern":{"(":1}}"#,
                pair,
                "regular expression",
            ),
        ];
        for (config, tensors, part) in cases {
            let error = error(config, tensors);
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn what_is_beyond_plain_lora_is_told() {
        let plain = r#"{"peft_type":"LORA","r":2,"lora_alpha":8}"#;
        let pair: [(&str, &[usize]); 2] = [("m.lora_A.weight", &[2, 3]), ("m.lora_B.weight", &[4, 2])];
        let beyond = |extra: (&'static str, &'static [usize])| {
            let dir = write(plain, &[pair[0], pair[1], extra]);
            let adapter = PeftAdapter::open(dir.path()).unwrap();
            adapter.beyond_plain().unwrap().to_string()
        };
        assert!(
            PeftAdapter::open(write(plain, &pair).path())
                .unwrap()
                .beyond_plain()
                .is_none()
        );
        assert!(beyond(("base_model.model.lm_head.weight", &[4, 3])).contains("lm_head.weight"));
        assert!(beyond(("m.lora_B.bias", &[4])).contains("m.lora_B.bias"));
    }
}
