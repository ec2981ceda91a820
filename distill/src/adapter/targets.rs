//! `target_modules` against the names of a model's linear layers, as PEFT reads it.

use pipit_convert::adapter::TargetModules;
use regex::Regex;

use super::AdapterError;

/// The modules out of `modules` that are meant. A list entry matches a module of that name, or one whose name
/// ends in `.` and the entry, and every entry must match; `all-linear` matches all; any other text is a regular
/// expression that must match a whole name. Source: peft/tuners/tuners_utils.py, `check_target_module_exists`.
pub fn select<'a>(targets: &TargetModules, modules: &[&'a str]) -> Result<Vec<&'a str>, AdapterError> {
    match targets {
        TargetModules::Names(names) => {
            let matches = |name: &str, module: &str| {
                module == name || module.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
            };
            for name in names {
                if is_head(name) {
                    return Err(AdapterError::Head { module: name.clone() });
                }
                if !modules.iter().any(|module| matches(name, module)) {
                    return Err(no_target(name, modules));
                }
            }
            if names.is_empty() {
                return Err(no_target("", modules));
            }
            let wanted = |module: &&&str| names.iter().any(|name| matches(name, module));
            Ok(modules.iter().filter(wanted).copied().collect())
        }
        TargetModules::Pattern(all) if all == "all-linear" => Ok(modules.to_vec()),
        TargetModules::Pattern(pattern) => {
            let regex = Regex::new(&format!("^(?:{pattern})$")).map_err(|e| AdapterError::Pattern {
                pattern: pattern.clone(),
                why: e.to_string(),
            })?;
            if let Some(head) = ["lm_head", "model.embed_tokens"]
                .into_iter()
                .find(|name| regex.is_match(name))
            {
                return Err(AdapterError::Head {
                    module: head.to_owned(),
                });
            }
            let found: Vec<_> = modules
                .iter()
                .filter(|module| regex.is_match(module))
                .copied()
                .collect();
            if found.is_empty() {
                Err(no_target(pattern, modules))
            } else {
                Ok(found)
            }
        }
    }
}

fn is_head(name: &str) -> bool {
    matches!(name.rsplit('.').next(), Some("lm_head" | "embed_tokens"))
}

fn no_target(wanted: &str, modules: &[&str]) -> AdapterError {
    let mut names: Vec<&str> = modules
        .iter()
        .filter_map(|module| module.rsplit('.').next())
        .collect();
    names.sort_unstable();
    names.dedup();
    let short = wanted.rsplit('.').next().unwrap_or(wanted);
    names.sort_by(|a, b| strsim::jaro_winkler(b, short).total_cmp(&strsim::jaro_winkler(a, short)));
    names.truncate(3);
    AdapterError::NoTarget {
        wanted: wanted.to_owned(),
        nearest: names.into_iter().map(str::to_owned).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULES: [&str; 4] = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ];

    fn names(names: &[&str]) -> TargetModules {
        TargetModules::Names(names.iter().map(|name| name.to_string()).collect())
    }

    #[test]
    fn lists_all_and_expressions() {
        assert_eq!(
            select(&names(&["q_proj"]), &MODULES).unwrap(),
            [MODULES[0], MODULES[2]]
        );
        assert_eq!(
            select(&names(&["layers.1.mlp.up_proj"]), &MODULES).unwrap(),
            [MODULES[3]]
        );
        assert_eq!(
            select(&TargetModules::Pattern("all-linear".into()), &MODULES).unwrap(),
            MODULES
        );
        let second = TargetModules::Pattern(r".*\.1\..*(q|up)_proj".into());
        assert_eq!(select(&second, &MODULES).unwrap(), [MODULES[2], MODULES[3]]);
    }

    #[test]
    fn a_name_that_matches_nothing_is_refused_with_the_nearest() {
        let error = select(&names(&["q_proj", "q_prj"]), &MODULES)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("q_prj") && error.contains("nearest names are q_proj"),
            "{error}"
        );
        // The end of a name counts at a dot only.
        assert!(select(&names(&["proj"]), &MODULES).is_err());
        assert!(matches!(
            select(&names(&["lm_head"]), &MODULES),
            Err(AdapterError::Head { .. })
        ));
        let pattern = TargetModules::Pattern("q_proj".into());
        assert!(matches!(
            select(&pattern, &MODULES),
            Err(AdapterError::NoTarget { .. })
        ));
        let broken = TargetModules::Pattern("(".into());
        assert!(matches!(
            select(&broken, &MODULES),
            Err(AdapterError::Pattern { .. })
        ));
    }
}
