//! Weights of the model itself that are trained beside an adapter: `modules_to_save` and `bias`.
//! Source: peft/utils/other.py (`_set_trainable`), peft/tuners/tuners_utils.py (`_mark_only_adapters_as_trainable`).

use super::targets::no_target;
use super::{AdapterError, Bias};
use crate::model::Model;

/// Makes the weights that are meant trained ones. In a model whose output layer is the embedding, saving one of them
/// makes two matrices of it, as in PEFT.
pub(super) fn train(model: &mut Model, bias: Bias, modules_to_save: &[String]) -> Result<(), AdapterError> {
    let mut names: Vec<String> = model.weight_names();
    names.push(format!("{}.weight", crate::model::HEAD));
    for wanted in modules_to_save {
        if !names
            .iter()
            .any(|name| is_saved(name, std::slice::from_ref(wanted)))
        {
            let modules = names.iter().filter_map(|name| Some(name.rsplit_once('.')?.0));
            return Err(no_target("modules_to_save", wanted, modules));
        }
    }
    let adapted: Vec<String> = model.adapted().map(str::to_owned).collect();
    model.train(&|name| is_saved(name, modules_to_save) || is_trained_bias(name, bias, &adapted))?;
    Ok(())
}

/// Whether a weight is of a module whose name, or that of a module around it, ends in one of these. PEFT does not ask
/// for a dot before the end: `norm` is every module whose name ends so.
pub(super) fn is_saved(weight: &str, modules_to_save: &[String]) -> bool {
    let mut module = weight;
    while let Some((around, _)) = module.rsplit_once('.') {
        if modules_to_save
            .iter()
            .any(|saved| around.ends_with(saved.as_str()))
        {
            return true;
        }
        module = around;
    }
    false
}

fn is_trained_bias(weight: &str, bias: Bias, adapted: &[String]) -> bool {
    let Some(module) = weight.strip_suffix(".bias") else {
        return false;
    };
    match bias {
        Bias::None => false,
        Bias::All => true,
        Bias::LoraOnly => adapted.iter().any(|name| name == module),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_saved_with_all_that_is_in_it() {
        let saved = |name: &str, modules: &[&str]| {
            is_saved(
                name,
                &modules
                    .iter()
                    .map(|module| module.to_string())
                    .collect::<Vec<_>>(),
            )
        };
        assert!(saved("lm_head.weight", &["embed_tokens", "lm_head"]));
        assert!(saved("model.layers.1.mlp.up_proj.weight", &["mlp"]));
        assert!(saved("model.layers.1.input_layernorm.weight", &["norm"]));
        assert!(!saved("model.layers.1.mlp.up_proj.weight", &["up", "weight"]));
    }
}
