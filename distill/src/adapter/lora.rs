//! New LoRA adapters, <https://arxiv.org/abs/2106.09685>, in all of PEFT's forms that leave the base as it is.
//! Source: peft/tuners/lora/{config,layer,model}.py.

use std::collections::BTreeMap;

use candle_core::Tensor;
use pipit_convert::adapter::{AdapterConfig, CompiledPatterns, Patterns, TargetModules};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::start::Start;
use super::targets::Targets;
use super::{AdapterError, kept};
use crate::model::{EmbeddingLora, Lora, Magnitude, Model, Parameter};
use crate::random::Random;

/// What a new adapter looks like, spelled as PEFT's `LoraConfig` spells it.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraOptions {
    /// The rank, at least 1.
    pub r: usize,
    /// The scale is `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.
    pub lora_alpha: f64,
    /// The chance with which an input of A is dropped while training, in [0, 1).
    pub lora_dropout: f64,
    /// Whether the scale is the rank-stabilised one, <https://arxiv.org/abs/2312.03732>.
    pub use_rslora: bool,
    /// Whether lengths of rows are trained beside the directions, <https://arxiv.org/abs/2402.09353>.
    pub use_dora: bool,
    /// Whether B has a bias.
    pub lora_bias: bool,
    /// Which of the model's biases are trained.
    pub bias: Bias,
    /// What A and B start from.
    pub init_lora_weights: InitLoraWeights,
    /// Ranks that differ from `r`, by the first expression that matches the module's name.
    pub rank_pattern: Patterns<usize>,
    /// Alphas that differ from `lora_alpha`.
    pub alpha_pattern: Patterns<f64>,
    /// Which modules get an adapter, and which are trained whole.
    pub targets: Targets,
}

impl Default for LoraOptions {
    /// PEFT's defaults, on all linear layers of the blocks.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            bias: Bias::None,
            init_lora_weights: InitLoraWeights::True,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            targets: Targets::default(),
        }
    }
}

/// Which of the model's biases are trained beside an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    None,
    /// All that the model has.
    All,
    /// Those of the layers that get an adapter.
    LoraOnly,
}

impl Bias {
    /// As `adapter_config.json` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }
}

/// What A and B start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum InitLoraWeights {
    /// A from U(±1/√in), B zero.
    True,
    /// A from N(0, 1/r²), B zero.
    Gaussian,
    /// A from U(±1/√in), B from U(±1/√r): the adapter changes the model at once.
    False,
}

impl From<InitLoraWeights> for Value {
    fn from(init: InitLoraWeights) -> Self {
        match init {
            InitLoraWeights::True => json!(true),
            InitLoraWeights::Gaussian => json!("gaussian"),
            InitLoraWeights::False => json!(false),
        }
    }
}

impl TryFrom<Value> for InitLoraWeights {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match &value {
            Value::Bool(true) => Ok(Self::True),
            Value::Bool(false) => Ok(Self::False),
            Value::String(text) => text.parse(),
            other => Err(format!("init_lora_weights is {other}")),
        }
    }
}

impl std::str::FromStr for InitLoraWeights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_lowercase().as_str() {
            "true" => Ok(Self::True),
            "false" => Ok(Self::False),
            "gaussian" => Ok(Self::Gaussian),
            _ => Err(format!(
                "{text} is not supported, only true, gaussian and false\nhint: pissa, olora, corda, loftq and their \
                 like change the base, so that the adapter fits no published one"
            )),
        }
    }
}

/// How one module's adapter is made.
struct Shape {
    module: String,
    r: usize,
    scale: f64,
}

/// Puts a new adapter on the model. With B zero the model is unchanged at first. Returns the configuration as it is to
/// be saved.
pub fn add(
    model: &mut Model,
    options: &LoraOptions,
    base: &str,
    random: &mut Random,
) -> Result<AdapterConfig, AdapterError> {
    let conflict = |why: &str| Err(AdapterError::Conflict { why: why.to_owned() });
    if options.lora_bias && options.use_dora {
        return conflict("lora_bias does not go with use_dora");
    }
    if options.lora_bias && options.init_lora_weights == InitLoraWeights::Gaussian {
        return conflict("lora_bias does not go with init_lora_weights gaussian");
    }
    let modules = model.modules();
    let chosen = options.targets.select(&modules)?;
    let target_modules = options.targets.stored(&modules);
    let shapes = shapes(options, &chosen)?;
    for shape in &shapes {
        if model.is_embedding(&shape.module) && options.lora_bias {
            return conflict("lora_bias does not go with an adapter on the embedding");
        }
        if model.is_head(&shape.module) && options.use_dora && options.lora_dropout > 0.0 {
            return conflict("use_dora with lora_dropout is not supported on the output layer");
        }
    }
    for shape in &shapes {
        if model.is_embedding(&shape.module) {
            model.set_embedding_lora(embedding(model, options, shape, random)?);
        } else {
            let lora = linear(model, options, shape, random)?;
            model.set_lora(&shape.module, lora);
        }
    }
    kept::train(model, options.bias, &options.targets.modules_to_save)?;
    Ok(stored(options, target_modules, base))
}

