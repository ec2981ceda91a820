//! `POST /v1/chat/completions`: a body becomes a request, and what the service says of it a response.

use http_body_util::{BodyExt as _, Either, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc;

use super::events::{Events, Script};
use super::reply::{self, Body};
use super::{PATIENCE, World, guard};
use crate::daemon::service::door::{Ask, Event, Said};
use crate::journal::StoredAnswer;
use crate::wire::topics::valid_id;
use crate::wire::{Completion, ErrorCode};

/// A header that names a request, so that one which comes again gets the stored answer; `id` in the body does the same.
const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// What only the door has to know of a body; the rest, and what is wrong with it, is the wire's.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Wishes {
    stream: Value,
    stream_options: Value,
    user: Value,
}

/// Asks, and waits for the answer or its beginning.
pub(super) async fn complete(world: &World, request: Request<Incoming>) -> Response<Body> {
    if !guard::says_json(request.headers()) {
        return reply::error(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ErrorCode::InvalidRequest.as_str(),
            "the body must be JSON; hint: Content-Type: application/json",
        );
    }
    let id = request
        .headers()
        .get(IDEMPOTENCY_KEY)
        .map(|id| id.as_bytes().to_vec());
    let body = match read(world, request.into_body()).await {
        Ok(body) => body,
        Err(response) => return response,
    };
    let wishes: Wishes = serde_json::from_slice(&body).unwrap_or_default();
    let client = wishes
        .user
        .as_str()
        .filter(|user| valid_id(user))
        .map(ToOwned::to_owned);
    let (tell, mut said) = mpsc::unbounded_channel();
    let ask = Ask {
        body: body.into(),
        id,
        client,
        tell,
    };
    if world.service.send(Event::Ask(ask)).await.is_err() {
        return reply::gone();
    }
    let streamed = wishes.stream == true;
    loop {
        match said.recv().await {
            None => return reply::gone(),
            Some(Said::Answer(answer)) if !streamed || answer.error.is_some() => return whole(&answer),
            // Another client asked for the same, and wants pieces.
            Some(Said::Chunk(_)) if !streamed => {}
            Some(first) => {
                let usage = wishes.stream_options["include_usage"] == true;
                return stream(Script::new(crate::clock::unix_ms() / 1000, usage), first, said);
            }
        }
    }
}

/// The body, as far as it may go.
async fn read(world: &World, body: Incoming) -> Result<Bytes, Response<Body>> {
    let too_large = |bytes: usize| {
        let why = format!("the request has more bytes than the limit, {bytes}");
        reply::error(StatusCode::PAYLOAD_TOO_LARGE, ErrorCode::TooLarge.as_str(), &why)
    };
    let most = world.most_bytes;
    match tokio::time::timeout(PATIENCE, Limited::new(body, most).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(too_large(most)),
        Ok(Err(error)) => Err(reply::error(
            StatusCode::BAD_REQUEST,
            ErrorCode::InvalidRequest.as_str(),
            &format!("the body cannot be read: {error}"),
        )),
        Err(_) => Err(reply::error(
            StatusCode::REQUEST_TIMEOUT,
            ErrorCode::InvalidRequest.as_str(),
            &format!("the body took longer than {} s", PATIENCE.as_secs()),
        )),
    }
}

fn whole(answer: &StoredAnswer) -> Response<Body> {
    if let Some(code) = answer.error {
        return reply::refused(code, answer);
    }
    let mut response = reply::whole(StatusCode::OK, "application/json", answer.body.clone());
    if let Ok(completion) = serde_json::from_str::<Completion>(&answer.body) {
        reply::mark(&mut response, &completion.id, Some(&completion.model_sha256));
    }
    response
}

fn stream(script: Script, first: Said, said: mpsc::UnboundedReceiver<Said>) -> Response<Body> {
    let id = match &first {
        Said::Chunk(chunk) => chunk.id.clone(),
        Said::Answer(answer) => {
            let completion = serde_json::from_str::<Completion>(&answer.body);
            completion.map(|completion| completion.id).unwrap_or_default()
        }
    };
    let mut response = Response::new(Either::Right(Events::new(script, first, said)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    reply::mark(&mut response, &id, None);
    response
}
