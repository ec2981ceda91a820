//! The JSON schemas in docs/reference: made of the wire's types, current, and of one mind with the parser.

use std::path::PathBuf;

use jsonschema::Validator;
use proptest::prelude::*;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};
use serde_json::{Value, json};

use super::answer::{AssistantMessage, Choice, ChunkChoice, Delta};
use super::body::{NamedSchema, Part, ResponseFormat, Stop, Turn};
use super::command::{self, CommandAnswer, Drain, Erase, ModelAction};
use super::*;

/// Writes the files instead of comparing with them.
const WRITE: &str = "PIPIT_WRITE_REFERENCE";

/// What a client sends.
fn sent<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12()
        .for_deserialize()
        .into_generator()
        .into_root_schema_for::<T>()
}

/// What a device sends: a field is required when it is always there.
fn received<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12()
        .for_serialize()
        .into_generator()
        .into_root_schema_for::<T>()
}

/// A command: the fields of its verb, and those of every command.
#[derive(serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(
    dead_code,
    reason = "only its schema is of use: the parser takes the two apart"
)]
struct Command<T> {
    /// What is to be done.
    #[serde(flatten)]
    verb: T,
    /// The command's name, for its answer; made when absent.
    #[schemars(with = "String", regex(pattern = r"^[A-Za-z0-9_.-]{1,64}$"))]
    #[serde(default)]
    id: Option<String>,
    /// Where the answer goes, for clients without MQTT 5.
    #[schemars(with = "String")]
    #[serde(default)]
    reply_to: Option<String>,
}

fn all() -> [(&'static str, Schema); 13] {
    [
        ("request", sent::<Body>()),
        ("cancel", sent::<Cancel>()),
        ("command-model", sent::<Command<ModelAction>>()),
        ("command-erase", sent::<Command<Erase>>()),
        ("command-drain", sent::<Command<Drain>>()),
        ("command-answer", received::<CommandAnswer>()),
        ("answer", received::<Completion>()),
        ("chunk", received::<Chunk>()),
        ("error", received::<ErrorAnswer>()),
        ("status", received::<Status>()),
        ("card", received::<Card>()),
        ("metrics", received::<Metrics>()),
        ("member", received::<pool::Member>()),
    ]
}

fn validator(name: &str) -> Validator {
    let (_, schema) = all().into_iter().find(|(known, _)| *known == name).unwrap();
    jsonschema::validator_for(schema.as_value()).unwrap()
}

/// Descriptions are broken where the source's lines are.
fn join_lines(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if name == "description" => *text = text.replace('\n', " "),
                    value => join_lines(value),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(join_lines),
        _ => {}
    }
}

#[test]
fn the_files_are_current() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/reference");
    for (name, schema) in all() {
        let file = folder.join(format!("{name}.schema.json"));
        let mut schema = schema.to_value();
        join_lines(&mut schema);
        // A schema again, for the order of its keywords.
        let schema = Schema::try_from(schema).unwrap();
        let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(&file, text).unwrap();
            continue;
        }
        assert!(
            std::fs::read_to_string(&file).is_ok_and(|found| found == text),
            "{} is stale; hint: {WRITE}=1 cargo test -p pipit --lib reference",
            file.display()
        );
    }
}

fn parses(body: &Value) -> Result<(), String> {
    let (topics, limits) = (Topics::new("pipit", "dev"), Limits::default());
    let payload = body.to_string();
    let envelope = Envelope {
        payload: payload.as_bytes(),
        ..Envelope::default()
    };
    let rules = Rules {
        topics: &topics,
        prefixes: &["reply/".to_owned()],
        limits: &limits,
        adapters: &["home".to_owned()],
    };
    match request::parse(&envelope, &rules) {
        Ok(_) => Ok(()),
        Err(rejection) => Err(rejection.message),
    }
}

/// A request that differs from a good one in these fields.
fn with(fields: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
    for (field, value) in fields.as_object().unwrap() {
        body[field] = value.clone();
    }
    body
}

