//! Which modules of a model get an adapter, as PEFT decides it.
//! Source: peft/tuners/tuners_utils.py, `check_target_module_exists`.

use pipit_convert::adapter::TargetModules;
use regex::Regex;

use super::AdapterError;
use crate::model::Module;

/// What `LoraConfig` says of the modules to adapt.
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    /// Names, a regular expression, or `all-linear`.
    pub target_modules: TargetModules,
    /// Modules that get no adapter all the same: names or a regular expression; an empty list excludes nothing.
    pub exclude_modules: TargetModules,
    /// Indices of blocks; empty means all. For `target_modules` that are names only.
    pub layers_to_transform: Vec<usize>,
    /// What stands before the index in a module's name; empty means anything.
    pub layers_pattern: Vec<String>,
    /// Modules that are trained whole, which get no adapter.
    pub modules_to_save: Vec<String>,
}

impl Default for Targets {
    /// All linear layers of the blocks.
    fn default() -> Self {
        Self {
            target_modules: TargetModules::Pattern("all-linear".to_owned()),
            exclude_modules: TargetModules::Names(Vec::new()),
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            modules_to_save: Vec::new(),
        }
    }
}

impl Targets {
    /// The modules out of `modules` that get an adapter, in their order.
    pub fn select<'a>(&self, modules: &[Module<'a>]) -> Result<Vec<&'a str>, AdapterError> {
        self.check(modules)?;
        let wanted = self.wanted(modules)?;
        let excluded = Excluded::new(self)?;
        let selected: Vec<&str> = wanted.into_iter().filter(|name| !excluded.has(name)).collect();
        if selected.is_empty() {
            return Err(AdapterError::NothingLeft {
                target_modules: shown(&self.target_modules),
            });
        }
        Ok(selected)
    }

    /// `all-linear` as PEFT writes it down: the names, and from twenty of them on their ends.
    /// Source: `_maybe_include_all_linear_layers` and `_find_minimal_target_modules`.
    pub fn stored(&self, modules: &[Module<'_>]) -> TargetModules {
        match &self.target_modules {
            TargetModules::Pattern(all) if is_all_linear(all) => {
                let names = modules
                    .iter()
                    .filter(|module| module.in_block)
                    .map(|module| module.name);
                let mut names: Vec<&str> = names.collect();
                if names.len() >= 20 {
                    names = names.into_iter().map(end).collect();
                }
                names.sort_unstable();
                names.dedup();
                TargetModules::Names(names.into_iter().map(str::to_owned).collect())
            }
            other => other.clone(),
        }
    }

    /// Refuses what PEFT refuses, and names that match nothing.
    fn check(&self, modules: &[Module<'_>]) -> Result<(), AdapterError> {
        let conflict = |why: &str| Err(AdapterError::Conflict { why: why.to_owned() });
        if !self.layers_to_transform.is_empty() && matches!(self.target_modules, TargetModules::Pattern(_)) {
            return conflict("layers_to_transform needs target_modules that are a list of names");
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_empty() {
            return conflict("layers_pattern needs layers_to_transform");
        }
        for (option, names) in [
            ("target_modules", &self.target_modules),
            ("exclude_modules", &self.exclude_modules),
        ] {
            let TargetModules::Names(names) = names else {
                continue;
            };
            for name in names {
                if !modules.iter().any(|module| matches(name, module.name)) {
                    return Err(no_target(option, name, modules.iter().map(|module| module.name)));
                }
            }
        }
        Ok(())
    }

    fn wanted<'a>(&self, modules: &[Module<'a>]) -> Result<Vec<&'a str>, AdapterError> {
        let all = modules.iter().map(|module| module.name);
        match &self.target_modules {
            TargetModules::Pattern(text) if is_all_linear(text) => Ok(modules
                .iter()
                .filter(|module| module.in_block)
                .map(|module| module.name)
                .collect()),
            TargetModules::Pattern(text) => {
                let regex = whole("target_modules", text)?;
                let found: Vec<&str> = all.clone().filter(|name| regex.is_match(name)).collect();
                match found.is_empty() {
                    true => Err(no_target("target_modules", text, all)),
                    false => Ok(found),
                }
            }
            TargetModules::Names(names) if names.is_empty() => Err(no_target("target_modules", "", all)),
            TargetModules::Names(names) => {
                let layers = Layers::new(self)?;
                // A module that is named in full is adapted whatever its block: so does PEFT.
                let is_target = |module: &&str| {
                    names.iter().any(|name| name == module)
                        || names.iter().any(|name| matches(name, module)) && layers.has(module)
                };
                Ok(all.filter(is_target).collect())
            }
        }
    }
}