/// Rank and scale of every module; a pattern that no module has is refused.
fn shapes(options: &LoraOptions, modules: &[&str]) -> Result<Vec<Shape>, AdapterError> {
    let ranks = compiled("rank_pattern", &options.rank_pattern, modules)?;
    let alphas = compiled("alpha_pattern", &options.alpha_pattern, modules)?;
    let shape = |module: &&str| {
        let r = ranks.find(module).map_or(options.r, |(_, r)| r);
        let alpha = alphas.find(module).map_or(options.lora_alpha, |(_, alpha)| alpha);
        let divisor = if options.use_rslora {
            (r as f64).sqrt()
        } else {
            r as f64
        };
        Shape {
            module: module.to_string(),
            r,
            scale: alpha / divisor,
        }
    };
    Ok(modules.iter().map(shape).collect())
}

fn compiled<T: Copy>(
    option: &'static str,
    patterns: &Patterns<T>,
    modules: &[&str],
) -> Result<CompiledPatterns<T>, AdapterError> {
    let compiled = patterns.compile().map_err(|e| AdapterError::Pattern {
        option,
        pattern: e.pattern,
        why: e.why,
    })?;
    for (pattern, _) in &patterns.0 {
        let alone = Patterns(vec![(pattern.clone(), ())]).compile();
        if alone.is_ok_and(|alone| !modules.iter().any(|module| alone.find(module).is_some())) {
            return Err(super::targets::no_target(
                option,
                pattern,
                modules.iter().copied(),
            ));
        }
    }
    Ok(compiled)
}

/// A new adapter on a linear layer, or on the output layer.
fn linear(
    model: &Model,
    options: &LoraOptions,
    shape: &Shape,
    random: &mut Random,
) -> Result<Lora, AdapterError> {
    let Shape { module, r, scale } = shape;
    let [out, input] = model.dims(module);
    let (a, b) = match options.init_lora_weights {
        InitLoraWeights::True => (Start::Linear(input), Start::Zero),
        InitLoraWeights::Gaussian => (Start::Normal(1.0 / *r as f64), Start::Zero),
        InitLoraWeights::False => (Start::Linear(input), Start::Linear(*r)),
    };
    let mut lora = Lora {
        a: a.parameter(format!("{module}.lora_A.weight"), &[*r, input], random)?,
        b: b.parameter(format!("{module}.lora_B.weight"), &[out, *r], random)?,
        bias: None,
        magnitude: None,
        scale: *scale,
        dropout: options.lora_dropout,
    };
    if options.lora_bias {
        lora.bias = Some(b.parameter(format!("{module}.lora_B.bias"), &[out], random)?);
    }
    if options.use_dora {
        lora.magnitude = Some(magnitude(module, model.norms(module, &lora)?)?);
    }
    Ok(lora)
}

/// A new adapter on the embedding: A zero, B from N(0, 1).
fn embedding(
    model: &Model,
    options: &LoraOptions,
    shape: &Shape,
    random: &mut Random,
) -> Result<EmbeddingLora, AdapterError> {
    let Shape { module, r, scale } = shape;
    let [vocabulary, width] = model.dims(module);
    let a = match options.init_lora_weights {
        InitLoraWeights::False => Start::Normal(1.0),
        _ => Start::Zero,
    };
    let mut lora = EmbeddingLora {
        a: a.parameter(format!("{module}.lora_embedding_A"), &[vocabulary, *r], random)?,
        b: Start::Normal(1.0).parameter(format!("{module}.lora_embedding_B"), &[width, *r], random)?,
        magnitude: None,
        scale: *scale,
    };
    if options.use_dora {
        lora.magnitude = Some(magnitude(module, model.embedding_norms(&lora)?)?);
    }
    Ok(lora)
}

/// DoRA's lengths, which start as the ones that the matrix has: the model is unchanged.
fn magnitude(module: &str, norms: Vec<f32>) -> candle_core::Result<Magnitude> {
    let count = norms.len();
    let norms = Tensor::from_vec(norms, count, &candle_core::Device::Cpu)?;
    Ok(Magnitude::new(Parameter::trained(
        format!("{module}.lora_magnitude_vector"),
        &norms,
    )?))
}

/// `adapter_config.json` of a new adapter.
fn stored(options: &LoraOptions, target_modules: TargetModules, base: &str) -> AdapterConfig {
    let targets = &options.targets;
    let given = |given: bool, value: Value| if given { value } else { Value::Null };
    let excluded = match &targets.exclude_modules {
        TargetModules::Names(names) => given(!names.is_empty(), json!(names)),
        TargetModules::Pattern(pattern) => json!(pattern),
    };
    let layers = &targets.layers_to_transform;
    let pattern = match targets.layers_pattern.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let other: BTreeMap<String, Value> = [
        ("exclude_modules", excluded),
        ("layers_to_transform", given(!layers.is_empty(), json!(layers))),
        ("layers_pattern", pattern),
        ("init_lora_weights", options.init_lora_weights.into()),
        ("lora_bias", json!(options.lora_bias)),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    AdapterConfig {
        peft_type: "LORA".into(),
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some(base.to_owned()),
        r: options.r,
        lora_alpha: options.lora_alpha,
        lora_dropout: options.lora_dropout,
        target_modules: Some(target_modules),
        bias: options.bias.name().into(),
        fan_in_fan_out: false,
        use_rslora: options.use_rslora,
        use_dora: options.use_dora,
        rank_pattern: options.rank_pattern.clone(),
        alpha_pattern: options.alpha_pattern.clone(),
        modules_to_save: (!targets.modules_to_save.is_empty()).then(|| targets.modules_to_save.clone()),
        inference_mode: true,
        other,
    }
}
