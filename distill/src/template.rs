//! The model's own chat template, rendered as transformers renders it.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use pipit_convert::checkpoint::read_json_object;
use serde::Serialize as _;

use crate::data::DataError;

const NAME: &str = "chat_template";
/// Instructions that a template may run for one conversation, against templates that never end.
const FUEL: u64 = 50_000_000;

/// A chat template with the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Vec<(String, String)>,
}

impl ChatTemplate {
    /// `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`; none when there is neither.
    pub fn open(dir: &Path) -> Result<Option<Self>, DataError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = match config_path.is_file() {
            true => read_json_object(&config_path)?,
            false => serde_json::Map::new(),
        };
        let file = dir.join("chat_template.jinja");
        let source = if file.is_file() {
            std::fs::read_to_string(&file).map_err(|source| DataError::Read { path: file, source })?
        } else {
            // A string, or a list of named ones, of which `default` is meant.
            let named = |value: &serde_json::Value| {
                let list = value.as_array()?;
                let default = list
                    .iter()
                    .find(|item| item["name"] == "default")
                    .or(list.first())?;
                default["template"].as_str().map(str::to_owned)
            };
            let value = config.get("chat_template");
            match value.and_then(|value| value.as_str().map(str::to_owned).or_else(|| named(value))) {
                Some(source) => source,
                None => return Ok(None),
            }
        };
        let special = config
            .iter()
            .filter(|(key, _)| key.ends_with("_token"))
            .filter_map(|(key, value)| {
                let text = value.as_str().or_else(|| value["content"].as_str())?;
                Some((key.clone(), text.to_owned()))
            });
        Self::new(source, special.collect()).map(Some)
    }

    fn new(source: String, special: Vec<(String, String)>) -> Result<Self, DataError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|e| DataError::Template { why: describe(&e) })?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs());
            strftime(&format, now)
        });
        environment
            .add_template_owned(NAME, source)
            .map_err(|e| DataError::Template { why: describe(&e) })?;
        Ok(Self { environment, special })
    }

    /// The text of a conversation, whose assistant may call `tools`; with `add_generation_prompt` it ends where
    /// the answer begins.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String, DataError> {
        let tools = tools.map_or(Value::from(()), |tools| Value::from(Serde(tools)));
        let special = Value::from_pairs(self.special.iter().map(|(key, text)| (key.clone(), text.clone())));
        let values = context! {
            messages => Value::from(Serde(messages)), add_generation_prompt => add_generation_prompt, tools => tools, documents => (), ..special
        };
        let template = self.environment.get_template(NAME);
        template
            .and_then(|t| t.render(values))
            .map_err(|e| DataError::Template { why: describe(&e) })
    }
}

fn describe(error: &Error) -> String {
    match error.line() {
        Some(line) => format!("line {line}: {error}"),
        None => error.to_string(),
    }
}

/// `tojson` as transformers defines it: Python's `json.dumps(…, ensure_ascii=False)`, not HTML-safe.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
fn to_json(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let bad = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let indent = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
                .map_err(bad)?;
        }
        None => {
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonJson))
                .map_err(bad)?;
        }
    }
    let text = String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// Python's separators: `", "` and `": "`.
struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// The directives that chat templates use, of a time in seconds since 1970, UTC.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let days = seconds / 86_400;
    // Howard Hinnant's civil_from_days.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", seconds / 3600 % 24),
            Some('M') => out += &format!("{:02}", seconds / 60 % 60),
            Some('S') => out += &format!("{:02}", seconds % 60),
            Some('%') => out.push('%'),
            other => {
                let what = format!(
                    "strftime_now: the directive %{} is not supported",
                    other.unwrap_or(' ')
                );
                return Err(Error::new(ErrorKind::InvalidOperation, what));
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn renders_as_transformers_does() {
        let source = "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ bos_token + m['content'].strip() }}\n  {% endif %}\n{% endfor %}\n{{ messages[0] | tojson }}{% if add_generation_prompt %}>{% endif %}";
        let template = ChatTemplate::new(source.into(), vec![("bos_token".into(), "<s>".into())]).unwrap();
        let messages = [json!({"role": "user", "content": " é <b> "})];
        // transformers' apply_chat_template gives this text.
        assert_eq!(
            template.render(&messages, None, true).unwrap(),
            "<s>é <b>\n{\"role\": \"user\", \"content\": \" é <b> \"}>"
        );
    }

    #[test]
    fn a_template_that_refuses_or_never_ends_is_an_error() {
        let template = ChatTemplate::new("{{ raise_exception('no system role') }}".into(), vec![]).unwrap();
        assert!(
            template
                .render(&[], None, false)
                .unwrap_err()
                .to_string()
                .contains("no system role")
        );
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert!(
            ChatTemplate::new(endless.into(), vec![])
                .unwrap()
                .render(&[], None, false)
                .is_err()
        );
    }

    #[test]
    fn dates_are_pythons() {
        assert_eq!(
            strftime("%d %b %Y, %A %H:%M:%S", 1_709_210_096).unwrap(),
            "29 Feb 2024, Thursday 12:34:56"
        );
        assert!(strftime("%j", 0).is_err());
    }
}
