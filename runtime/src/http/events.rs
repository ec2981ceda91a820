//! Server-sent events: a streamed answer as OpenAI streams it.
//!
//! In: chunks, then the whole answer. Out: `data: {chunk}` lines, one with a finish_reason, one with the usage where that
//! was asked for, `data: [DONE]`. What was sent cannot be taken back: when the work is begun anew after a crash (`seq` is
//! 0 again) the text that is known already is passed over, and one that says something else ends with an error.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::reply;
use crate::daemon::service::door::Said;
use crate::journal::StoredAnswer;
use crate::wire::{Chunk, Completion, ErrorCode};

/// What the script of one answer has come to.
#[derive(Debug)]
pub(super) struct Script {
    /// Text that the client has.
    sent: String,
    /// Text of the run that is under way; `None` when a part of it was missed.
    now: Option<String>,
    seq: u32,
    created: u64,
    usage: bool,
    begun: bool,
}

impl Script {
    /// `usage`: whether a last chunk shall say how many tokens there were (`stream_options.include_usage`).
    pub(super) fn new(created: u64, usage: bool) -> Self {
        Self {
            sent: String::new(),
            now: None,
            seq: 0,
            created,
            usage,
            begun: false,
        }
    }

    /// The lines for a piece; empty when it says nothing new.
    pub(super) fn chunk(&mut self, chunk: &Chunk) -> String {
        if chunk.seq == 0 {
            (self.now, self.seq) = (Some(String::new()), 0);
        }
        // Who asks for what is under way already has missed the beginning, and gets all of it at the end.
        if chunk.seq != self.seq {
            self.now = None;
        }
        let Some(now) = &mut self.now else {
            return String::new();
        };
        self.seq += 1;
        for choice in &chunk.choices {
            now.push_str(choice.delta.content.as_deref().unwrap_or_default());
        }
        let now = now.clone();
        // Another text than before is dealt with at the end, when all of it is known.
        let fresh = now
            .strip_prefix(self.sent.as_str())
            .unwrap_or_default()
            .to_owned();
        self.text(&chunk.id, &chunk.model, &fresh)
    }

    /// The lines for the end.
    pub(super) fn end(&mut self, answer: &StoredAnswer) -> String {
        if let Some(code) = answer.error {
            return Self::failure(code, &reply::message_of(answer));
        }
        let Ok(whole) = serde_json::from_str::<Completion>(&answer.body) else {
            return Self::failure(ErrorCode::Internal, "the answer cannot be read");
        };
        let Some(rest) = whole.text().strip_prefix(self.sent.as_str()) else {
            let why = "the work was begun anew and came to another answer; hint: ask again";
            return Self::failure(ErrorCode::Internal, why);
        };
        let mut lines = self.text(&whole.id, &whole.model, rest);
        let reason = whole.choices.first().map(|choice| choice.finish_reason.as_str());
        let mut last = self.line(&whole.id, &whole.model);
        last["choices"] = json!([{"index": 0, "delta": {}, "finish_reason": reason}]);
        last["model_sha256"] = json!(whole.model_sha256);
        last["timings"] = json!(whole.timings);
        lines += &data(&last);
        if self.usage {
            let mut counted = self.line(&whole.id, &whole.model);
            (counted["choices"], counted["usage"]) = (json!([]), json!(whole.usage));
            lines += &data(&counted);
        }
        lines + "data: [DONE]\n\n"
    }

    /// The lines for an end that is none.
    pub(super) fn failure(code: ErrorCode, message: &str) -> String {
        data(&json!({"error": {"message": message, "type": "server_error", "param": null, "code": code}}))
    }

    fn text(&mut self, id: &str, model: &str, text: &str) -> String {
        if text.is_empty() && self.begun {
            return String::new();
        }
        self.sent.push_str(text);
        let mut delta = json!({ "content": text });
        if !self.begun {
            delta = json!({"role": "assistant", "content": text});
        }
        self.begun = true;
        let mut line = self.line(id, model);
        line["choices"] = json!([{"index": 0, "delta": delta, "finish_reason": null}]);
        data(&line)
    }

    fn line(&self, id: &str, model: &str) -> Value {
        let mut line = json!({
            "id": id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": model,
            "choices": [],
            "ai_generated": true,
        });
        if self.usage {
            line["usage"] = Value::Null;
        }
        line
    }
}

fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

/// The body of a streamed answer.
#[derive(Debug)]
pub(super) struct Events {
    script: Script,
    first: Option<Said>,
    /// `None` after the end.
    said: Option<mpsc::UnboundedReceiver<Said>>,
}

impl Events {
    /// `first` was heard already.
    pub(super) fn new(script: Script, first: Said, said: mpsc::UnboundedReceiver<Said>) -> Self {
        Self {
            script,
            first: Some(first),
            said: Some(said),
        }
    }
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        loop {
            let Self { first, said, .. } = &mut *self;
            let Some(said) = said else {
                return Poll::Ready(None);
            };
            let next = match first.take() {
                None => std::task::ready!(said.poll_recv(context)),
                first => first,
            };
            let lines = match next {
                Some(Said::Chunk(chunk)) => self.script.chunk(&chunk),
                Some(Said::Answer(answer)) => {
                    self.said = None;
                    self.script.end(&answer)
                }
                None => {
                    self.said = None;
                    Script::failure(
                        ErrorCode::ModelUnavailable,
                        "the device stopped before it answered",
                    )
                }
            };
            if !lines.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(lines.into()))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply::{Author, Spent, completion, error};
    use crate::wire::answer::{ChunkChoice, Delta};
    use crate::wire::{Reply, Request, Sampling};

