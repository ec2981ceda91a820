//! Replies: what the engine said becomes what a client gets.
//!
//! In: a request, pieces of text, a [`Finished`]. Out: a [`StoredAnswer`] for the journal, and [`Outgoing`] messages:
//! chunks at QoS 0, at most twenty a second, and the whole answer at QoS 1.

use std::time::{Duration, Instant};

use crate::engine::{Finished, ModelInfo};
use crate::journal::StoredAnswer;
use crate::mqtt::Outgoing;
use crate::wire::answer::{AssistantMessage, Choice, ChunkChoice, Delta, PromptTokens};
use crate::wire::{Chunk, Completion, ErrorAnswer, ErrorCode, Reply, Request, Timings, Usage};

/// Between two chunks of one answer.
const CHUNK_INTERVAL: Duration = Duration::from_millis(50);

/// Who answers.
#[derive(Clone, Debug, Default)]
pub struct Author {
    /// The device.
    pub device: String,
    /// The model.
    pub model: ModelInfo,
    /// SHA-256 of its file.
    pub sha256: String,
    /// What stands behind an answer in plain text; empty for nothing.
    pub disclosure: String,
}

/// What an answer took besides the engine's own figures.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// Milliseconds in the queue.
    pub queue_ms: f64,
    /// Joules, where a sensor measures them.
    pub energy_j: Option<f64>,
}

/// The final answer to a request that went well.
pub fn completion(author: &Author, request: &Request, finished: &Finished, spent: Spent) -> StoredAnswer {
    if request.reply.plain {
        // A task with a schema: the text is JSON, and a line behind it would spoil that.
        let is_json = request.schema.is_some();
        let mut body = finished.text.trim().to_owned();
        if !author.disclosure.is_empty() && !is_json {
            body = format!("{body}\n{}", author.disclosure);
        }
        return StoredAnswer {
            reply: request.reply.clone(),
            body,
            json: is_json,
            error: None,
            fingerprint: None,
        };
    }
    let per_second = |tokens: u32, ms: f64| {
        if ms > 0.0 {
            f64::from(tokens) * 1000.0 / ms
        } else {
            0.0
        }
    };
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    let completion = Completion {
        id: request.id.clone(),
        object: "chat.completion".to_owned(),
        created: crate::clock::unix_ms() / 1000,
        model: author.model.name.clone(),
        choices: vec![Choice {
            index: 0,
            message: AssistantMessage {
                role: "assistant".to_owned(),
                content: finished.text.clone(),
            },
            finish_reason: finished.finish_reason.clone(),
        }],
        usage: Usage {
            prompt_tokens: finished.prompt_tokens,
            completion_tokens: finished.completion_tokens,
            total_tokens: finished.prompt_tokens + finished.completion_tokens,
            prompt_tokens_details: PromptTokens {
                cached_tokens: finished.cached_tokens,
            },
            energy_j: spent.energy_j.map(round),
            joules_per_token: spent
                .energy_j
                .filter(|_| finished.completion_tokens > 0)
                .map(|joules| round(joules / f64::from(finished.completion_tokens))),
        },
        timings: Timings {
            queue_ms: round(spent.queue_ms),
            prompt_ms: round(finished.prompt_ms),
            prompt_per_second: round(per_second(
                finished.prompt_tokens - finished.cached_tokens,
                finished.prompt_ms,
            )),
            predicted_ms: round(finished.predicted_ms),
            predicted_per_second: round(per_second(finished.completion_tokens, finished.predicted_ms)),
        },
        ai_generated: true,
        model_sha256: author.sha256.clone(),
        device: author.device.clone(),
    };
    StoredAnswer {
        reply: request.reply.clone(),
        body: json(&completion),
        json: true,
        error: None,
        fingerprint: None,
    }
}

/// The final answer to a request that did not. Always JSON, also to a plain-text request: a program that reads only
/// text must not take an error for an answer.
pub fn error(reply: &Reply, id: &str, code: ErrorCode, message: impl Into<String>) -> StoredAnswer {
    let body = json(&ErrorAnswer::new(id, code, message));
    StoredAnswer {
        reply: reply.clone(),
        body,
        json: true,
        error: Some(code),
        fingerprint: None,
    }
}

