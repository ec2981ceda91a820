//! LoRA as PEFT has it: start values, `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use pipit_convert::adapter::{AdapterConfig, Patterns, PeftAdapter, TargetModules};
use safetensors::tensor::{Dtype, TensorView};

use super::{AdapterError, select};
use crate::model::{Lora, Model, Parameter};
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
    /// Whether the scale is the rank-stabilised one.
    pub use_rslora: bool,
    /// Which layers get an adapter.
    pub target_modules: TargetModules,
}

fn parameters(
    module: &str,
    a: Vec<f32>,
    b: Vec<f32>,
    (input, r, out): (usize, usize, usize),
) -> candle_core::Result<[Parameter; 2]> {
    Ok([
        Parameter::trained(
            format!("{module}.lora_A.weight"),
            &Tensor::from_vec(a, (r, input), &Device::Cpu)?,
        )?,
        Parameter::trained(
            format!("{module}.lora_B.weight"),
            &Tensor::from_vec(b, (out, r), &Device::Cpu)?,
        )?,
    ])
}

/// Puts a new adapter on the model: A from kaiming_uniform(a = √5), which is U(±1/√in), and B zero, so that
/// the model is unchanged at first. Returns the configuration as it is to be saved.
pub fn add(
    model: &mut Model,
    options: &LoraOptions,
    base: &str,
    random: &mut Random,
) -> Result<AdapterConfig, AdapterError> {
    let modules: Vec<String> = model.linears().map(|linear| linear.module().to_owned()).collect();
    let names: Vec<&str> = modules.iter().map(String::as_str).collect();
    let chosen = select(&options.target_modules, &names)?;
    let r = options.r;
    let scale = options.lora_alpha
        / if options.use_rslora {
            (r as f64).sqrt()
        } else {
            r as f64
        };
    for linear in model
        .linears_mut()
        .filter(|linear| chosen.contains(&linear.module()))
    {
        let [out, input] = linear.weight.dims();
        let bound = 1.0 / (input as f64).sqrt();
        let a = (0..r * input)
            .map(|_| ((random.uniform() * 2.0 - 1.0) * bound) as f32)
            .collect();
        let [a, b] = parameters(linear.module(), a, vec![0.0; out * r], (input, r, out))?;
        linear.lora = Some(Lora {
            a,
            b,
            scale,
            dropout: options.lora_dropout,
        });
    }
    // PEFT stores `all-linear` expanded: the module names' ends, which say the same to every reader.
    let target_modules = match &options.target_modules {
        TargetModules::Pattern(all) if all == "all-linear" => {
            let mut ends: Vec<String> = names
                .iter()
                .filter_map(|name| name.rsplit('.').next())
                .map(str::to_owned)
                .collect();
            ends.sort_unstable();
            ends.dedup();
            TargetModules::Names(ends)
        }
        other => other.clone(),
    };
    Ok(AdapterConfig {
        peft_type: "LORA".into(),
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some(base.to_owned()),
        r,
        lora_alpha: options.lora_alpha,
        lora_dropout: options.lora_dropout,
        target_modules: Some(target_modules),
        bias: "none".into(),
        fan_in_fan_out: false,
        use_rslora: options.use_rslora,
        use_dora: false,
        rank_pattern: Patterns::default(),
        alpha_pattern: Patterns::default(),
        modules_to_save: None,
        inference_mode: true,
        other: BTreeMap::new(),
    })
}

/// Puts a stored adapter on the model. What is more than plain LoRA on linear layers is refused by name.
pub fn apply(model: &mut Model, adapter: &PeftAdapter) -> Result<(), AdapterError> {
    if let Some(beyond) = adapter.beyond_plain() {
        return Err(beyond.into());
    }
    let other_base = |module: &str, why: String| AdapterError::OtherBase {
        path: adapter.dir().to_path_buf(),
        module: module.to_owned(),
        why,
        base: adapter.config().base_model_name_or_path.clone(),
    };
    let mut left: Vec<&str> = adapter.modules().keys().map(String::as_str).collect();
    for linear in model.linears_mut() {
        let Some(lora) = adapter.module(linear.module()) else {
            continue;
        };
        left.retain(|name| *name != linear.module());
        let found = [lora.n_out, lora.n_in];
        let expected = linear.weight.dims();
        if found != expected {
            return Err(other_base(
                linear.module(),
                format!("is {expected:?} here, {found:?} in the adapter"),
            ));
        }
        let sizes = (lora.n_in, lora.rank, lora.n_out);
        let [a, b] = parameters(linear.module(), lora.lora_a.clone(), lora.lora_b.clone(), sizes)?;
        let dropout = adapter.config().lora_dropout;
        linear.lora = Some(Lora {
            a,
            b,
            scale: f64::from(lora.scale),
            dropout,
        });
    }
    match left.first() {
        Some(module) => Err(other_base(module, "the model has no such linear layer".into())),
        None => Ok(()),
    }
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` into a folder. Keys are PEFT's,
/// `base_model.model.MODULE.lora_A.weight`.
pub fn save(model: &Model, config: &AdapterConfig, dir: &Path) -> Result<(), AdapterError> {
    let config_path = dir.join("adapter_config.json");
    let mut json = serde_json::to_string_pretty(config).map_err(|e| AdapterError::Write {
        path: config_path.clone(),
        source: std::io::Error::other(e),
    })?;
    json.push('\n');
    std::fs::write(&config_path, json).map_err(|source| AdapterError::Write {
        path: config_path,
        source,
    })?;
    let weights_path = PeftAdapter::weights_path(dir);
    let write = |source| AdapterError::Write {
        path: weights_path.clone(),
        source,
    };
    let mut tensors = Vec::new();
    for lora in model.linears().filter_map(|linear| linear.lora.as_ref()) {
        for parameter in [&lora.a, &lora.b] {
            let tensor = parameter.get(crate::model::Mode::INFERENCE);
            let values = tensor.flatten_all()?.to_vec1::<f32>()?;
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            tensors.push((
                format!("base_model.model.{}", parameter.name),
                tensor.dims().to_vec(),
                bytes,
            ));
        }
    }
    let mut views = Vec::new();
    for (name, shape, bytes) in &tensors {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        views.push((name, view.map_err(|e| write(std::io::Error::other(e)))?));
    }
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| write(std::io::Error::other(e)))?;
    std::fs::write(&weights_path, bytes).map_err(write)
}
