//! Home Assistant: the message by which it finds a device and shows it, with what the device says of itself and a way to
//! ask.
//!
//! In: the configuration and what is installed. Out: the payload of MQTT device discovery. All entities read the device's
//! own topics through templates, which Home Assistant runs; nothing else is published for it.
//! Source: Home Assistant, "MQTT discovery" (device discovery, since 2024.12) and the pages of the platforms sensor,
//! select, text and notify; `homeassistant/components/mqtt`, whose schemas check the fixture.

use serde_json::{Value, json};

use crate::config::Config;
use crate::wire::Topics;
use crate::wire::device::Board;

/// Most characters of a state and of a text.
const STATE_CHARACTERS: u32 = 255;
/// The end of the topic on which the answers to questions from Home Assistant come.
const ANSWERS: &str = "home-assistant";

/// What the device's entities depend on.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The machine.
    pub board: &'a Board,
    /// Whether it measures its temperature, and the power that it draws.
    pub sensors: (bool, bool),
    /// Ids of the installed models; empty where the configuration names a file.
    pub models: &'a [String],
}

/// The topic of a device's discovery message.
pub fn topic(config: &Config) -> String {
    format!(
        "{}/device/{}/config",
        config.home_assistant.prefix,
        object_id(config)
    )
}

/// The topic on which Home Assistant says that it has begun.
pub fn birth(config: &Config) -> String {
    format!("{}/status", config.home_assistant.prefix)
}

/// Root and device as Home Assistant takes them in a topic and in ids: `[a-zA-Z0-9_-]+`.
fn object_id(config: &Config) -> String {
    let letter = |letter: char| match letter.is_ascii_alphanumeric() || letter == '-' {
        true => letter,
        false => '_',
    };
    format!("{}-{}", config.root, config.device)
        .chars()
        .map(letter)
        .collect()
}

/// The discovery message.
pub fn discovery(facts: &Facts<'_>) -> Value {
    let config = facts.config;
    let topics = Topics::new(&config.root, &config.device);
    let version = env!("CARGO_PKG_VERSION");
    let mut components = json!({});
    for (key, mut entity) in entities(facts, &topics) {
        // It is not one of the options that entities share.
        entity["qos"] = json!(1);
        entity["unique_id"] = json!(format!("{}_{key}", object_id(config)));
        components[key] = entity;
    }
    json!({
        "device": {
            "identifiers": [object_id(config)],
            "name": config.device,
            "manufacturer": "Pipit",
            "model": facts.board.name.as_deref().unwrap_or(&facts.board.arch),
            "sw_version": version,
        },
        "origin": {"name": "pipit", "sw_version": version},
        "availability": [{
            "topic": topics.status(),
            "value_template": "{{ 'offline' if value_json.state == 'offline' else 'online' }}",
        }],
        "components": components,
    })
}

fn entities(facts: &Facts<'_>, topics: &Topics) -> Vec<(&'static str, Value)> {
    let mut entities = vec![
        ("state", state(topics)),
        ("model_name", model_name(topics)),
        ("answer", answer(topics)),
        ("prompt", prompt(topics)),
        ("ask", ask(topics)),
    ];
    if facts.config.metrics.interval_s > 0 {
        entities.extend(measured(facts, topics));
    }
    if facts.config.admin.over_mqtt && !facts.models.is_empty() {
        entities.push(("model", model(topics, facts.models)));
    }
    entities
}

fn state(topics: &Topics) -> Value {
    json!({
        "platform": "sensor",
        "name": "State",
        "icon": "mdi:state-machine",
        "entity_category": "diagnostic",
        "device_class": "enum",
        "options": ["online", "loading", "ready", "degraded"],
        "state_topic": topics.status(),
        // Gone is what the availability says.
        "value_template": "{{ value_json.state if value_json.state != 'offline' else None }}",
        "json_attributes_topic": topics.status(),
    })
}

fn model_name(topics: &Topics) -> Value {
    json!({
        "platform": "sensor",
        "name": "Model name",
        "icon": "mdi:brain",
        "entity_category": "diagnostic",
        "state_topic": topics.card(),
        "value_template": "{{ value_json.model.name }}",
        "json_attributes_topic": topics.card(),
        "json_attributes_template": "{{ value_json.model | to_json }}",
    })
}

/// The last answer. A state is short: all of it, and who wrote it, is in the attributes.
fn answer(topics: &Topics) -> Value {
    let text = "value_json.choices[0].message.content if value_json.choices is defined else value_json.error.message";
    let text = format!("{{% set text = {text} %}}");
    json!({
        "platform": "sensor",
        "name": "Answer",
        "icon": "mdi:message-reply-text",
        "state_topic": topics.answer(ANSWERS),
        "value_template": format!("{text}{{{{ text | truncate({STATE_CHARACTERS}, true, '…', 0) }}}}"),
        "json_attributes_topic": topics.answer(ANSWERS),
        "json_attributes_template": format!(
            "{text}{{{{ {{'answer': text, 'ai_generated': value_json.ai_generated | default(false), \
             'error': value_json.error.code if value_json.error is defined else none, \
             'model': value_json.model | default(none), 'model_sha256': value_json.model_sha256 | default(none)}} \
             | to_json }}}}"
        ),
    })
}

/// How a text of Home Assistant becomes a request.
fn request_template(topics: &Topics) -> String {
    format!(
        "{{{{ {{'messages': [{{'role': 'user', 'content': value}}], 'reply_to': '{}'}} | to_json }}}}",
        topics.answer(ANSWERS)
    )
}

