//! Typed values out of `config.json`. An error names the file, the key and what stands there.

use std::path::Path;

use serde_json::{Map, Value};

use crate::model::ModelError;

/// A JSON object with the path that errors name.
pub(in crate::model) struct Reader<'a> {
    pub(in crate::model) path: &'a Path,
    pub(in crate::model) json: &'a Map<String, Value>,
}

impl<'a> Reader<'a> {
    pub(in crate::model) fn bad(&self, key: &'static str, why: impl Into<String>) -> ModelError {
        ModelError::Config {
            path: self.path.to_path_buf(),
            key,
            why: why.into(),
        }
    }

    /// The value of a key; null is no value.
    pub(in crate::model) fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// A positive integer.
    pub(in crate::model) fn size(&self, key: &'static str) -> Result<usize, ModelError> {
        let value = self.get(key).ok_or_else(|| self.bad(key, "is missing"))?;
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            // No model has a dimension beyond 2³²; products of two sizes then cannot overflow.
            Some(n) if n > 0 && u32::try_from(n).is_ok() => Ok(n),
            _ => Err(self.bad(key, format!("{value} is not a size"))),
        }
    }

    pub(in crate::model) fn size_or(&self, key: &'static str, default: usize) -> Result<usize, ModelError> {
        self.get(key).map_or(Ok(default), |_| self.size(key))
    }

    /// An integer that may be 0.
    pub(in crate::model) fn count_or(&self, key: &'static str, default: usize) -> Result<usize, ModelError> {
        match self.get(key) {
            Some(value) if value.as_u64() == Some(0) => Ok(0),
            _ => self.size_or(key, default),
        }
    }

    /// A finite number above 0.
    pub(in crate::model) fn number(&self, key: &'static str) -> Result<f64, ModelError> {
        let value = self.get(key).ok_or_else(|| self.bad(key, "is missing"))?;
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            _ => Err(self.bad(key, format!("{value} is not a positive number"))),
        }
    }

    pub(in crate::model) fn number_or(&self, key: &'static str, default: f64) -> Result<f64, ModelError> {
        self.get(key).map_or(Ok(default), |_| self.number(key))
    }

    pub(in crate::model) fn flag(&self, key: &'static str, default: bool) -> Result<bool, ModelError> {
        self.get(key).map_or(Ok(default), |value| {
            value
                .as_bool()
                .ok_or_else(|| self.bad(key, format!("{value} is not true or false")))
        })
    }

    /// An object inside this one.
    pub(in crate::model) fn object(&self, key: &'static str) -> Result<Option<Self>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(json)) => Ok(Some(Self {
                path: self.path,
                json,
            })),
            Some(other) => Err(self.bad(key, format!("{other} is not an object"))),
        }
    }

    /// Fails where one of these switches is on.
    pub(in crate::model) fn refuse_flags(&self, keys: &[&'static str], why: &str) -> Result<(), ModelError> {
        keys.iter().try_for_each(|key| match self.flag(key, false)? {
            true => Err(self.bad(key, why)),
            false => Ok(()),
        })
    }

    /// Fails where one of these keys has a value.
    pub(in crate::model) fn refuse_values(&self, keys: &[&'static str], why: &str) -> Result<(), ModelError> {
        keys.iter().try_for_each(|key| match self.get(key) {
            Some(value) => Err(self.bad(key, format!("is {value}: {why}"))),
            None => Ok(()),
        })
    }

    /// Fails where the key has a value that is none of these.
    pub(in crate::model) fn one_of(&self, key: &'static str, known: &[&str]) -> Result<(), ModelError> {
        match self.get(key) {
            Some(value) if !known.iter().any(|known| value.as_str() == Some(known)) => {
                Err(self.bad(key, format!("{value} is not supported, only {known:?}")))
            }
            _ => Ok(()),
        }
    }
}
