//! A `pipit serve` of the test's own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::broker::Broker;
use crate::client::Outgoing;
use crate::process::{Finished, Running};
use crate::program;

/// Loading a model and answering, on a machine that has other things to do.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// A daemon with a state folder that outlives it, so that it can be killed and started again.
#[derive(Debug)]
pub struct Device {
    process: Option<Running>,
    folder: TempDir,
    model: Option<PathBuf>,
    name: String,
    options: Options,
}

/// How a device is started.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Its configuration file.
    pub config: String,
    /// Shell commands before it is started: `$STATE` is the state folder.
    pub before: String,
    /// Words in front of the command, such as `unshare -rm`.
    pub under: Vec<String>,
}

impl Device {
    /// Starts a device called `name` with this model; returns once it says that it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time.
    pub fn start(broker: &Broker, name: &str, model: &Path) -> Result<Self> {
        let mut device = Self::new(name, model, Options::default())?;
        device.restart(broker)?;
        Ok(device)
    }

    /// A device that does not run yet.
    ///
    /// # Errors
    /// When there is no room for its state folder.
    pub fn new(name: &str, model: &Path, options: Options) -> Result<Self> {
        Ok(Self {
            process: None,
            folder: tempfile::tempdir()?,
            model: Some(model.to_owned()),
            name: name.to_owned(),
            options,
        })
    }

    /// A device that does not run yet, and that serves what is installed in its state folder.
    ///
    /// # Errors
    /// When there is no room for its state folder.
    pub fn of_store(name: &str, options: Options) -> Result<Self> {
        let mut device = Self::new(name, Path::new(""), options)?;
        device.model = None;
        std::fs::create_dir_all(device.state())?;
        Ok(device)
    }

    /// Waits until it says that it is ready.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_until_ready(&self, broker: &Broker) -> Result<()> {
        let status = broker.subscribe(&self.topic("status"))?;
        status.wait_for(PATIENCE, |message| {
            let state: Value = serde_json::from_str(&message.payload).unwrap_or_default();
            state["state"] == "ready"
        })?;
        Ok(())
    }

    /// Changes its configuration file, for the next [`Device::launch`].
    pub fn configure(&mut self, config: &str) {
        config.clone_into(&mut self.options.config);
    }

    /// Its configuration file, which [`Device::launch`] writes.
    pub fn config(&self) -> PathBuf {
        self.folder.path().join("config.toml")
    }

    /// Starts it again after [`Device::kill`] or [`Device::stop`]; returns once it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time.
    pub fn restart(&mut self, broker: &Broker) -> Result<()> {
        self.launch(&broker.url(), None)?;
        // The status is retained, but no `ready` of an earlier run is left: the broker put the will in its place.
        if let Err(error) = self.wait_until_ready(broker) {
            let said = self.kill()?;
            return Err(error.context(format!("the device is not ready; it said: {}", said.stderr)));
        }
        Ok(())
    }

    /// Starts it and does not wait; `fault` is where it is to kill itself (`PIPIT_FAULT`).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn launch(&mut self, broker_url: &str, fault: Option<&str>) -> Result<()> {
        let (state, config) = (self.state(), self.config());
        std::fs::create_dir_all(&state)?;
        std::fs::write(&config, &self.options.config)?;
        let script = format!("{}\nexec \"$@\"", self.options.before);
        let mut words: Vec<&str> = self.options.under.iter().map(String::as_str).collect();
        words.extend(["bash", "-c", &script, "bash"]);
        let mut command = std::process::Command::new(words[0]);
        command.args(&words[1..]).arg(program::path("pipit")?);
        command.args(["serve", "--broker", broker_url, "--device", &self.name]);
        if let Some(model) = &self.model {
            command.arg("--model").arg(model);
        }
        command.arg("--config").arg(&config);
        command.arg("--state-dir").arg(&state).env("STATE", &state);
        if let Some(fault) = fault {
            command.env("PIPIT_FAULT", fault);
        }
        self.process = Some(Running::start(&mut command)?);
        Ok(())
    }

    /// The state folder.
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Its process id.
    ///
    /// # Errors
    /// When it does not run.
    pub fn id(&self) -> Result<u32> {
        Ok(self.process()?.id())
    }

    /// Waits for a line of its log.
    ///
    /// # Errors
    /// When none that `wanted` accepts comes within `limit`.
    pub fn wait_for_line(&self, limit: Duration, wanted: impl FnMut(&str) -> bool) -> Result<String> {
        self.process()?.wait_for_line(limit, wanted)
    }

    /// All that it has said since it was started last.
    pub fn said(&self) -> String {
        self.process.as_ref().map(Running::said).unwrap_or_default()
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// When it does not run, or still runs after `limit`.
    pub fn ended(&mut self, limit: Duration) -> Result<Finished> {
        self.process
            .take()
            .context("the device does not run")?
            .finish(limit)
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

    /// A request for a sampled answer without a seed: a second run would, in all likelihood, say something else.
    pub fn request(&self, id: &str, prompt: &str, max_tokens: u32) -> Outgoing {
        let body = json!({
            "id": id,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 1,
        });
        Outgoing {
            topic: self.topic("req"),
            payload: body.to_string().into_bytes(),
            ..Outgoing::default()
        }
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
