//! Replies: what the service says becomes HTTP statuses and OpenAI's bodies.
//!
//! Source: OpenAI's error codes; which of them its clients try again (408, 409, 429, 5xx, unless `x-should-retry` says
//! otherwise: openai-python, `_base_client.py`).

use http_body_util::{Either, Full};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;

use super::events::Events;
use super::guard::Kept;
use crate::journal::StoredAnswer;
use crate::wire::{ErrorAnswer, ErrorCode};

/// The body of a response: all at once, or piece by piece.
pub(super) type Body = Either<Full<Bytes>, Events>;

/// A response with this body.
pub(super) fn whole(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::new(body.into())));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// JSON.
pub(super) fn json_body(status: StatusCode, value: &impl serde::Serialize) -> Response<Body> {
    whole(status, "application/json", crate::health::payload(value))
}

/// An error as OpenAI writes it.
pub(super) fn error(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let kind = match status.as_u16() {
        429 => "rate_limit_error",
        400..500 => "invalid_request_error",
        _ => "server_error",
    };
    let body = json!({"error": {"message": message, "type": kind, "param": null, "code": code}});
    json_body(status, &body)
}

/// Somebody who may not come in.
pub(super) fn kept_out(kept: &Kept) -> Response<Body> {
    match kept {
        Kept::Name => error(
            StatusCode::MISDIRECTED_REQUEST,
            "wrong_host",
            "`Host` is not a name of this machine; hint: localhost or 127.0.0.1",
        ),
        Kept::Key => error(
            StatusCode::UNAUTHORIZED,
            "invalid_api_key",
            "this device wants its key; hint: Authorization: Bearer KEY",
        ),
    }
}

/// The status that an error of the wire has here.
pub(super) fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidRequest => StatusCode::BAD_REQUEST,
        ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::QueueFull => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::Expired => StatusCode::GATEWAY_TIMEOUT,
        // Somebody else took it back: nginx's number for a request that was closed.
        ErrorCode::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::CONFLICT),
        ErrorCode::ModelUnavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The message of an answer that is an error.
pub(super) fn message_of(answer: &StoredAnswer) -> String {
    serde_json::from_str::<ErrorAnswer>(&answer.body)
        .map_or_else(|_| String::new(), |error| error.error.message)
}

/// An answer that is an error.
pub(super) fn refused(code: ErrorCode, answer: &StoredAnswer) -> Response<Body> {
    let mut response = error(status(code), code.as_str(), &message_of(answer));
    // The deadline has passed, and the engine has tried often enough: only a full queue gets better by itself.
    if matches!(code, ErrorCode::Expired | ErrorCode::Internal) {
        let no = HeaderValue::from_static("false");
        response.headers_mut().insert("x-should-retry", no);
    }
    response
}

/// The service is no more.
pub(super) fn gone() -> Response<Body> {
    let why = "the device stopped before it answered";
    error(
        StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::ModelUnavailable.as_str(),
        why,
    )
}

/// Says that a machine wrote it, and which one.
pub(super) fn mark(response: &mut Response<Body>, id: &str, sha256: Option<&str>) {
    let headers = response.headers_mut();
    headers.insert("x-ai-generated", HeaderValue::from_static("true"));
    for (name, value) in [("x-request-id", Some(id)), ("x-model-sha256", sha256)] {
        if let Some(value) = value.and_then(|value| HeaderValue::from_str(value).ok()) {
            headers.insert(name, value);
        }
    }
}
