//! `rank_pattern` and `alpha_pattern`: numbers by a regular expression on the module's name.

use regex::Regex;
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Regular expressions on module names with a value each. The order counts: the first that matches wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patterns<T>(pub Vec<(String, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (pattern, value) in &self.0 {
            map.serialize_entry(pattern, value)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
            type Value = Patterns<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of patterns")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut patterns = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    patterns.push(entry);
                }
                Ok(Patterns(patterns))
            }
        }
        deserializer.deserialize_map(InOrder(std::marker::PhantomData))
    }
}

/// A pattern that is no regular expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pattern:?} is no regular expression: {why}")]
pub struct PatternError {
    /// The pattern.
    pub pattern: String,
    /// What the expression's parser said.
    pub why: String,
}

impl<T: Copy> Patterns<T> {
    /// The patterns as PEFT reads them, `(.*\.)?(KEY)$` from the start of the module's name.
    /// Source: peft/utils/other.py, `get_pattern_key`.
    pub fn compile(&self) -> Result<CompiledPatterns<T>, PatternError> {
        let compile = |(pattern, value): &(String, T)| match Regex::new(&format!(r"^(.*\.)?({pattern})$")) {
            Ok(regex) => Ok((regex, *value)),
            Err(e) => Err(PatternError {
                pattern: pattern.clone(),
                why: e.to_string(),
            }),
        };
        Ok(CompiledPatterns(
            self.0.iter().map(compile).collect::<Result<_, _>>()?,
        ))
    }
}

/// Patterns that can be asked.
#[derive(Debug)]
pub struct CompiledPatterns<T>(Vec<(Regex, T)>);

impl<T: Copy> CompiledPatterns<T> {
    /// The place and the value of the first pattern that matches a module.
    pub fn find(&self, module: &str) -> Option<(usize, T)> {
        let place = self.0.iter().position(|(regex, _)| regex.is_match(module))?;
        Some((place, self.0[place].1))
    }
}
