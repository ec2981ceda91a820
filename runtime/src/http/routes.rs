//! Routes: a method and a path become an answer.

use hyper::body::Incoming;
use hyper::header::{ALLOW, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::oneshot;

use super::reply::{self, Body};
use super::{World, chat, metrics, models};
use crate::daemon::service::door::{Event, View};
use crate::wire::State;

const MODEL: &str = "/v1/models/";

/// Answers one request.
pub(super) async fn answer(world: &World, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    if let Err(kept) = world.guard.look(request.headers()) {
        return reply::kept_out(&kept);
    }
    let wanted = match path.as_str() {
        "/v1/chat/completions" => Method::POST,
        "/v1/models" | "/health" | "/metrics" => Method::GET,
        path if path.starts_with(MODEL) => Method::GET,
        path => {
            let why = format!(
                "there is no `{path}`; there are: /v1/chat/completions, /v1/models, /health, /metrics"
            );
            return reply::error(StatusCode::NOT_FOUND, "not_found", &why);
        }
    };
    if request.method() != wanted {
        let why = format!("{path} takes {wanted}");
        let mut response = reply::error(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", &why);
        if let Ok(allowed) = HeaderValue::from_str(wanted.as_str()) {
            response.headers_mut().insert(ALLOW, allowed);
        }
        return response;
    }
    if wanted == Method::POST {
        return chat::complete(world, request).await;
    }
    let Some(view) = look(world).await else {
        return reply::gone();
    };
    match path.as_str() {
        "/health" => reply::json_body(health(view.status.state), &view.status),
        "/metrics" => reply::whole(StatusCode::OK, metrics::CONTENT_TYPE, metrics::text(&view)),
        "/v1/models" => reply::json_body(StatusCode::OK, &models::list(&view, world.created)),
        path => models::one(&view, world.created, path.trim_start_matches(MODEL)),
    }
}

async fn look(world: &World) -> Option<View> {
    let (tell, view) = oneshot::channel();
    world.service.send(Event::Look(tell)).await.ok()?;
    view.await.ok()
}

/// Whether requests are taken.
fn health(state: State) -> StatusCode {
    match state {
        State::Online | State::Loading | State::Ready => StatusCode::OK,
        State::Degraded | State::Offline => StatusCode::SERVICE_UNAVAILABLE,
    }
}
