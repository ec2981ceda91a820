//! Reads a LoRA adapter as PEFT saves it: configuration, and one pair of f32 matrices per adapted module.
//!
//! Everything that would change the model beyond `W + s·B·A` is refused by name, so that nothing of an adapter
//! is left out silently. Source: peft/tuners/lora/{config,layer,model}.py.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regex::Regex;
use serde_json::Value;

use super::{AdapterConfig, Patterns};
use crate::checkpoint::{CheckpointError, TensorFiles, TensorView};

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
    /// The adapter has a part that plain LoRA does not have, and that is not built here.
    #[error(
        "{path}: `{key}` is active ({value}), and that is not supported: only plain LoRA on linear layers is"
    )]
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

/// The adapter of one linear module: the weight becomes `W + scale · lora_b · lora_a`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraModule {
    /// The inner dimension.
    pub rank: usize,
    /// The number of inputs of the module.
    pub n_in: usize,
    /// The number of outputs of the module.
    pub n_out: usize,
    /// `[rank, n_in]`, row-major.
    pub lora_a: Vec<f32>,
    /// `[n_out, rank]`, row-major.
    pub lora_b: Vec<f32>,
    /// `alpha / rank`, or `alpha / √rank` with rank-stabilised LoRA, both after the patterns.
    pub scale: f32,
}

/// An adapter folder, read whole (adapters are small).
#[derive(Debug)]
pub struct PeftAdapter {
    dir: PathBuf,
    config: AdapterConfig,
    modules: BTreeMap<String, LoraModule>,
}

impl PeftAdapter {
    /// Reads the folder. Refuses by name whatever plain LoRA does not have: DoRA, `modules_to_save`, trained
    /// biases, adapters of embeddings, …
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
        let weights = Self::weights_path(dir);
        if !weights.is_file() {
            return Err(no("it has no adapter_model.safetensors"));
        }
        let text = std::fs::read_to_string(&config_path).map_err(|source| CheckpointError::Read {
            path: config_path.clone(),
            source,
        })?;
        let config: AdapterConfig = serde_json::from_str(&text).map_err(|e| AdapterError::Config {
            path: config_path.clone(),
            why: e.to_string(),
        })?;
        refuse_what_is_not_plain(&config_path, &config)?;
        let ranks = Compiled::new(&config_path, "rank_pattern", &config.rank_pattern)?;
        let alphas = Compiled::new(&config_path, "alpha_pattern", &config.alpha_pattern)?;
        let files = TensorFiles::open(&weights)?;
        let modules = read_modules(&weights, &files, |module| {
            let rank = ranks.get(module).unwrap_or(config.r);
            let alpha = alphas.get(module).unwrap_or(config.lora_alpha);
            let divisor = if config.use_rslora {
                (rank as f64).sqrt()
            } else {
                rank as f64
            };
            (rank, (alpha / divisor) as f32)
        })?;
        if modules.is_empty() {
            return Err(no("its weights hold no lora_A and lora_B"));
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            config,
            modules,
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
        &self.modules
    }

    /// The adapter of one module.
    pub fn module(&self, name: &str) -> Option<&LoraModule> {
        self.modules.get(name)
    }

    /// The scale of one module.
    pub fn scale(&self, name: &str) -> Option<f32> {
        self.modules.get(name).map(|module| module.scale)
    }
}

/// Patterns as PEFT reads them: `(.*\.)?(KEY)$` from the start of the module's name, the first one wins.
struct Compiled<T>(Vec<(Regex, T)>);

impl<T: Copy> Compiled<T> {
    fn new(path: &Path, key: &str, patterns: &Patterns<T>) -> Result<Self, AdapterError> {
        let compile = |(pattern, value): &(String, T)| match Regex::new(&format!(r"^(.*\.)?({pattern})$")) {
            Ok(regex) => Ok((regex, *value)),
            Err(e) => Err(AdapterError::Config {
                path: path.to_path_buf(),
                why: format!("{key} has {pattern:?}, which is no regular expression: {e}"),
            }),
        };
        Ok(Self(patterns.0.iter().map(compile).collect::<Result<_, _>>()?))
    }

    fn get(&self, module: &str) -> Option<T> {
        self.0
            .iter()
            .find(|(regex, _)| regex.is_match(module))
            .map(|(_, value)| *value)
    }
}

/// Keys that say how the adapter was trained or found, and leave `W + s·B·A` as it is.
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
];

