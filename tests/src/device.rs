//! A `pipit serve` of the test's own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::broker::Broker;
use crate::process::{Finished, Running};
use crate::program;

/// Loading a model and answering, on a machine that has other things to do.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// A daemon with a state folder that outlives it, so that it can be killed and started again.
#[derive(Debug)]
pub struct Device {
    process: Option<Running>,
    state: TempDir,
    model: PathBuf,
    name: String,
}

impl Device {
    /// Starts a device called `name` with this model; returns once it says that it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time.
    pub fn start(broker: &Broker, name: &str, model: &Path) -> Result<Self> {
        let state = tempfile::tempdir()?;
        let mut device = Self {
            process: None,
            state,
            model: model.to_owned(),
            name: name.to_owned(),
        };
        device.restart(broker)?;
        Ok(device)
    }

    /// Starts it again after [`Device::kill`] or [`Device::stop`]; returns once it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time.
    pub fn restart(&mut self, broker: &Broker) -> Result<()> {
        let mut command = std::process::Command::new(program::path("pipit")?);
        command
            .args([
                "serve",
                "--broker",
                &broker.url(),
                "--device",
                &self.name,
                "--model",
            ])
            .arg(&self.model);
        command.arg("--state-dir").arg(self.state.path());
        let process = Running::start(&mut command)?;
        self.process = Some(process);
        // The status is retained, but no `ready` of an earlier run is left: the broker put the will in its place.
        let status = broker.subscribe(&self.topic("status"))?;
        let outcome = status.wait_for(PATIENCE, |message| {
            let state: Value = serde_json::from_str(&message.payload).unwrap_or_default();
            state["state"] == "ready"
        });
        if let Err(error) = outcome {
            let said = self.kill()?;
            return Err(error.context(format!("the device is not ready; it said: {}", said.stderr)));
        }
        Ok(())
    }

    /// `pipit/v1/NAME/LEAF`
    pub fn topic(&self, leaf: &str) -> String {
        format!("pipit/v1/{}/{leaf}", self.name)
    }

    fn process(&self) -> Result<&Running> {
        self.process.as_ref().context("the device does not run")
    }

    /// The process id of its worker, the one child that it has.
    ///
    /// # Errors
    /// When it has none.
    pub fn worker(&self) -> Result<u32> {
        let children = self.process()?.children()?;
        children.last().copied().context("the device has no worker")
    }

    /// SIGKILL to the daemon, as a power cut would end it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> Result<Finished> {
        self.process.take().context("the device does not run")?.kill()
    }

    /// SIGTERM to the daemon.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub fn stop(&mut self) -> Result<Finished> {
        self.process
            .take()
            .context("the device does not run")?
            .terminate(PATIENCE)
    }

    /// Publishes a request for a greedy answer.
    ///
    /// # Errors
    /// When the broker does not take it.
    pub fn send(&self, broker: &Broker, id: &str, prompt: &str, max_tokens: u32) -> Result<()> {
        let body = json!({
            "id": id,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
        });
        broker.publish(&self.topic("req"), &body.to_string(), &[])
    }
}
