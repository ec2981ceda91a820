//! examples/node-red in a real Node-RED: the flow is loaded, and a prompt goes through it to a device and back.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pipit_tests::broker::{Broker, free_port};
use pipit_tests::device::{Device, PATIENCE};
use pipit_tests::example::node_red;
use pipit_tests::http;
use pipit_tests::model::smollm2;
use pipit_tests::process::Running;
use serde_json::{Value, json};

/// The flow with what a user sets after the import: the broker's port and the device's name.
fn flow(broker: &Broker, device: &str) -> Result<Value> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/node-red/flows.json");
    let mut flow: Value = serde_json::from_slice(&std::fs::read(file)?)?;
    for node in flow.as_array_mut().context("no list of nodes")? {
        match node["type"].as_str() {
            Some("mqtt-broker") => node["port"] = json!(broker.port().to_string()),
            Some("tab") => node["env"][0]["value"] = json!(device),
            _ => {}
        }
    }
    Ok(flow)
}

#[test]
fn node_red_asks_a_device() -> Result<()> {
    let broker = Broker::forgetful()?;
    let mut device = Device::start(&broker, "porch", &smollm2()?)?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("flows.json");
    std::fs::write(&file, serde_json::to_vec(&flow(&broker, "porch")?)?)?;
    let port = free_port()?.to_string();
    let mut command = Command::new("node");
    command.arg(node_red()?).arg("--userDir").arg(folder.path());
    command.args([
        "--port",
        &port,
        "-D",
        "uiHost=127.0.0.1",
        "-D",
        "telemetry.enabled=false",
    ]);
    let node_red = Running::start(command.arg(&file))?;
    // One of its two connections subscribes, the other one is the test's: it says so when it is there.
    node_red.wait_for_line(PATIENCE, |line| line.contains("Connected to broker"))?;
    ensure!(!node_red.said().contains("missing types"), "{}", node_red.said());

    let url = format!("127.0.0.1:{port}");
    let ask = |prompt: &str| http::post(&url, "/ask", "text/plain", prompt.as_bytes(), PATIENCE);
    let (status, body) = ask("Say hello in one sentence.")?;
    let answer: Value = serde_json::from_str(&body)?;
    let text = answer["choices"][0]["message"]["content"].as_str();
    ensure!(
        status == 200 && text.is_some_and(|text| !text.is_empty()),
        "{status} {body}"
    );
    ensure!(
        answer["device"] == "porch" && answer["ai_generated"] == true,
        "{body}"
    );

    // A request as an object, and one that the device refuses.
    let mut body = json!({"messages": [{"role": "user", "content": "Count."}], "max_tokens": 3});
    let send = |body: &Value| {
        http::post(
            &url,
            "/ask",
            "application/json",
            body.to_string().as_bytes(),
            PATIENCE,
        )
    };
    let (status, short) = send(&body)?;
    let short: Value = serde_json::from_str(&short)?;
    ensure!(
        status == 200 && short["usage"]["completion_tokens"] == 3,
        "{status} {short}"
    );
    body["temprature"] = json!(1);
    let (status, refused) = send(&body)?;
    ensure!(
        status == 400 && refused.contains("temprature"),
        "{status} {refused}"
    );
    device.stop()?;
    node_red.terminate(Duration::from_secs(30))?;
    Ok(())
}