fn refuse_what_is_not_plain(path: &Path, config: &AdapterConfig) -> Result<(), AdapterError> {
    let unsupported = |key: &str, value: String| {
        Err(AdapterError::Unsupported {
            path: path.to_path_buf(),
            key: key.to_owned(),
            value,
        })
    };
    if config.peft_type != "LORA" {
        return unsupported("peft_type", config.peft_type.clone());
    }
    if config.r == 0 || config.rank_pattern.0.iter().any(|(_, rank)| *rank == 0) {
        return Err(AdapterError::Config {
            path: path.to_path_buf(),
            why: "a rank is 0".into(),
        });
    }
    if config.use_dora {
        return unsupported("use_dora", "true".into());
    }
    if config.bias != "none" {
        return unsupported("bias", config.bias.clone());
    }
    if config.fan_in_fan_out {
        return unsupported("fan_in_fan_out", "true".into());
    }
    if let Some(modules) = config
        .modules_to_save
        .as_ref()
        .filter(|modules| !modules.is_empty())
    {
        return unsupported("modules_to_save", modules.join(", "));
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

/// Pairs the tensors up. `rank_and_scale` gives what the configuration says of a module.
fn read_modules(
    path: &Path,
    files: &TensorFiles,
    rank_and_scale: impl Fn(&str) -> (usize, f32),
) -> Result<BTreeMap<String, LoraModule>, AdapterError> {
    let mut pairs: BTreeMap<&str, [Option<TensorView<'_>>; 2]> = BTreeMap::new();
    for name in files.names() {
        let short = name.strip_prefix("base_model.model.").unwrap_or(name);
        let (module, at) = match (
            short.strip_suffix(".lora_A.weight"),
            short.strip_suffix(".lora_B.weight"),
        ) {
            (Some(module), _) => (module, 0),
            (_, Some(module)) => (module, 1),
            _ => {
                return Err(AdapterError::Unsupported {
                    path: path.to_path_buf(),
                    key: name.to_owned(),
                    value: "a tensor that is neither lora_A.weight nor lora_B.weight".into(),
                });
            }
        };
        pairs.entry(module).or_default()[at] = files.tensor(name);
    }
    let mut modules = BTreeMap::new();
    for (name, pair) in pairs {
        let bad = |why: String| AdapterError::Module {
            path: path.to_path_buf(),
            module: name.to_owned(),
            why,
        };
        let [Some(a), Some(b)] = pair else {
            return Err(bad("it has only one of lora_A and lora_B".into()));
        };
        let (rank, scale) = rank_and_scale(name);
        let (&[a_rank, n_in], &[n_out, b_rank]) = (a.shape, b.shape) else {
            return Err(bad(format!(
                "lora_A {:?} and lora_B {:?} are not matrices",
                a.shape, b.shape
            )));
        };
        if a_rank != rank || b_rank != rank {
            return Err(bad(format!(
                "lora_A has rank {a_rank} and lora_B {b_rank}, where adapter_config.json says {rank}"
            )));
        }
        let (lora_a, lora_b) = (a.to_f32()?, b.to_f32()?);
        if !lora_a.iter().chain(&lora_b).all(|value| value.is_finite()) {
            return Err(bad("it holds NaN or infinity".into()));
        }
        modules.insert(
            name.to_owned(),
            LoraModule {
                rank,
                n_in,
                n_out,
                lora_a,
                lora_b,
                scale,
            },
        );
    }
    Ok(modules)
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
    fn what_is_not_plain_lora_is_refused_by_name() {
        let pair: &[(&str, &[usize])] = &[("m.lora_A.weight", &[2, 3]), ("m.lora_B.weight", &[4, 2])];
        for (key, value) in [
            ("use_dora", "true"),
            ("bias", "\"all\""),
            ("modules_to_save", "[\"lm_head\"]"),
            ("target_parameters", "[\"experts\"]"),
            ("init_lora_weights", "\"pissa\""),
            ("some_new_field", "7"),
        ] {
            let config = format!(r#"{{"peft_type":"LORA","r":2,"lora_alpha":8,"{key}":{value}}}"#);
            let error = PeftAdapter::open(write(&config, pair).path())
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("`{key}`")), "{error}");
        }
        let config = r#"{"peft_type":"LORA","r":2,"lora_alpha":8}"#;
        let embedding: &[(&str, &[usize])] = &[("model.embed_tokens.lora_embedding_A", &[2, 3])];
        let error = PeftAdapter::open(write(config, embedding).path())
            .unwrap_err()
            .to_string();
        assert!(error.contains("lora_embedding_A"), "{error}");
        let half: &[(&str, &[usize])] = &[("m.lora_A.weight", &[2, 3])];
        let error = PeftAdapter::open(write(config, half).path())
            .unwrap_err()
            .to_string();
        assert!(error.contains("only one of"), "{error}");
        let wide: &[(&str, &[usize])] = &[("m.lora_A.weight", &[3, 3]), ("m.lora_B.weight", &[4, 3])];
        let error = PeftAdapter::open(write(config, wide).path())
            .unwrap_err()
            .to_string();
        assert!(error.contains("rank 3"), "{error}");
    }
}
