//! `GET /v1/models`: the model that answers, as OpenAI lists its own.

use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use super::reply::{self, Body};
use crate::daemon::service::door::View;

/// The list: one model, or none before one was loaded. `created` is when the door was opened, in Unix seconds.
pub(super) fn list(view: &View, created: u64) -> Value {
    let models: Vec<Value> = model(view, created).into_iter().collect();
    json!({"object": "list", "data": models})
}

/// One model by its name, as it stands in a path.
pub(super) fn one(view: &View, created: u64, name: &str) -> Response<Body> {
    let name = percent_encoding::percent_decode_str(name).decode_utf8_lossy();
    match model(view, created).filter(|model| model["id"] == *name) {
        Some(model) => reply::json_body(StatusCode::OK, &model),
        None => {
            let why = format!("this device does not serve `{name}`; hint: GET /v1/models");
            reply::error(StatusCode::NOT_FOUND, "model_not_found", &why)
        }
    }
}

fn model(view: &View, created: u64) -> Option<Value> {
    let model = &view.card.model;
    (!model.name.is_empty()).then(|| {
        json!({
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "pipit",
            "device": view.card.device,
            "sha256": model.sha256,
            "architecture": model.architecture,
            "quantisation": model.quantisation,
            "context": model.context,
            "adapters": view.card.adapters,
        })
    })
}
