//! Answers of a server, in its own words: the chat and the completion of OpenAI's API, which every server has.

use serde_json::{Value, json};

use super::{ServedError, ServedTeacher, in_parallel};

/// What a server is to answer.
#[derive(Debug, Clone)]
pub enum Question<'a> {
    /// A conversation; the server's own template makes a prompt of it.
    Chat {
        /// The turns before the answer.
        messages: &'a [Value],
        /// What the assistant may call.
        tools: Option<&'a Value>,
    },
    /// A text that goes on.
    Text(&'a str),
}

/// How an answer is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    /// 0 takes the most probable token.
    pub temperature: f64,
    /// Of so many of the most probable tokens; 0 of all. Beyond OpenAI's API, and known to vLLM and llama-server.
    pub top_k: usize,
    /// Of the most probable tokens, as many as have this share together.
    pub top_p: f64,
    /// The most tokens of an answer.
    pub max_new_tokens: usize,
}

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// The text.
    pub text: String,
    /// Calls of tools, where the server makes any.
    pub tool_calls: Option<Value>,
    /// Whether it ended by itself, and was not cut.
    pub finished: bool,
}

impl ServedTeacher {
    /// The answers to questions, each with its own seed. A question that the server refuses (it is too long, or its
    /// template does not take the conversation) has what it says instead.
    pub fn answers(
        &self,
        questions: &[(Question<'_>, u64)],
        draw: Draw,
    ) -> Result<Vec<Result<Answered, String>>, ServedError> {
        in_parallel(questions.len(), self.workers(), |i, _| {
            let (question, seed) = &questions[i];
            match self.answer(question, *seed, draw) {
                Err(ServedError::Refused {
                    status: 400 | 413 | 422,
                    why,
                    ..
                }) => Ok(Err(format!("the server refuses it: {why}"))),
                Err(error) => Err(error),
                Ok(answered) => Ok(Ok(answered)),
            }
        })
    }

    fn answer(&self, question: &Question<'_>, seed: u64, draw: Draw) -> Result<Answered, ServedError> {
        // Seeds are 32 bits with llama-server.
        let mut body = json!({"model": self.model, "max_tokens": draw.max_new_tokens, "temperature": draw.temperature,
            "top_p": draw.top_p, "seed": seed & 0x7fff_ffff});
        if draw.top_k > 0 {
            body["top_k"] = json!(draw.top_k);
        }
        let path = match question {
            Question::Chat { messages, tools } => {
                body["messages"] = json!(messages);
                if let Some(tools) = tools {
                    body["tools"] = (*tools).clone();
                }
                "/v1/chat/completions"
            }
            Question::Text(text) => {
                body["prompt"] = json!(text);
                "/v1/completions"
            }
        };
        let answer = self.client.post(path, &body)?;
        let choice = &answer["choices"][0];
        let text = match question {
            Question::Chat { .. } => choice["message"]["content"].as_str(),
            Question::Text(_) => choice["text"].as_str(),
        };
        let calls = &choice["message"]["tool_calls"];
        let tool_calls = calls
            .as_array()
            .is_some_and(|calls| !calls.is_empty())
            .then(|| calls.clone());
        let reason = choice["finish_reason"].as_str();
        match (text, reason) {
            (None, _) if tool_calls.is_none() => Err(self.client.bad("has no text")),
            (_, None) => Err(self.client.bad("does not say why it ended")),
            (text, Some(reason)) => Ok(Answered {
                text: text.unwrap_or_default().to_owned(),
                tool_calls,
                finished: matches!(reason, "stop" | "tool_calls"),
            }),
        }
    }
}