/// The message that carries a final answer. `correlation` is that of the request it answers now, which for one that
/// came again is not the first one's.
pub fn message(author: &Author, answer: &StoredAnswer, correlation: Option<Vec<u8>>, token: u64) -> Outgoing {
    let mut properties = Vec::new();
    match answer.error {
        Some(code) => properties.push(("error".to_owned(), code.as_str().to_owned())),
        None => {
            properties.push(("ai_generated".to_owned(), "true".to_owned()));
            properties.push(("model".to_owned(), author.model.name.clone()));
            properties.push(("model_sha256".to_owned(), author.sha256.clone()));
        }
    }
    Outgoing {
        topic: answer.reply.topic.clone(),
        payload: answer.body.clone().into_bytes(),
        token: Some(token),
        correlation,
        content_type: Some(if answer.json {
            "application/json"
        } else {
            "text/plain"
        }),
        properties,
        ..Outgoing::default()
    }
}

/// A streamed answer on its way: gathers text until it is time for a chunk.
#[derive(Debug)]
pub struct Stream {
    reply: Reply,
    id: String,
    seq: u32,
    text: String,
    next: Instant,
}

impl Stream {
    /// The stream of a request; `None` when it wants none.
    pub fn of(request: &Request) -> Option<Self> {
        let wanted = request.stream && !request.reply.plain;
        wanted.then(|| Self {
            reply: request.reply.clone(),
            id: request.id.clone(),
            seq: 0,
            text: String::new(),
            next: Instant::now(),
        })
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// When the next chunk may go; `None` when there is nothing to send.
    pub fn due(&self) -> Option<Instant> {
        (!self.text.is_empty()).then_some(self.next)
    }

    /// The chunk, when it is time.
    pub fn take(&mut self, author: &Author, now: Instant) -> Option<Chunk> {
        if self.due()? > now {
            return None;
        }
        self.next = now + CHUNK_INTERVAL;
        let chunk = Chunk {
            id: self.id.clone(),
            object: "chat.completion.chunk".to_owned(),
            seq: self.seq,
            model: author.model.name.clone(),
            choices: vec![ChunkChoice {
                index: 0,
                delta: Delta {
                    role: (self.seq == 0).then(|| "assistant".to_owned()),
                    content: Some(std::mem::take(&mut self.text)),
                },
                finish_reason: None,
            }],
            ai_generated: true,
        };
        self.seq += 1;
        Some(chunk)
    }

    /// The message that carries a chunk.
    pub fn message(&self, chunk: &Chunk) -> Outgoing {
        Outgoing {
            topic: self.reply.topic.clone(),
            payload: json(chunk).into_bytes(),
            correlation: self.reply.correlation.clone(),
            content_type: Some("application/json"),
            ..Outgoing::default()
        }
    }
}

fn json(value: &impl serde::Serialize) -> String {
    // Structs of strings and numbers: this cannot fail.
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::answer::Received;
    use crate::wire::{Message, Role, Sampling};

    fn request(plain: bool, stream: bool) -> Request {
        Request {
            id: "a".to_owned(),
            fingerprint: None,
            reply: Reply {
                topic: "reply/me".to_owned(),
                correlation: Some(vec![1, 0]),
                plain,
            },
            messages: vec![Message {
                role: Role::User,
                content: "q".to_owned(),
            }],
            sampling: Sampling::default(),
            max_tokens: 5,
            stop: Vec::new(),
            schema: None,
            adapter: None,
            stream,
            deadline_ms: None,
            priority: 0,
            from_pool: false,
        }
    }

    fn finished() -> Finished {
        Finished {
            text: " Hé. ".to_owned(),
            finish_reason: "stop".to_owned(),
            prompt_tokens: 10,
            cached_tokens: 2,
            completion_tokens: 4,
            prompt_ms: 20.0,
            predicted_ms: 40.0,
        }
    }

    #[test]
    fn plain_text_for_plain_text() {
        let answer = completion(
            &Author::default(),
            &request(true, false),
            &finished(),
            Spent::default(),
        );
        assert_eq!((answer.body.as_str(), answer.json), ("Hé.", false));
        let author = Author {
            disclosure: "(written by a machine)".to_owned(),
            ..Author::default()
        };
        let disclosed = completion(&author, &request(true, false), &finished(), Spent::default());
        assert_eq!(disclosed.body, "Hé.\n(written by a machine)");
        let task = Request {
            schema: Some(serde_json::json!({})),
            ..request(true, false)
        };
        let bare = completion(&author, &task, &finished(), Spent::default());
        assert_eq!((bare.body.as_str(), bare.json), ("Hé.", true));
        let sent = message(&Author::default(), &answer, Some(vec![9]), 7);
        assert_eq!(
            (sent.content_type, sent.token, sent.retain),
            (Some("text/plain"), Some(7), false)
        );
        assert_eq!(sent.correlation, Some(vec![9]));
        assert!(
            sent.properties
                .contains(&("ai_generated".to_owned(), "true".to_owned()))
        );
        let failed = error(&request(true, false).reply, "a", ErrorCode::Expired, "late");
        assert!(failed.json && failed.body.contains("expired"));
    }

    #[test]
    fn a_whole_answer() {
        let author = Author {
            device: "dev".to_owned(),
            sha256: "00".to_owned(),
            ..Author::default()
        };
        let answer = completion(
            &author,
            &request(false, false),
            &finished(),
            Spent {
                queue_ms: 3.0,
                ..Spent::default()
            },
        );
        let Ok(Received::Completion(read)) = Received::parse(answer.body.as_bytes()) else {
            panic!()
        };
        assert_eq!(read.text(), " Hé. ");
        assert_eq!(
            read.usage,
            Usage {
                prompt_tokens: 10,
                completion_tokens: 4,
                total_tokens: 14,
                prompt_tokens_details: PromptTokens { cached_tokens: 2 },
                energy_j: None,
                joules_per_token: None,
            }
        );
        assert_eq!(
            (read.timings.prompt_per_second, read.timings.predicted_per_second),
            (400.0, 100.0)
        );
        assert!(read.ai_generated && read.model_sha256 == "00" && read.device == "dev");
        assert!(!answer.body.contains("energy_j") && !answer.body.contains("joules"));
        let spent = Spent {
            energy_j: Some(3.0),
            ..Spent::default()
        };
        let measured = completion(&author, &request(false, false), &finished(), spent);
        let Ok(Received::Completion(read)) = Received::parse(measured.body.as_bytes()) else {
            panic!()
        };
        assert_eq!(
            (read.usage.energy_j, read.usage.joules_per_token),
            (Some(3.0), Some(0.75))
        );
    }

    #[test]
    fn chunks_are_gathered() {
        assert!(Stream::of(&request(true, true)).is_none() && Stream::of(&request(false, false)).is_none());
        let mut stream = Stream::of(&request(false, true)).unwrap();
        let author = Author::default();
        let start = Instant::now() + Duration::from_secs(1);
        assert!(stream.take(&author, start).is_none());
        let mut sent = Vec::new();
        // 200 tokens in 2 seconds.
        for token in 0..200 {
            stream.push(&format!("{token},"));
            let chunk = stream.take(&author, start + Duration::from_millis(10) * token);
            sent.extend(chunk.map(|chunk| stream.message(&chunk)));
        }
        let chunk = stream.take(&author, start + Duration::from_secs(9));
        sent.extend(chunk.map(|chunk| stream.message(&chunk)));
        assert!((38..=42).contains(&sent.len()), "{}", sent.len());
        let mut text = String::new();
        for (at, message) in sent.iter().enumerate() {
            let Ok(Received::Chunk(chunk)) = Received::parse(&message.payload) else {
                panic!()
            };
            assert_eq!(chunk.seq as usize, at);
            assert_eq!(chunk.choices[0].delta.role.is_some(), at == 0);
            text += chunk.choices[0].delta.content.as_deref().unwrap();
            assert_eq!(
                (message.token, message.correlation.as_deref()),
                (None, Some(&[1, 0][..]))
            );
        }
        assert_eq!(
            text,
            (0..200).map(|token| format!("{token},")).collect::<String>()
        );
    }
}