#[test]
fn parser_and_schema_take_the_same_bodies() {
    let request = validator("request");
    let taken = [
        json!({}),
        json!({"id": "a.B-9_", "reply_to": "reply/me", "stream": true, "seed": -1, "stop": "\n", "priority": -100}),
        json!({"id": null, "stop": null, "seed": null, "stream": null, "response_format": null, "adapter": null}),
        json!({"stop": []}),
        json!({"stop": ["a", "b"]}),
        json!({"temperature": 0, "top_p": 1, "top_k": 40.0, "min_p": 0.05, "max_tokens": 1, "deadline_ms": 0}),
        json!({"repeat_penalty": 1.1, "frequency_penalty": -2, "presence_penalty": 2.0, "repeat_last_n": -1}),
        json!({"seed": i64::MAX}),
        json!({"max_completion_tokens": u32::MAX, "deadline_ms": u32::MAX}),
        json!({"adapter": "home"}),
        json!({"model": "x", "user": 7, "metadata": {}, "store": true, "service_tier": "auto", "stream_options": {}}),
        json!({"tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "logprobs": false}),
        json!({"top_logprobs": 0, "logit_bias": {}, "n": 1}),
        json!({"response_format": {"type": "text"}}),
        json!({"response_format": {"type": "json_object"}}),
        json!({"response_format": {"type": "json_object", "schema": {"type": "object"}}}),
        json!({"response_format": {"type": "json_object", "schema": null}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
        json!({"response_format": {"type": "json_schema", "json_schema":
            {"name": "n", "description": "d", "strict": false, "schema": {"$ref": "#/$defs/a", "$defs": {"a": true}}}}}),
        json!({"messages": [{"role": "developer", "content": "x"}, {"role": "assistant", "content": "x", "name": "y"}]}),
        json!({"messages": [{"role": "system", "content": [{"type": "text", "text": "x"}], "name": null}]}),
        json!({"messages": [{"role": "user", "content": []}]}),
    ];
    let refused = [
        json!({"messages": null}),
        json!({"messages": []}),
        json!({"messages": "x"}),
        json!({"messages": [{"role": "tool", "content": "x"}]}),
        json!({"messages": [{"role": "user"}]}),
        json!({"messages": [{"role": "user", "content": null}]}),
        json!({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}),
        json!({"messages": [{"role": "user", "content": "x", "name": 7}]}),
        json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}]}),
        json!({"messages": [{"role": "user", "content": [{"text": "x"}]}]}),
        json!({"temprature": 1}),
        json!({"temperature": "hot"}),
        json!({"temperature": -0.1}),
        json!({"temperature": 10.5}),
        json!({"top_p": 1.5}),
        json!({"min_p": true}),
        json!({"top_k": 1.5}),
        json!({"top_k": -1}),
        json!({"max_tokens": 0}),
        json!({"max_tokens": 4294967296_u64}),
        json!({"seed": 9223372036854775808_u64}),
        json!({"seed": "7"}),
        json!({"repeat_penalty": 0}),
        json!({"repeat_penalty": 11}),
        json!({"frequency_penalty": 2.1}),
        json!({"presence_penalty": "a"}),
        json!({"repeat_last_n": -2}),
        json!({"repeat_last_n": 4097}),
        json!({"priority": 101}),
        json!({"deadline_ms": -1}),
        json!({"stop": ""}),
        json!({"stop": [""]}),
        json!({"stop": [7]}),
        json!({"stream": "true"}),
        json!({"id": "a/b"}),
        json!({"id": ""}),
        json!({"id": 7}),
        json!({"reply_to": "reply/#"}),
        json!({"reply_to": "$SYS/x"}),
        json!({"reply_to": ""}),
        json!({"adapter": "../x"}),
        json!({"adapter": 7}),
        json!({"tools": [{}]}),
        json!({"tool_choice": "auto"}),
        json!({"logprobs": true}),
        json!({"top_logprobs": 3}),
        json!({"logit_bias": {"7": 1}}),
        json!({"n": 2}),
        json!({"response_format": "json"}),
        json!({"response_format": {}}),
        json!({"response_format": {"type": "xml"}}),
        json!({"response_format": {"type": "text", "schema": {}}}),
        json!({"response_format": {"type": "json_object", "schema": true}}),
        json!({"response_format": {"type": "json_object", "json_schema": {}}}),
        json!({"response_format": {"type": "json_schema"}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "name": "a b"}}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "more": 1}}}),
    ];
    for fields in &taken {
        let body = with(fields);
        assert_eq!(parses(&body), Ok(()), "{fields}");
        let errors: Vec<_> = request
            .iter_errors(&body)
            .map(|error| error.to_string())
            .collect();
        assert!(errors.is_empty(), "{fields}: {errors:?}");
    }
    for fields in &refused {
        let body = with(fields);
        assert!(parses(&body).is_err(), "{fields}");
        assert!(!request.is_valid(&body), "{fields}");
    }
}