/// Whether a module is meant by a name: it has that name, or ends in `.` and the name.
pub(super) fn matches(name: &str, module: &str) -> bool {
    module
        .strip_suffix(name)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The last part of a module's name.
fn end(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn is_all_linear(text: &str) -> bool {
    text.eq_ignore_ascii_case("all-linear")
}

/// What matches no module, with the names that are most like it.
pub(super) fn no_target<'a>(
    option: &'static str,
    wanted: &str,
    modules: impl Iterator<Item = &'a str>,
) -> AdapterError {
    let mut names: Vec<&str> = modules.map(end).collect();
    names.sort_unstable();
    names.dedup();
    let short = end(wanted);
    names.sort_by(|a, b| strsim::jaro_winkler(b, short).total_cmp(&strsim::jaro_winkler(a, short)));
    names.truncate(3);
    AdapterError::NoTarget {
        option,
        wanted: wanted.to_owned(),
        nearest: names.into_iter().map(str::to_owned).collect(),
    }
}

/// An expression that must match a whole name.
fn whole(option: &'static str, text: &str) -> Result<Regex, AdapterError> {
    compiled(option, text, &format!("^(?:{text})$"))
}

fn compiled(option: &'static str, text: &str, anchored: &str) -> Result<Regex, AdapterError> {
    Regex::new(anchored).map_err(|e| AdapterError::Pattern {
        option,
        pattern: text.to_owned(),
        why: e.to_string(),
    })
}

fn shown(targets: &TargetModules) -> String {
    match targets {
        TargetModules::Names(names) => names.join(","),
        TargetModules::Pattern(text) => text.clone(),
    }
}

/// `exclude_modules` and `modules_to_save`, ready to be asked.
struct Excluded<'a> {
    regex: Option<Regex>,
    names: &'a [String],
    saved: &'a [String],
}

impl<'a> Excluded<'a> {
    fn new(targets: &'a Targets) -> Result<Self, AdapterError> {
        let (regex, names) = match &targets.exclude_modules {
            TargetModules::Pattern(text) => (Some(whole("exclude_modules", text)?), &[][..]),
            TargetModules::Names(names) => (None, names.as_slice()),
        };
        Ok(Self {
            regex,
            names,
            saved: &targets.modules_to_save,
        })
    }

    fn has(&self, module: &str) -> bool {
        let inside = |saved: &String| format!(".{module}.").contains(&format!(".{saved}."));
        self.regex.as_ref().is_some_and(|regex| regex.is_match(module))
            || self.names.iter().any(|name| matches(name, module))
            || self.saved.iter().any(inside)
    }
}

/// `layers_to_transform` and `layers_pattern`, ready to be asked.
struct Layers<'a> {
    indices: &'a [usize],
    /// The first numbered part of a name is the block's index.
    patterns: Vec<Regex>,
}

impl<'a> Layers<'a> {
    fn new(targets: &'a Targets) -> Result<Self, AdapterError> {
        let option = "layers_pattern";
        let patterns = if targets.layers_pattern.is_empty() {
            vec![compiled(option, "", r"^.*?\.[^.]*\.(\d+)\.")?]
        } else {
            let one = |text: &String| compiled(option, text, &format!(r"^(?:|.*?\.)(?:{text})\.(\d+)\."));
            targets.layers_pattern.iter().map(one).collect::<Result<_, _>>()?
        };
        Ok(Self {
            indices: &targets.layers_to_transform,
            patterns,
        })
    }

