use proptest::prelude::*;

use super::*;

fn world() -> (Topics, Vec<String>, Limits) {
    (
        Topics::new("pipit", "dev"),
        vec!["reply".to_owned()],
        Limits::default(),
    )
}

/// Parses for the device of these tests, which has two adapters.
fn parsed(envelope: &Envelope<'_>) -> Result<Request, Box<Rejection>> {
    let (topics, prefixes, limits) = world();
    let rules = Rules {
        topics: &topics,
        prefixes: &prefixes,
        limits: &limits,
        adapters: &["home".to_owned(), "office".to_owned()],
    };
    parse(envelope, &rules)
}

fn read(payload: &str) -> Result<Request, Box<Rejection>> {
    parsed(&Envelope {
        payload: payload.as_bytes(),
        ..Envelope::default()
    })
}

fn refused(payload: &str) -> (ErrorCode, String) {
    let rejection = read(payload).expect_err(payload);
    (rejection.code, rejection.message)
}

#[test]
fn plain_text() {
    let request = read("Turn on the light").unwrap();
    assert!(request.reply.plain);
    assert_eq!(request.messages[0].content, "Turn on the light");
    assert_eq!(request.reply.topic, format!("pipit/v1/dev/res/{}", request.id));
    assert!(request.fingerprint.is_some());
    assert_eq!(refused("  ").0, ErrorCode::InvalidRequest);
}

#[test]
fn openai_body() {
    let request = read(
        r#"{"id":"a1","model":"x","messages":[{"role":"system","content":"s"},
        {"role":"user","content":[{"type":"text","text":"h"},{"type":"text","text":"i"}]}],
        "max_tokens":7,"temperature":0.5,"top_p":0.9,"top_k":40,"min_p":0.05,"seed":-1,"stop":"\n",
        "stream":true,"deadline_ms":1000,"priority":3,"response_format":{"type":"text"},"n":1,"user":null}"#,
    )
    .unwrap();
    assert_eq!(request.id, "a1");
    assert_eq!(request.messages[1].content, "hi");
    assert_eq!(request.max_tokens, 7);
    assert_eq!(request.stop, ["\n"]);
    assert_eq!(request.deadline_ms, Some(1000));
    assert_eq!((request.priority, request.stream), (3, true));
    assert_eq!(request.reply.topic, "pipit/v1/dev/res/a1");
    assert!(!request.reply.plain && request.fingerprint.is_none());
}