#[test]
fn commands_are_taken_as_their_schemas_say() {
    let model = |body: &Value| command::parse::<ModelAction>(body.to_string().as_bytes(), "made").is_ok();
    let erase = |body: &Value| {
        command::parse::<Erase>(body.to_string().as_bytes(), "made").is_ok_and(|(_, erase)| erase.names_one())
    };
    for (body, good) in [
        (json!({"action": "install", "url": "https://h/m.json"}), true),
        (
            json!({"action": "activate", "model": "m-1", "id": "a.B-9_", "reply_to": "reply/me"}),
            true,
        ),
        (json!({"action": "rollback"}), true),
        (json!({"action": "list", "id": "a"}), true),
        (json!({}), false),
        (json!({"action": "remove"}), false),
        (json!({"action": "install"}), false),
        (json!({"action": "install", "url": 7}), false),
        (json!({"action": "list", "force": true}), false),
        (json!({"action": "list", "id": "a/b"}), false),
        (json!({"action": "list", "id": null}), false),
        (json!({"action": "list", "reply_to": 7}), false),
    ] {
        assert_eq!(
            (model(&body), validator("command-model").is_valid(&body)),
            (good, good),
            "{body}"
        );
    }
    for (body, good) in [
        (json!({"client": "reply/kitchen"}), true),
        (json!({"request": "r-1", "id": "a", "reply_to": "reply/me"}), true),
        (json!({}), false),
        (json!({"client": "a", "request": "b"}), false),
        (json!({"client": 7}), false),
        (json!({"clients": "a"}), false),
        (json!({"client": "a", "id": ""}), false),
    ] {
        assert_eq!(
            (erase(&body), validator("command-erase").is_valid(&body)),
            (good, good),
            "{body}"
        );
    }
}

#[test]
fn what_our_own_client_can_say_is_taken() {
    let schema = json!({"type": "object", "properties": {"on": {"type": "boolean"}}});
    let body = Body {
        id: Some("a".to_owned()),
        messages: vec![
            Turn::new(Role::System, "s"),
            Turn {
                role: Role::User,
                content: body::Content::Parts(vec![Part::Text { text: "t".to_owned() }]),
                name: Some("n".to_owned()),
            },
        ],
        stop: Some(Stop::Several(vec!["x".to_owned()])),
        response_format: Some(ResponseFormat::JsonSchema {
            json_schema: NamedSchema {
                name: Some("n".to_owned()),
                schema,
                ..NamedSchema::default()
            },
        }),
        ..Body::default()
    };
    let body = serde_json::to_value(&body).unwrap();
    assert_eq!(parses(&body), Ok(()));
    assert!(validator("request").is_valid(&body));
}

