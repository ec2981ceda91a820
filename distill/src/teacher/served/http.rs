//! Requests to one server: JSON there and back, sent again when a failure may pass, of bounded time and size.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::tls::{RootCerts, TlsConfig};

use super::{ServedError, ServedOptions};

/// The largest answer that is read.
const MOST_BYTES: u64 = 256 << 20;
/// How long to wait before the second attempt; twice as long before each further one.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A server's address and how it is asked.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    url: String,
    attempts: usize,
    authorization: Option<String>,
}

/// Why an attempt failed.
enum Failure {
    /// It may pass; the server may say how long that takes.
    Passing(String, Option<Duration>),
    Final(ServedError),
}

impl Client {
    /// The address may end in `/v1`, as OpenAI's clients write it.
    pub(super) fn new(url: &str, options: &ServedOptions) -> Result<Self, ServedError> {
        let base = url
            .trim_end_matches('/')
            .trim_end_matches("/v1")
            .trim_end_matches('/');
        let host = base
            .strip_prefix("http://")
            .or_else(|| base.strip_prefix("https://"));
        let host = host.filter(|host| !host.is_empty() && !host.starts_with('/'));
        let host = host.ok_or_else(|| ServedError::Url { url: url.to_owned() })?;
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let config = Agent::config_builder()
            .timeout_global(Some(options.timeout))
            .http_status_as_error(false)
            // A prompt goes to the server that was named, and nowhere else.
            .max_redirects(0)
            .max_idle_connections_per_host(options.concurrency.max(1))
            .tls_config(tls);
        let config = match is_loopback(host) {
            true => config.proxy(None),
            false => config,
        };
        Ok(Self {
            agent: config.build().new_agent(),
            url: base.to_owned(),
            attempts: options.attempts.max(1),
            authorization: options.api_key.as_ref().map(|key| format!("Bearer {key}")),
        })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// An answer that is not what is documented.
    pub(super) fn bad(&self, why: impl Into<String>) -> ServedError {
        ServedError::Answer {
            url: self.url.clone(),
            why: why.into(),
        }
    }

    pub(super) fn get(&self, path: &str) -> Result<Value, ServedError> {
        self.ask(path, None)
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value, ServedError> {
        self.ask(path, Some(body))
    }

    fn ask(&self, path: &str, body: Option<&Value>) -> Result<Value, ServedError> {
        let body = body.map(Value::to_string);
        let (mut wait, mut attempt) = (FIRST_WAIT, 1);
        loop {
            let (why, asked) = match self.attempt(path, body.as_deref()) {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(why, asked)) => (why, asked),
            };
            if attempt >= self.attempts {
                return Err(ServedError::Unreachable {
                    url: format!("{}{path}", self.url),
                    why,
                    attempts: attempt,
                });
            }
            let now = asked.unwrap_or(wait).min(LONGEST_WAIT);
            tracing::info!("{}{path}: {why}; again in {:.1} s", self.url, now.as_secs_f64());
            std::thread::sleep(now);
            wait *= 2;
            attempt += 1;
        }
    }

    fn attempt(&self, path: &str, body: Option<&str>) -> Result<Value, Failure> {
        let url = format!("{}{path}", self.url);
        let response = match body {
            Some(body) => {
                let request = self.agent.post(&url).header("Content-Type", "application/json");
                self.authorized(request).send(body)
            }
            None => self.authorized(self.agent.get(&url)).call(),
        };
        // What never arrived may arrive the next time: a server that starts, a connection that breaks.
        let mut response = response.map_err(|e| match e {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                Failure::Final(ServedError::Url { url: url.clone() })
            }
            e => Failure::Passing(e.to_string(), None),
        })?;
        let status = response.status().as_u16();
        let after = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok());
        let after = after
            .and_then(|seconds| seconds.parse().ok())
            .map(Duration::from_secs);
        let bytes = response.body_mut().with_config().limit(MOST_BYTES).read_to_vec();
        let bytes = bytes.map_err(|e| match e {
            ureq::Error::BodyExceedsLimit(_) => {
                Failure::Final(self.bad(format!("has more than {MOST_BYTES} bytes")))
            }
            e => Failure::Passing(e.to_string(), None),
        })?;
        match status {
            200..=299 => serde_json::from_slice(&bytes)
                .map_err(|e| Failure::Final(self.bad(format!("is no JSON: {e}")))),
            408 | 425 | 429 | 500 | 502 | 503 | 504 => Err(Failure::Passing(
                format!("status {status}: {}", message(&bytes)),
                after,
            )),
            _ => Err(Failure::Final(ServedError::Refused {
                url,
                status,
                why: message(&bytes),
            })),
        }
    }

    fn authorized<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.authorization {
            Some(value) => request.header("Authorization", value),
            None => request,
        }
    }
}

fn is_loopback(host: &str) -> bool {
    let host = host.split('/').next().unwrap_or_default();
    ["localhost", "127.", "[::1]"]
        .iter()
        .any(|start| host.starts_with(start))
}

/// What an answer says is wrong: OpenAI's `error.message`, vLLM's older `message`, or its first line.
fn message(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let json: Option<Value> = serde_json::from_str(&text).ok();
    let said = json.as_ref().and_then(|json| {
        let message = json["error"]["message"]
            .as_str()
            .or_else(|| json["message"].as_str());
        message.or_else(|| json["detail"].as_str())
    });
    said.unwrap_or_else(|| text.lines().next().unwrap_or_default())
        .chars()
        .take(300)
        .collect()
}
