//! Variables of the environment become settings.

use serde::Deserialize as _;
use toml::de::ValueDeserializer;

use super::keys::{Key, Keys};
use super::layers::typed;
use super::{Origin, Setting};

/// What variables set: `PIPIT_SECTION__KEY`, and `PIPIT_KEY` for the keys above all sections. `PIPIT_BROKER` is short
/// for `PIPIT_BROKER__URL` and comes before it. An empty variable sets nothing.
pub(super) fn settings(variables: &[(String, String)], keys: &Keys) -> Vec<Setting> {
    let mut settings = Vec::new();
    for (name, text) in variables {
        let Some(rest) = name.strip_prefix("PIPIT_").filter(|_| !text.is_empty()) else {
            continue;
        };
        let rest = rest.to_ascii_lowercase();
        let key = match rest.split_once("__") {
            Some((section, key)) => Key::in_section(section, key),
            None if rest == "broker" => Key::parse("broker.url"),
            // Others are no settings: PIPIT_LOG, and what scripts use.
            None if keys.has(&Key::top(&rest)) => Key::top(rest),
            None => continue,
        };
        settings.push(Setting {
            value: from_text(&key, text),
            key,
            origin: Origin::Variable { name: name.clone() },
        });
    }
    settings.sort_by_key(|setting| match &setting.origin {
        Origin::Variable { name } => (!name.contains("__"), name.clone()),
        _ => (true, String::new()),
    });
    settings
}

/// The text of a variable as TOML where that is what the key takes, else as it stands: `512`, `["reply/"]`,
/// `mqtt://broker`.
fn from_text(key: &Key, text: &str) -> toml::Value {
    let plain = toml::Value::String(text.to_owned());
    match ValueDeserializer::parse(text).and_then(toml::Value::deserialize) {
        Ok(value) if typed([(key, &value)]).is_ok() || typed([(key, &plain)]).is_err() => value,
        _ => plain,
    }
}