    fn has(&self, module: &str) -> bool {
        if self.indices.is_empty() {
            return true;
        }
        let found = self.patterns.iter().find_map(|pattern| pattern.captures(module));
        let index = found.and_then(|found| found.iter().flatten().last()?.as_str().parse::<usize>().ok());
        index.is_some_and(|index| self.indices.contains(&index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 6] = [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "lm_head",
    ];

    fn modules() -> [Module<'static>; 6] {
        NAMES.map(|name| Module {
            name,
            in_block: name.contains("layers"),
        })
    }

    fn names(names: &[&str]) -> TargetModules {
        TargetModules::Names(names.iter().map(|name| name.to_string()).collect())
    }

    fn pattern(text: &str) -> TargetModules {
        TargetModules::Pattern(text.to_owned())
    }

    fn targets(target_modules: TargetModules) -> Targets {
        Targets {
            target_modules,
            ..Targets::default()
        }
    }

    fn select(targets: &Targets) -> Vec<&'static str> {
        targets.select(&modules()).unwrap()
    }

    fn refused(targets: &Targets) -> String {
        targets.select(&modules()).unwrap_err().to_string()
    }

    #[test]
    fn lists_all_and_expressions() {
        assert_eq!(select(&targets(names(&["q_proj"]))), [NAMES[1], NAMES[3]]);
        assert_eq!(select(&targets(names(&["layers.1.mlp.up_proj"]))), [NAMES[4]]);
        assert_eq!(
            select(&targets(names(&["embed_tokens", "lm_head"]))),
            [NAMES[0], NAMES[5]]
        );
        assert_eq!(select(&targets(pattern("all-linear"))), NAMES[1..5]);
        assert_eq!(select(&targets(pattern(r".*\.1\..*(q|up)_proj"))), NAMES[3..5]);
    }

    #[test]
    fn exclusion_by_name_by_expression_and_by_being_saved_whole() {
        let all = targets(pattern("all-linear"));
        for exclude_modules in [names(&["up_proj"]), pattern(".*mlp.*")] {
            assert_eq!(
                select(&Targets {
                    exclude_modules,
                    ..all.clone()
                }),
                [NAMES[1], NAMES[3]]
            );
        }
        let modules_to_save = vec!["mlp".to_owned()];
        assert_eq!(
            select(&Targets {
                modules_to_save,
                ..all.clone()
            }),
            [NAMES[1], NAMES[3]]
        );
        let none = Targets {
            exclude_modules: pattern(".*"),
            ..all
        };
        assert!(refused(&none).contains("exclude_modules"));
    }

    #[test]
    fn blocks_by_their_index_but_a_full_name_whatever_its_block() {
        let mut second = targets(names(&["q_proj", "model.layers.0.mlp.up_proj"]));
        second.layers_to_transform = vec![1];
        assert_eq!(select(&second), [NAMES[2], NAMES[3]]);
        second.layers_pattern = vec!["layers".into()];
        assert_eq!(select(&second), [NAMES[2], NAMES[3]]);
        second.layers_pattern = vec!["h".into()];
        assert_eq!(select(&second), [NAMES[2]]);
        second.target_modules = pattern("all-linear");
        assert!(refused(&second).contains("layers_to_transform"));
    }

    #[test]
    fn a_name_that_matches_nothing_is_refused_with_the_nearest() {
        let error = refused(&targets(names(&["q_proj", "q_prj"])));
        assert!(
            error.contains("q_prj") && error.contains("nearest names are q_proj"),
            "{error}"
        );
        // The end of a name counts at a dot only.
        assert!(refused(&targets(names(&["proj"]))).contains("proj"));
        assert!(refused(&targets(pattern("q_proj"))).contains("q_proj"));
        assert!(refused(&targets(pattern("("))).contains("no regular expression"));
        let exclude_modules = names(&["upproj"]);
        let error = refused(&Targets {
            exclude_modules,
            ..targets(pattern("all-linear"))
        });
        assert!(
            error.contains("exclude_modules") && error.contains("up_proj"),
            "{error}"
        );
    }

    #[test]
    fn all_linear_is_stored_as_peft_stores_it() {
        let all = targets(pattern("all-linear"));
        assert_eq!(
            all.stored(&modules()),
            names(&[NAMES[2], NAMES[1], NAMES[4], NAMES[3]])
        );
        let many: Vec<String> = (0..10)
            .flat_map(|i| ["mlp.up_proj", "self_attn.q_proj"].map(|part| format!("model.layers.{i}.{part}")))
            .collect();
        let many: Vec<_> = many.iter().map(|name| Module { name, in_block: true }).collect();
        assert_eq!(all.stored(&many), names(&["q_proj", "up_proj"]));
        assert_eq!(targets(names(&["v_proj"])).stored(&many), names(&["v_proj"]));
    }
}