#[test]
fn what_a_device_sends_obeys_its_schema() {
    let completion = Completion {
        id: "a".to_owned(),
        object: "chat.completion".to_owned(),
        created: 1,
        model: "m".to_owned(),
        choices: vec![Choice {
            index: 0,
            message: AssistantMessage {
                role: "assistant".to_owned(),
                content: "x".to_owned(),
            },
            finish_reason: "stop".to_owned(),
        }],
        usage: Usage::default(),
        timings: Timings::default(),
        ai_generated: true,
        model_sha256: "00".to_owned(),
        device: "dev".to_owned(),
    };
    let chunk = Chunk {
        id: "a".to_owned(),
        object: "chat.completion.chunk".to_owned(),
        seq: 0,
        model: "m".to_owned(),
        choices: vec![ChunkChoice {
            index: 0,
            delta: Delta {
                role: None,
                content: Some("x".to_owned()),
            },
            finish_reason: None,
        }],
        ai_generated: true,
    };
    let error = ErrorAnswer::new("a", ErrorCode::QueueFull, "m");
    let done = CommandAnswer {
        id: "a".to_owned(),
        command: "erase".to_owned(),
        result: json!({"entries": 1}),
    };
    let config = crate::config::Config::default();
    let author = crate::reply::Author::default();
    let counters = crate::health::Counters::default();
    let now = std::time::Instant::now();
    for (name, value) in [
        ("answer", json!(completion)),
        ("chunk", json!(chunk)),
        ("error", json!(error)),
        ("command-answer", json!(done)),
        ("cancel", json!(Cancel { id: "a".to_owned() })),
        ("status", json!(crate::health::status("dev", State::Ready, None))),
        (
            "card",
            json!(crate::health::card(
                &config,
                &author,
                Some("a-1"),
                Some("hwmon ina219 power1")
            )),
        ),
        (
            "metrics",
            json!(crate::health::metrics(&counters, now, 0, 0, 0, None, None)),
        ),
    ] {
        let validator = validator(name);
        let errors: Vec<_> = validator
            .iter_errors(&value)
            .map(|error| error.to_string())
            .collect();
        assert!(errors.is_empty(), "{name}: {errors:?}");
        assert!(!validator.is_valid(&json!({})), "{name} asks for nothing");
    }
}

/// A field's value: mostly one that some field takes.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3_i64..6).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3.0..12.0_f64).prop_map(Value::from),
        prop::sample::select(vec![0.0, 1.0, -1.0, 7.0]).prop_map(Value::from),
        "[a-z/+#$_.-]{0,6}".prop_map(Value::from),
        prop::sample::select(vec![
            "text",
            "json_object",
            "json_schema",
            "user",
            "system",
            "none",
            "home",
            "reply/a"
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        let names = vec![
            "type",
            "schema",
            "json_schema",
            "name",
            "strict",
            "role",
            "content",
            "text",
            "x",
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::vec((prop::sample::select(names), inner), 0..4).prop_map(|fields| fields
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect()),
        ]
    })
}

/// A `response_format`, nearly.
fn any_format() -> impl Strategy<Value = Value> {
    let kinds = vec!["text", "json_object", "json_schema"];
    let named = prop::collection::vec(
        (
            prop::sample::select(vec!["schema", "name", "strict", "description"]),
            any_value(),
        ),
        0..4,
    );
    (
        prop::sample::select(kinds),
        named,
        prop::option::of(any_value()),
        0..8,
    )
        .prop_map(|(kind, named, schema, shape)| {
            let mut named: Value = named
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect();
            if shape % 2 == 0 {
                named["schema"] = json!({"type": "object"});
            }
            let mut format = json!({ "type": kind });
            if (kind == "json_schema") == (shape < 6) {
                format["json_schema"] = named;
            }
            if let Some(schema) = schema {
                format["schema"] = schema;
            }
            format
        })
}

fn field_names() -> Vec<String> {
    let schema = sent::<Body>();
    let properties = schema.as_value()["properties"].as_object().unwrap();
    properties.keys().cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn parser_and_schema_agree_on_anything(
        fields in prop::collection::vec((prop::sample::select(field_names()), any_value()), 0..3),
        format in prop::option::of(any_format()),
    ) {
        thread_local!(static REQUEST: Validator = validator("request"));
        let mut body = with(&Value::Object(fields.into_iter().collect()));
        if let Some(format) = format {
            body["response_format"] = format;
        }
        // What one device's limits, prefixes and adapters refuse is not the schema's to say.
        let own = |why: &String| ["too_large", "prefix", "this device has", "the limit is", "device's own", "$ref"]
            .iter().any(|part| why.contains(part));
        let parsed = parses(&body);
        if !parsed.as_ref().is_err_and(own) {
            let valid = REQUEST.with(|request| request.is_valid(&body));
            prop_assert_eq!(parsed.is_ok(), valid, "{} {:?}", body, parsed);
        }
    }
}
