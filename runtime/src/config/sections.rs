//! The sections of the configuration: what can be set, in which unit, and what it is when nobody says.
//!
//! `default.toml` beside this file says the same to a user; a test compares the two.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::EMBEDDED;

/// `[broker]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BrokerSection {
    /// `mqtt://HOST[:PORT]`, `mqtts://HOST[:PORT]` or `embedded[://ADDR:PORT]`
    pub url: String,
    /// User name.
    pub username: Option<String>,
    /// File that holds the password, or `credential:NAME`.
    pub password_file: Option<PathBuf>,
    /// PEM file with the authorities to trust for `mqtts://`; the system's by default.
    pub ca: Option<PathBuf>,
    /// PEM file with this device's certificate.
    pub certificate: Option<PathBuf>,
    /// PEM file with its private key, or `credential:NAME`.
    pub key: Option<PathBuf>,
    /// Seconds between two signs of life, 5 to 3600.
    pub keep_alive_s: u16,
    /// Seconds that the broker keeps requests for a device that is away.
    pub session_expiry_s: u32,
}

impl Default for BrokerSection {
    fn default() -> Self {
        Self {
            url: if cfg!(feature = "embedded-broker") {
                EMBEDDED
            } else {
                "mqtt://127.0.0.1:1883"
            }
            .to_owned(),
            username: None,
            password_file: None,
            ca: None,
            certificate: None,
            key: None,
            keep_alive_s: 30,
            session_expiry_s: 7 * 24 * 3600,
        }
    }
}

/// `[model]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// The GGUF file.
    pub path: Option<PathBuf>,
    /// Context in tokens, shared by all requests under way. One request gets at most what the model was trained for.
    pub n_ctx: u32,
    /// Requests under way at a time.
    pub slots: u32,
    /// Threads; 0 is one for each fast physical core.
    pub threads: u32,
    /// Type of the keys in the KV cache: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl.
    pub cache_type_k: String,
    /// Type of the values in the KV cache.
    pub cache_type_v: String,
    /// Most tokens of prefill in one step.
    pub prefill_chunk: u32,
    /// Milliseconds that one step of prefill should take at most: between two steps other requests get their next token.
    pub prefill_ms: u32,
    /// Bytes of memory that the model may take; 0 is what is available when it is loaded.
    pub memory_bytes: u64,
    /// Seconds without a request after which the model is unloaded, until the next request; 0 is never.
    pub idle_unload_s: u64,
    /// Seconds without a sign of life after which the worker is ended and started anew.
    pub hang_s: u64,
}

impl Default for ModelSection {
    fn default() -> Self {
        Self {
            path: None,
            n_ctx: 2048,
            slots: 8,
            threads: 0,
            cache_type_k: "f16".to_owned(),
            cache_type_v: "f16".to_owned(),
            prefill_chunk: 512,
            prefill_ms: 500,
            memory_bytes: 0,
            idle_unload_s: 0,
            hang_s: 120,
        }
    }
}

/// `[install]`: which models may be installed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InstallSection {
    /// minisign public keys whose signature makes a model good.
    pub trusted_keys: Vec<String>,
    /// Whether a model without a signature is taken.
    pub allow_unsigned: bool,
}

/// `[admin]`: who may change the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminSection {
    /// Whether the topics `cmd/…` are listened to.
    pub over_mqtt: bool,
}

/// `[pool]`: devices that share one request topic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PoolSection {
    /// Its name, `[A-Za-z0-9_.-]{1,64}`; none is no pool.
    pub name: Option<String>,
    /// Requests that this device holds, without taking them, for whoever is free first, 1 to 1024.
    pub hold: u16,
}

impl Default for PoolSection {
    fn default() -> Self {
        Self { name: None, hold: 8 }
    }
}

/// `[http]`: programs that ask as they would ask OpenAI.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpSection {
    /// `ADDR:PORT`, or `unix:/FILE`; nowhere by default.
    pub listen: Option<String>,
    /// File that holds the key which a client must show, or `credential:NAME`.
    pub key_file: Option<PathBuf>,
    /// Whether other machines may reach `listen`.
    pub beyond_localhost: bool,
}

/// `[home_assistant]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HomeAssistantSection {
    /// Whether a discovery message is published.
    pub discovery: bool,
    /// Where Home Assistant looks for it.
    pub prefix: String,
}

impl Default for HomeAssistantSection {
    fn default() -> Self {
        Self {
            discovery: false,
            prefix: "homeassistant".to_owned(),
        }
    }
}

/// `[prefix]`: beginnings of prompts, kept as KV so that the next request which begins so need not compute them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixSection {
    /// Bytes of them in memory, beside the context; 0 is none.
    pub ram_bytes: u64,
    /// Shortest one that is written to the disk, in tokens.
    pub disk_tokens: u32,
    /// Bytes of them on the disk, where they live through a restart; 0 is none.
    pub disk_bytes: u64,
}

impl Default for PrefixSection {
    fn default() -> Self {
        Self {
            ram_bytes: 32 * 1024 * 1024,
            disk_tokens: 128,
            disk_bytes: 128 * 1024 * 1024,
        }
    }
}

/// `[sampling]`: what a request gets that does not say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingSection {
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: i32,
    /// 0 keeps all.
    pub min_p: f32,
    /// Divides the logits of tokens seen before; 1 is off.
    pub repeat_penalty: f32,
    /// Subtracted once for each time that a token was seen; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from tokens seen at all; 0 is off.
    pub presence_penalty: f32,
    /// How many of the last tokens count as seen; 0 is none, -1 all.
    pub repeat_last_n: i32,
}

impl Default for SamplingSection {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 0.95,
            top_k: 40,
            min_p: 0.05,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 64,
        }
    }
}

/// `[reply]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplySection {
    /// Topics under which a client may ask for its answer, besides the device's own `res/`.
    pub prefixes: Vec<String>,
    /// What stands behind every answer in plain text, on a line of its own; empty for nothing.
    pub disclosure: String,
}

/// `[content]`: what people wrote and were answered, kept in words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContentSection {
    /// Hours that it is kept in the state folder; 0 keeps nothing.
    pub hours: u64,
}

impl Default for ReplySection {
    fn default() -> Self {
        Self {
            prefixes: vec!["reply/".to_owned()],
            disclosure: String::new(),
        }
    }
}

/// `[journal]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JournalSection {
    /// Bytes of requests and answers that are kept; when what is owed to clients is more, the answer is `queue_full`.
    pub bytes: usize,
    /// Hours that a delivered answer is kept, for requests that come again.
    pub answer_hours: u64,
}

impl Default for JournalSection {
    fn default() -> Self {
        Self {
            bytes: 16 * 1024 * 1024,
            answer_hours: 24,
        }
    }
}

/// `[metrics]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsSection {
    /// Seconds between two messages; 0 sends none.
    pub interval_s: u64,
    /// File of the sensor that measures what the board draws; by default the one nearest to the whole board.
    pub energy_sensor: Option<PathBuf>,
}

impl Default for MetricsSection {
    fn default() -> Self {
        Self {
            interval_s: 30,
            energy_sensor: None,
        }
    }
}
