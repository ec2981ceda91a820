//! A message as it comes from the broker: payload, Response Topic, Correlation Data, Content Type, expiry.
//!
//! Whatever comes, the outcome has a valid id and a topic that an answer may go to, and a request that was taken is
//! read back from the journal as it was written. The input: three lengths and the expiry, a byte each; the three strings; the payload.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pipit_fuzz::wire::topics::valid_id;
use pipit_fuzz::wire::{Cancel, Envelope, Limits, Request, Rules, Topics, request};

/// The next `length` bytes; the length 255 is an absent property.
fn take<'a>(data: &mut &'a [u8], length: u8) -> Option<&'a [u8]> {
    let (taken, rest) = data.split_at(usize::from(length).min(data.len()));
    if length == u8::MAX {
        return None;
    }
    *data = rest;
    Some(taken)
}

fuzz_target!(|data: &[u8]| {
    let Some((head, mut rest)) = data.split_first_chunk::<4>() else {
        return;
    };
    let topic = take(&mut rest, head[0]).and_then(|bytes| str::from_utf8(bytes).ok());
    let correlation = take(&mut rest, head[1]);
    let kind = take(&mut rest, head[2]).and_then(|bytes| str::from_utf8(bytes).ok());
    let envelope = Envelope {
        payload: rest,
        response_topic: topic,
        correlation,
        content_type: kind,
        expiry_s: (head[3] > 0).then_some(u32::from(head[3]) << (head[3] % 25)),
    };
    let topics = Topics::new("pipit", "dev");
    let (prefixes, adapters) = (["reply/".to_owned()], ["home".to_owned()]);
    let limits = Limits { request_bytes: 4096, schema_bytes: 512, ..Limits::default() };
    let rules = Rules { topics: &topics, prefixes: &prefixes, limits: &limits, adapters: &adapters };
    match request::parse(&envelope, &rules) {
        Ok(request) => {
            assert!(valid_id(&request.id));
            assert_eq!(topics.check_reply(&request.reply.topic, &prefixes), Ok(()));
            assert!(!request.messages.is_empty() && request.messages.len() <= limits.messages);
            assert!((1..=limits.max_tokens).contains(&request.max_tokens));
            assert!(request.stop.iter().all(|stop| (1..=limits.stop_bytes).contains(&stop.len())));
            assert!(request.adapter.as_ref().is_none_or(|name| adapters.contains(name)));
            if let Some(schema) = &request.schema {
                assert!(schema.is_object() && schema.to_string().len() <= limits.schema_bytes);
            }
            let written = serde_json::to_vec(&request).unwrap();
            assert_eq!(serde_json::from_slice::<Request>(&written).unwrap(), request);
        }
        Err(rejection) => {
            assert!(valid_id(&rejection.id));
            assert_eq!(topics.check_reply(&rejection.reply.topic, &prefixes), Ok(()));
            assert!(rejection.message.len() < 2000, "a message repeats what somebody sent: {}", rejection.message);
        }
    }
    if let Some(cancel) = Cancel::parse(rest) {
        assert!(valid_id(&cancel.id));
    }
});