#[test]
fn refused_by_name() {
    let with = |field: &str| format!(r#"{{"messages":[{{"role":"user","content":"x"}}],{field}}}"#);
    for (field, name) in [
        (r#""response_format":{"type":"json_schema"}"#, "response_format"),
        (r#""adapter":"x""#, "`x`; this device has home, office"),
        (r#""repeat_penalty":0"#, "repeat_penalty"),
        (r#""repeat_last_n":5000"#, "repeat_last_n"),
        (r#""tools":[{}]"#, "tools"),
        (r#""n":2"#, "`n`"),
        (r#""frequency_penalty":2.5"#, "frequency_penalty"),
        (r#""temprature":1"#, "temprature"),
        (r#""temperature":"hot""#, "temperature"),
        (r#""temperature":-1"#, "temperature"),
        (r#""top_p":1.5"#, "top_p"),
        (r#""max_tokens":0"#, "max_tokens"),
        (r#""stop":[""]"#, "stop"),
        (r#""stop":["1","2","3","4","5","6","7","8","9"]"#, "stop"),
        (r#""id":"a/b""#, "id"),
        (r#""reply_to":"pipit/v1/dev/req""#, "reply_to"),
        (r##""reply_to":"reply/#""##, "reply_to"),
        (r#""deadline_ms":-1"#, "deadline_ms"),
    ] {
        let (code, message) = refused(&with(field));
        assert_eq!(code, ErrorCode::InvalidRequest, "{field}");
        assert!(message.contains(name), "{field}: {message}");
    }
    for body in [
        "{",
        "{}",
        r#"{"messages":[]}"#,
        r#"{"messages":[{"role":"root","content":"x"}]}"#,
    ] {
        assert_eq!(refused(body).0, ErrorCode::InvalidRequest, "{body}");
    }
    let deep = format!(r#"{{"messages":{}{}}}"#, "[".repeat(40), "]".repeat(40));
    assert!(refused(&deep).1.contains("deeper"));
    assert_eq!(refused(&"x".repeat(300 * 1024)).0, ErrorCode::TooLarge);
}

#[test]
fn penalties_and_an_adapter() {
    let request = read(
        r#"{"messages":[{"role":"user","content":"x"}],"repeat_penalty":1.1,"frequency_penalty":-0.5,
        "presence_penalty":2,"repeat_last_n":-1,"adapter":"home"}"#,
    )
    .unwrap();
    let sampling = &request.sampling;
    assert_eq!(
        (sampling.repeat_penalty, sampling.frequency_penalty),
        (Some(1.1), Some(-0.5))
    );
    assert_eq!(
        (sampling.presence_penalty, sampling.repeat_last_n),
        (Some(2.0), Some(-1))
    );
    assert_eq!(request.adapter.as_deref(), Some("home"));
}

fn with_format(format: &Value) -> String {
    serde_json::json!({"messages": [{"role": "user", "content": "x"}], "response_format": format}).to_string()
}

#[test]
fn response_formats() {
    use serde_json::json;
    let schema = json!({"type": "object", "properties": {"on": {"type": "boolean"}}});
    for (format, expected) in [
        (json!({"type": "text"}), None),
        (json!({"type": "json_object"}), Some(json!({"type": "object"}))),
        (
            json!({"type": "json_object", "schema": schema}),
            Some(schema.clone()),
        ),
        (
            json!({"type": "json_schema", "json_schema": {"name": "light", "strict": true, "schema": schema}}),
            Some(schema.clone()),
        ),
    ] {
        assert_eq!(read(&with_format(&format)).unwrap().schema, expected, "{format}");
    }
}

#[test]
fn a_schema_is_bounded_and_the_place_is_named() {
    use serde_json::json;
    let refused = |schema: Value| {
        let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
        refused(&with_format(&format))
    };
    let place = "/response_format/json_schema/schema";
    for (schema, pointer, keyword) in [
        (
            json!({"properties": {"a/b~": {"$ref": "http://x/y.json"}}}),
            "/properties/a~1b~0/$ref",
            "`$ref`",
        ),
        (
            json!({"anyOf": [{}, {"$dynamicRef": "other"}]}),
            "/anyOf/1/$dynamicRef",
            "`$dynamicRef`",
        ),
        (json!({"items": {"$ref": 7}}), "/items/$ref", "`$ref`"),
        (
            json!({"items": {"pattern": "a".repeat(257)}}),
            "/items/pattern",
            "257 bytes",
        ),
        (json!({"pattern": 1}), "/pattern", "`pattern`"),
        (
            json!({"patternProperties": {"b".repeat(300): {}}}),
            "/patternProperties/b",
            "300 bytes",
        ),
        (json!({"$defs": []}), "/$defs", "`$defs`"),
    ] {
        let (code, message) = refused(schema);
        assert_eq!(code, ErrorCode::InvalidRequest);
        assert!(
            message.starts_with(&format!("{place}{pointer}")) && message.contains(keyword),
            "{message}"
        );
    }
    let (code, message) = refused(json!({"description": "x".repeat(20_000)}));
    assert_eq!(code, ErrorCode::TooLarge);
    assert!(message.contains("the limit is 16384"), "{message}");
    assert!(refused(json!({"pattern": 1, "title": "x"})).1.len() < 300);
    // Names and values that look like keywords are none.
    let schema = json!({"properties": {"$ref": {"type": "string"}, "pattern": {"enum": [{"$ref": "http://x"}]}},
        "const": {"pattern": 7}, "$ref": "#/$defs/a", "$defs": {"a": {"pattern": "^a+$"}}});
    let format = json!({"type": "json_object", "schema": schema});
    assert_eq!(read(&with_format(&format)).unwrap().schema, Some(schema));
}

#[test]
fn correlation_data_makes_the_id() {
    let id = |data: &[u8]| {
        let envelope = Envelope {
            payload: b"hi",
            correlation: Some(data),
            ..Envelope::default()
        };
        let request = parsed(&envelope).unwrap();
        assert_eq!(request.reply.correlation.as_deref(), Some(data));
        assert!(request.fingerprint.is_none());
        request.id
    };
    assert_eq!(id(b"abc"), "abc");
    assert_eq!(id(&[0xff, 1]), "x-ff01");
    assert_eq!(id(&[7; 40]).len(), 34);
    assert_eq!(id(&[7; 40]), id(&[7; 40]));
}

#[test]
fn a_forbidden_reply_topic_is_never_published_to() {
    for topic in [
        "pipit/v1/dev/req",
        "pipit/v1/dev/cmd/x",
        "$SYS/x",
        "a/+",
        "elsewhere",
        "",
    ] {
        let envelope = Envelope {
            payload: b"hi",
            response_topic: Some(topic),
            ..Envelope::default()
        };
        let rejection = parsed(&envelope).unwrap_err();
        assert_eq!(rejection.code, ErrorCode::InvalidRequest);
        assert!(
            rejection.reply.topic.starts_with("pipit/v1/dev/res/"),
            "{}",
            rejection.reply.topic
        );
    }
}

#[test]
fn message_expiry_is_a_deadline() {
    let envelope = Envelope {
        payload: b"hi",
        expiry_s: Some(2),
        ..Envelope::default()
    };
    assert_eq!(parsed(&envelope).unwrap().deadline_ms, Some(2000));
}

proptest! {
    #[test]
    fn garbage_never_panics(payload in proptest::collection::vec(any::<u8>(), 0..400),
                            topic in proptest::option::of(".{0,40}"),
                            correlation in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..80)),
                            kind in proptest::option::of("(application/json|text/plain|.{0,10})")) {
        let (topics, prefixes, _) = world();
        let envelope = Envelope {
            payload: &payload,
            response_topic: topic.as_deref(),
            correlation: correlation.as_deref(),
            content_type: kind.as_deref(),
            expiry_s: None,
        };
        match parsed(&envelope) {
            Ok(request) => {
                prop_assert!(valid_id(&request.id));
                prop_assert!(topics.check_reply(&request.reply.topic, &prefixes).is_ok());
            }
            Err(rejection) => {
                prop_assert!(valid_id(&rejection.id));
                prop_assert!(topics.check_reply(&rejection.reply.topic, &prefixes).is_ok());
            }
        }
    }

    #[test]
    fn json_shaped_garbage_never_panics(body in r#"\{("(id|messages|stop|seed|top_k|stream|n|adapter|reply_to|response_format|repeat_last_n)":(null|true|-?[0-9]{1,25}|1e400|"[a-z+/#$]{0,9}"|\[\]|\[\{\}\]|\{"a":1\}),){0,6}"x":0\}"#) {
        let _ = read(&body);
        let _ = read(&body.replace(",\"x\":0", ""));
    }
}
