//! Chat templates: where they come from, and whether it is safe to ship them.
//!
//! A template is a program out of a file that others run on their servers. One that no runtime should run is refused
//! (CVE-2024-34359 and CVE-2026-5760 are templates that reached Python's internals).

use std::io::{self, Write};
use std::path::Path;
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, context};
use regex::Regex;
use serde_json::{Map, Value as Json};

use super::{At, VocabError};
use crate::checkpoint::{CheckpointError, read_json_object};
use crate::gguf::{Gguf, Value};

/// The longest template in bytes; real ones have up to 30 000.
const LONGEST: usize = 256 * 1024;
/// Steps that a template may take, as many as the runtime gives it; real ones take a few hundred for each message.
const FUEL: u64 = 2_000_000;
/// Bytes that a template may write for a conversation of four lines.
const MOST_OUTPUT: usize = 1024 * 1024;

/// Why a template is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// It is longer than any real one.
    #[error("has {0} bytes, and {LONGEST} are allowed")]
    Long(usize),
    /// It is no Jinja.
    #[error("is no Jinja: {0}")]
    Syntax(String),
    /// It loads other files.
    #[error("has a {{% {0} %}}\nhint: a template in a GGUF file has no other files to load")]
    Loads(String),
    /// It reaches for what Python keeps inside of objects.
    #[error(
        "reaches for {0:?}: templates do not need what starts with two underscores, and attacks on Python do"
    )]
    Underscores(String),
    /// It does not end.
    #[error("does not end: {FUEL} steps or {MOST_OUTPUT} bytes were not enough for four messages")]
    Endless,
}

/// The chat templates of a model, Jinja.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Templates {
    /// The one that is taken unless another is asked for.
    pub default: Option<String>,
    /// The others, by name: letters, digits and `_`.
    pub named: Vec<(String, String)>,
}

impl Templates {
    /// transformers lets `chat_template.jinja` win over `tokenizer_config.json`; so do we, and say when they differ.
    pub(super) fn from_folder(dir: &Path, tokenizer_config: &Map<String, Json>) -> Result<Self, VocabError> {
        let inline = Self::inline(tokenizer_config.get("chat_template"));
        let path = dir.join("chat_template.jinja");
        let old = dir.join("chat_template.json");
        let templates = if path.is_file() {
            let files = Self {
                default: Some(text(&path)?),
                named: additional(dir)?,
            };
            if inline != Self::default() && inline != files {
                tracing::warn!(
                    "chat_template.jinja and tokenizer_config.json differ: chat_template.jinja is taken, as transformers does"
                );
            }
            files
        } else if inline == Self::default() && old.is_file() {
            Self::inline(read_json_object(&old)?.get("chat_template"))
        } else {
            inline
        };
        templates.lint(&At(dir.to_path_buf()))?;
        Ok(templates)
    }

    /// A text, or a list of objects with `name` and `template`.
    fn inline(json: Option<&Json>) -> Self {
        let mut templates = Self::default();
        match json {
            Some(Json::String(template)) => templates.default = Some(template.clone()),
            Some(Json::Array(list)) => {
                for entry in list {
                    let text = |key: &str| entry.get(key).and_then(Json::as_str);
                    match (text("name"), text("template")) {
                        (Some("default"), Some(template)) => templates.default = Some(template.to_owned()),
                        (Some(name), Some(template)) => {
                            templates.named.push((plain(name), template.to_owned()));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        templates
    }

    /// The templates of a GGUF file.
    pub(super) fn from_gguf(gguf: &Gguf) -> Result<Self, VocabError> {
        let mut templates = Self::default();
        for (key, value) in gguf.metadata() {
            let name = match key.strip_prefix("tokenizer.chat_template") {
                Some("") => None,
                Some(rest) if rest.starts_with('.') => Some(plain(&rest[1..])),
                _ => continue,
            };
            let Some(template) = value.as_str() else {
                return Err(gguf.key_error(key, "is no text").into());
            };
            match name {
                None => templates.default = Some(template.to_owned()),
                Some(name) => templates.named.push((name, template.to_owned())),
            }
        }
        templates.lint(&At(gguf.path().to_path_buf()))?;
        Ok(templates)
    }

    /// The keys of a GGUF file (gguf-py gguf_writer.py, `add_chat_template`).
    pub(super) fn to_metadata(&self) -> Vec<(String, Value)> {
        let named = self.named.iter();
        let mut keys: Vec<(String, Value)> = named
            .map(|(name, template)| {
                (
                    format!("tokenizer.chat_template.{name}"),
                    template.as_str().into(),
                )
            })
            .collect();
        if !self.named.is_empty() {
            let names: Vec<_> = self.named.iter().map(|(name, _)| name.clone()).collect();
            keys.push(("tokenizer.chat_templates".into(), names.into()));
        }
        if let Some(template) = &self.default {
            keys.push(("tokenizer.chat_template".into(), template.as_str().into()));
        }
        keys
    }

    /// Refuses templates that no runtime should run, and warns of those that no conversation satisfies.
    fn lint(&self, at: &At) -> Result<(), VocabError> {
        let default = self.default.iter().map(|template| ("default", template));
        let named = self
            .named
            .iter()
            .map(|(name, template)| (name.as_str(), template));
        for (name, template) in default.chain(named) {
            match lint(template) {
                Ok(None) => {}
                Ok(Some(why)) => {
                    tracing::warn!("the chat template {name:?} refuses a plain conversation: {why}")
                }
                Err(source) => {
                    return Err(VocabError::Template {
                        path: at.0.clone(),
                        name: name.to_owned(),
                        source,
                    });
                }
            }
        }
        Ok(())
    }
}

/// The files beside `chat_template.jinja`, by name.
fn additional(dir: &Path) -> Result<Vec<(String, String)>, VocabError> {
    let dir = dir.join("additional_chat_templates");
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let failed = |source| CheckpointError::Read {
        path: dir.clone(),
        source,
    };
    let mut named = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "jinja") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            named.push((plain(&name), text(&path)?));
        }
    }
    named.sort();
    Ok(named)
}

fn text(path: &Path) -> Result<String, VocabError> {
    let read = std::fs::read_to_string(path);
    Ok(read.map_err(|source| CheckpointError::Read {
        path: path.to_path_buf(),
        source,
    })?)
}

/// A name as GGUF's keys have it.
fn plain(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    name.chars().map(plain).collect()
}

/// Statements that load other templates.
static LOADS: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"\{%[-+]?\s*(include|import|from|extends)\b").ok());
/// Attributes of two underscores, however they are asked for.
static UNDERSCORES: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r#"(?:\.\s*|\[\s*['"]|attr\s*\(\s*['"])(__\w+)"#).ok());