    fn chunk(seq: u32, text: &str) -> Chunk {
        Chunk {
            id: "a".to_owned(),
            object: "chat.completion.chunk".to_owned(),
            seq,
            model: "m".to_owned(),
            choices: vec![ChunkChoice {
                index: 0,
                delta: Delta {
                    role: None,
                    content: Some(text.to_owned()),
                },
                finish_reason: None,
            }],
            ai_generated: true,
        }
    }

    fn answer(text: &str) -> StoredAnswer {
        let request = Request {
            id: "a".to_owned(),
            fingerprint: None,
            from_pool: false,
            reply: Reply {
                topic: "$http".to_owned(),
                correlation: None,
                plain: false,
            },
            messages: Vec::new(),
            sampling: Sampling::default(),
            max_tokens: 5,
            stop: Vec::new(),
            schema: None,
            adapter: None,
            stream: true,
            deadline_ms: None,
            priority: 0,
        };
        let finished = crate::engine::Finished {
            text: text.to_owned(),
            finish_reason: "length".to_owned(),
            prompt_tokens: 3,
            completion_tokens: 2,
            ..crate::engine::Finished::default()
        };
        completion(&Author::default(), &request, &finished, Spent::default())
    }

    /// The objects of some lines, and whether [DONE] is the last of them.
    fn objects(lines: &str) -> (Vec<Value>, bool) {
        let mut data: Vec<&str> = lines.split_terminator("\n\n").collect();
        let done = data.last() == Some(&"data: [DONE]");
        data.truncate(data.len() - usize::from(done));
        let object = |line: &&str| serde_json::from_str(line.strip_prefix("data: ").unwrap()).unwrap();
        (data.iter().map(object).collect(), done)
    }

    fn text(objects: &[Value]) -> String {
        let content = |object: &Value| {
            object["choices"][0]["delta"]["content"]
                .as_str()
                .map(str::to_owned)
        };
        objects.iter().filter_map(content).collect()
    }

    #[test]
    fn pieces_then_the_end() {
        let mut script = Script::new(7, true);
        let lines = [
            script.chunk(&chunk(0, "Hé")),
            script.chunk(&chunk(1, "llo")),
            script.end(&answer("Héllo.")),
        ];
        let (objects, done) = objects(&lines.concat());
        assert!(done && text(&objects) == "Héllo.", "{objects:?}");
        assert_eq!(objects[0]["choices"][0]["delta"]["role"], "assistant");
        assert!(objects[1]["choices"][0]["delta"].get("role").is_none());
        assert_eq!(objects[3]["choices"][0]["finish_reason"], "length");
        let last = objects.last().unwrap();
        assert_eq!(
            (&last["choices"], &last["usage"]["total_tokens"]),
            (&json!([]), &json!(5))
        );
        for object in &objects {
            assert_eq!(object["ai_generated"], true);
            assert_eq!((&object["id"], &object["created"]), (&json!("a"), &json!(7)));
        }
    }

    #[test]
    fn an_answer_that_is_there_already_and_an_empty_one() {
        for whole in ["Hello.", ""] {
            let (objects, done) = objects(&Script::new(7, false).end(&answer(whole)));
            assert!(
                done && text(&objects) == whole && objects.len() == 2,
                "{objects:?}"
            );
            assert!(objects[0].get("usage").is_none());
        }
    }

    #[test]
    fn work_that_is_begun_anew_says_nothing_twice() {
        let mut script = Script::new(7, false);
        let mut lines = script.chunk(&chunk(0, "One two"));
        for (seq, piece) in [(0, "One"), (1, " two th"), (2, "ree")] {
            lines += &script.chunk(&chunk(seq, piece));
        }
        lines += &script.end(&answer("One two three."));
        let (read, done) = objects(&lines);
        assert!(done && text(&read) == "One two three.", "{read:?}");
        // One that says something else is an error, not a mixture.
        let mut script = Script::new(7, false);
        let mut lines = script.chunk(&chunk(0, "One two"));
        lines += &script.chunk(&chunk(0, "Three"));
        lines += &script.end(&answer("Three four."));
        let (read, done) = objects(&lines);
        assert!(!done && text(&read) == "One two", "{read:?}");
        assert_eq!(read.last().unwrap()["error"]["code"], "internal");
    }

    #[test]
    fn who_comes_in_the_middle_gets_all_of_it() {
        let mut script = Script::new(7, false);
        assert_eq!(script.chunk(&chunk(3, "middle")), "");
        assert_eq!(script.chunk(&chunk(4, " of it")), "");
        let (objects, done) = objects(&script.end(&answer("In the middle of it.")));
        assert!(done && text(&objects) == "In the middle of it.");
    }

    #[test]
    fn an_error_in_the_middle_is_an_event() {
        let mut script = Script::new(7, false);
        let _ = script.chunk(&chunk(0, "One"));
        let answer = error(&answer("").reply, "a", ErrorCode::Cancelled, "taken back");
        let (objects, done) = objects(&script.end(&answer));
        assert!(!done && objects.len() == 1);
        assert_eq!(
            (&objects[0]["error"]["code"], &objects[0]["error"]["message"]),
            (&json!("cancelled"), &json!("taken back"))
        );
    }
}
