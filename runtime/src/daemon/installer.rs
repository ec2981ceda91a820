//! The installer: orders that came over MQTT, done by a process of its own (`pipit installer`).
//!
//! In: an [`Order`]. Out: [`Report`]s. Fetching, hashing and trying a model take minutes, and a fault in any of them must
//! not reach the daemon. An order is written down before it is acknowledged, so that a power cut only delays it.

use std::path::PathBuf;
use std::process::Stdio;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc;

use crate::config::Config;
use crate::store::install::{self, Installed, World};
use crate::store::{Source, Store, StoreError};
use crate::wire::Reply;
use crate::wire::command::ModelAction;

/// What was ordered, and who is to be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// What to do.
    pub action: ModelAction,
    /// The model that was active then: a rollback that a power cut has cut off from its answer is not done twice.
    #[serde(default)]
    pub from: Option<String>,
    /// The command's id.
    pub id: String,
    /// Where the answer goes.
    pub reply: Reply,
}

/// What an installer is started with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Task {
    /// The daemon's configuration.
    pub config: Config,
    /// The state folder.
    pub state: PathBuf,
    /// What to do.
    pub action: ModelAction,
    /// [`Order::from`]
    #[serde(default)]
    pub from: Option<String>,
}

/// How an order ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done.
    Done(Value),
    /// It was not: what is wrong with it or its model.
    Refused(String),
    /// It was not: what is wrong here.
    Failed(String),
}

/// An order that has ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// Which.
    pub order: Order,
    /// How.
    pub outcome: Outcome,
}

/// Starts installers.
#[derive(Clone, Debug)]
pub struct Installer {
    program: PathBuf,
    state: PathBuf,
    reports: mpsc::Sender<Report>,
}

impl Installer {
    /// The second half is where the reports come out.
    pub fn new(program: PathBuf, state: PathBuf) -> (Self, mpsc::Receiver<Report>) {
        let (reports, outbox) = mpsc::channel(4);
        (
            Self {
                program,
                state,
                reports,
            },
            outbox,
        )
    }

    /// Begins an order; a report follows.
    pub fn begin(&self, config: &Config, order: Order) {
        let task = Task {
            config: config.clone(),
            state: self.state.clone(),
            action: order.action.clone(),
            from: order.from.clone(),
        };
        let (program, reports) = (self.program.clone(), self.reports.clone());
        tokio::spawn(async move {
            let outcome = run(program, &task)
                .await
                .unwrap_or_else(|error| Outcome::Failed(format!("the installer cannot be started: {error}")));
            let _ = reports.send(Report { order, outcome }).await;
        });
    }
}

async fn run(program: PathBuf, task: &Task) -> std::io::Result<Outcome> {
    let mut command = Command::new(program);
    command
        .arg("installer")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .process_group(0);
    let mut child = command.spawn()?;
    let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(std::io::Error::other("it has no pipes"));
    };
    input.write_all(&serde_json::to_vec(task)?).await?;
    drop(input);
    let mut lines = BufReader::new(output).lines();
    let mut outcome = None;
    while let Some(line) = lines.next_line().await? {
        outcome = serde_json::from_str(&line).ok().or(outcome);
    }
    let status = child.wait().await?;
    Ok(outcome.unwrap_or_else(|| Outcome::Failed(format!("the installer ended ({status})"))))
}

/// What the process `pipit installer` does with its task.
pub fn perform(task: &Task, program: PathBuf) -> Outcome {
    let world = World {
        config: &task.config,
        state: &task.state,
        program,
    };
    let done = |installed: Installed| serde_json::to_value(installed).unwrap_or_default();
    let store = Store::of(&task.state);
    let result: Result<Value, StoreError> = match &task.action {
        ModelAction::Install { url } => {
            // Never a path: whoever may send commands may not look around on the device's disk.
            Source::url(url).and_then(|source| install::install(&source, &world, &mut |_| {}).map(done))
        }
        ModelAction::Activate { model } => install::activate(model, &world, &mut |_| {}).map(done),
        ModelAction::Rollback {} => install::roll_back(&store, task.from.as_deref()).map(done),
        ModelAction::List {} => Ok(store.listing()),
    };
    match result {
        Ok(value) => Outcome::Done(value),
        Err(error @ (StoreError::Io { .. } | StoreError::Room { .. } | StoreError::Busy)) => {
            Outcome::Failed(error.to_string())
        }
        Err(error) => Outcome::Refused(error.to_string()),
    }
}