/// Checks one template. What it says when it refuses a plain conversation is no error: templates do so on purpose
/// (`raise_exception`).
fn lint(template: &str) -> Result<Option<String>, TemplateError> {
    if template.len() > LONGEST {
        return Err(TemplateError::Long(template.len()));
    }
    let first = |pattern: &LazyLock<Option<Regex>>| {
        let found = pattern.as_ref()?.captures(template)?;
        Some(found.get(1)?.as_str().to_owned())
    };
    if let Some(statement) = first(&LOADS) {
        return Err(TemplateError::Loads(statement));
    }
    if let Some(attribute) = first(&UNDERSCORES) {
        return Err(TemplateError::Underscores(attribute));
    }
    let environment = environment(template).map_err(|error| TemplateError::Syntax(error.to_string()))?;
    let mut refusal = None;
    // Some models have no system role, some must have one.
    for with_system in [true, false] {
        match render(&environment, with_system) {
            Ok(()) => return Ok(None),
            Err(error) if endless(&error) => return Err(TemplateError::Endless),
            Err(error) => refusal = Some(error.detail().unwrap_or(&error.to_string()).to_owned()),
        }
    }
    Ok(refusal)
}

/// Jinja as transformers has it, and as the runtime does it.
fn environment(template: &str) -> Result<Environment<'_>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |_: String| "25 Nov 2026");
    environment.add_template("chat", template)?;
    Ok(environment)
}

fn render(environment: &Environment<'_>, with_system: bool) -> Result<(), Error> {
    let system = [("system", "You help.")];
    let rest = [
        ("user", "Turn on the light."),
        ("assistant", "It is on."),
        ("user", "Thanks! Ünïcödé 🙂"),
    ];
    let messages: Vec<_> = system
        .iter()
        .filter(|_| with_system)
        .chain(&rest)
        .map(|&(role, content)| context! { role => role, content => content })
        .collect();
    let context = context! {
        messages => messages, add_generation_prompt => true, bos_token => "<s>", eos_token => "</s>",
    };
    let mut out = Bounded(0);
    environment
        .get_template("chat")?
        .render_captured_to(context, &mut out)
        .map(|_| ())
}

fn endless(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::OutOfFuel | ErrorKind::WriteFailure)
}

/// Counts what is written, up to [`MOST_OUTPUT`].
struct Bounded(usize);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        if self.0 > MOST_OUTPUT {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
        message['content'].strip() + '<|im_end|>' + '\n' }}{% endfor %}";

    #[test]
    fn plain_templates_pass_and_those_that_raise_are_told_of() {
        assert_eq!(lint(CHATML).unwrap(), None);
        let no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}";
        assert_eq!(
            lint(no_system).unwrap(),
            None,
            "one of the two conversations passes"
        );
        let never = lint("{{ raise_exception('never') }}").unwrap();
        assert_eq!(never.as_deref(), Some("never"));
        assert!(lint("{{ messages | no_such_filter }}").unwrap().is_some());
        assert!(lint("{{ messages[0].no_such_method() }}").unwrap().is_some());
    }

    #[test]
    fn hostile_templates_are_refused() {
        for statement in [
            "{% include 'x' %}",
            "{%- import 'x' as y %}",
            "{%+ from 'x' import y %}",
            "{% extends 'x' %}",
        ] {
            assert!(
                matches!(lint(statement), Err(TemplateError::Loads(_))),
                "{statement}"
            );
        }
        for expression in [
            "{{ ''.__class__.__mro__ }}",
            "{{ ''['__class__'] }}",
            "{{ messages|attr(\"__init__\") }}",
            "{{ cycler . __init__.__globals__ }}",
        ] {
            assert!(
                matches!(lint(expression), Err(TemplateError::Underscores(_))),
                "{expression}"
            );
        }
        let long = " ".repeat(LONGEST + 1);
        assert!(matches!(lint(&long), Err(TemplateError::Long(_))));
        assert!(matches!(lint("{% if %}"), Err(TemplateError::Syntax(_))));
    }

    #[test]
    fn endless_templates_are_refused() {
        for template in [
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "{% for i in range(9999) %}{{ 'x' * 100000 }}{% endfor %}",
            "{% macro f() %}{% for i in range(999) %}{{ g() }}{% endfor %}{% endmacro %}{% macro g() %}{% for i in range(9999) %}x{% endfor %}{% endmacro %}{{ f() }}",
        ] {
            assert!(
                matches!(lint(template), Err(TemplateError::Endless)),
                "{template}: {:?}",
                lint(template)
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[-{}%#a-z_.'\\[\\]|() 0-9\n]{0,80}") {
            let _ = lint(&text);
        }
    }
}