fn prompt(topics: &Topics) -> Value {
    json!({
        "platform": "text",
        "name": "Prompt",
        "icon": "mdi:message-text",
        "max": STATE_CHARACTERS,
        "command_topic": topics.request(),
        "command_template": request_template(topics),
    })
}

/// The same for automations, without a bound on the text: the action `notify.send_message`.
fn ask(topics: &Topics) -> Value {
    json!({
        "platform": "notify",
        "name": "Ask",
        "icon": "mdi:message-question",
        "command_topic": topics.request(),
        "command_template": request_template(topics),
    })
}

fn model(topics: &Topics, models: &[String]) -> Value {
    json!({
        "platform": "select",
        "name": "Model",
        "icon": "mdi:brain",
        "entity_category": "config",
        "options": models,
        "command_topic": topics.command("model"),
        "command_template": "{{ {'action': 'activate', 'model': value} | to_json }}",
        // What is served, whatever was chosen: a model that does no good is given up.
        "state_topic": topics.card(),
        "value_template": "{{ value_json.model.id | default(none) }}",
    })
}

fn measured(facts: &Facts<'_>, topics: &Topics) -> Vec<(&'static str, Value)> {
    let sensor = |name: &str, template: &str, more: Value| {
        let mut sensor = json!({
            "platform": "sensor",
            "name": name,
            "entity_category": "diagnostic",
            "state_class": "measurement",
            "state_topic": topics.metrics(),
            "value_template": template,
            // Two messages may be lost.
            "expire_after": facts.config.metrics.interval_s.saturating_mul(3),
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            sensor[key] = value.clone();
        }
        sensor
    };
    let mut sensors = vec![
        (
            "speed",
            sensor(
                "Speed",
                "{{ value_json.tokens_per_second }}",
                json!({"unit_of_measurement": "tokens/s", "icon": "mdi:speedometer"}),
            ),
        ),
        (
            "queue",
            sensor(
                "Queue",
                "{{ value_json.waiting + value_json.running }}",
                json!({"unit_of_measurement": "requests", "icon": "mdi:tray-full"}),
            ),
        ),
        (
            "memory",
            sensor(
                "Memory",
                "{{ (value_json.daemon_resident_bytes | default(0)) + (value_json.worker_resident_bytes | default(0)) }}",
                json!({"unit_of_measurement": "B", "device_class": "data_size", "suggested_unit_of_measurement": "MiB"}),
            ),
        ),
    ];
    let (temperature, power) = facts.sensors;
    if temperature {
        let more = json!({"unit_of_measurement": "°C", "device_class": "temperature"});
        sensors.push((
            "temperature",
            sensor("Temperature", "{{ value_json.temperature_c }}", more),
        ));
    }
    if power {
        let more = json!({"unit_of_measurement": "W", "device_class": "power"});
        sensors.push(("power", sensor("Power", "{{ value_json.power_w }}", more)));
    }
    sensors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts<'a>(config: &'a Config, board: &'a Board, models: &'a [String]) -> Facts<'a> {
        Facts {
            config,
            board,
            sensors: (true, true),
            models,
        }
    }

    /// What Home Assistant's own code has looked at: tests/home-assistant, which runs it.
    #[test]
    fn the_message_is_the_one_that_was_checked() {
        let mut config = Config {
            device: "kitchen".to_owned(),
            ..Config::default()
        };
        config.admin.over_mqtt = true;
        let board = Board {
            name: Some("Raspberry Pi 5 Model B".to_owned()),
            ..Board::default()
        };
        let models = ["home-1".to_owned(), "home-2".to_owned()];
        let message = discovery(&facts(&config, &board, &models));
        let text = serde_json::to_string_pretty(&message).unwrap() + "\n";
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/home-assistant.json");
        if std::env::var_os("PIPIT_WRITE_REFERENCE").is_some() {
            std::fs::write(file, &text).unwrap();
        }
        assert!(
            std::fs::read_to_string(file).is_ok_and(|found| found == text),
            "{file} is stale; hint: PIPIT_WRITE_REFERENCE=1 cargo test -p pipit --lib, then ./check --references"
        );
    }

    #[test]
    fn only_what_is_there_is_shown() {
        let mut config = Config::default();
        config.metrics.interval_s = 0;
        let board = Board::default();
        let shown = discovery(&facts(&config, &board, &["m".to_owned()]));
        let keys: Vec<&str> = shown["components"]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        // No figures are sent, and nobody may change the model.
        assert_eq!(keys, ["state", "model_name", "answer", "prompt", "ask"]);
        config.metrics.interval_s = 30;
        config.admin.over_mqtt = true;
        let mut bare = facts(&config, &board, &[]);
        bare.sensors = (false, false);
        let shown = discovery(&bare);
        assert!(shown["components"].get("speed").is_some());
        for absent in ["model", "temperature", "power"] {
            assert!(shown["components"].get(absent).is_none(), "{absent}");
        }
    }

    #[test]
    fn names_are_such_as_home_assistant_takes() {
        let config = Config {
            root: "home/pipit".to_owned(),
            device: "hall.1".to_owned(),
            ..Config::default()
        };
        assert_eq!(topic(&config), "homeassistant/device/home_pipit-hall_1/config");
        assert_eq!(birth(&config), "homeassistant/status");
    }
}
