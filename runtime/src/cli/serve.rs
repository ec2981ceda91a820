//! `pipit serve`: the daemon.

use std::process::ExitCode;

use anyhow::Context as _;
use pipit::config::{Layers, Problems, Setting};
use pipit::daemon::{self, DaemonError};
use tokio::signal::unix::{SignalKind, signal};

use super::BrokerArgs;

const EXAMPLES: &str = "\
Examples:
  pipit serve --model model.gguf
  pipit serve --model model.gguf --broker mqtt://broker.local:1883 --device kitchen
  PIPIT_SAMPLING__TOP_K=20 pipit serve --config kitchen.toml

The configuration comes from /etc/pipit/config.toml, /etc/pipit/config.d/*.toml and ~/.config/pipit/config.toml, or
from --config alone; then from variables PIPIT_SECTION__KEY and from flags. `pipit config show --origin` explains it.
Without --broker an embedded MQTT broker listens on 127.0.0.1:1883. Answers go to the device's own res/ topics and,
where a client asks for it, under reply/ ([reply] prefixes allows others).";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// What `config show` and `check` take as well.
#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    broker: BrokerArgs,
    /// GGUF file to serve
    #[arg(long, value_name = "FILE")]
    model: Option<String>,
    /// Context in tokens [default: 2048, or less where the model was trained for less]
    #[arg(long, value_name = "TOKENS")]
    ctx: Option<u32>,
    /// Threads [default: one for each fast physical core]
    #[arg(long, value_name = "N")]
    threads: Option<u32>,
    /// Folder of the journal [default: $STATE_DIRECTORY, $XDG_STATE_HOME/pipit, ~/.local/state/pipit]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<String>,
}

impl Flags {
    /// The configuration of all layers, these flags the highest.
    pub(super) fn layers(&self) -> Result<Layers, Problems> {
        let text = |name, key, value: &Option<String>| Some(Setting::flag(name, key, value.clone()?));
        let number = |name, key, value: Option<u32>| Some(Setting::flag(name, key, value?));
        let flags = [
            text("--model", "model.path", &self.model),
            number("--ctx", "model.n_ctx", self.ctx),
            number("--threads", "model.threads", self.threads),
            text("--state-dir", "state_dir", &self.state_dir),
        ];
        self.broker.layers(flags.into_iter().flatten().collect())
    }
}

pub(super) fn run(args: &Args, verbose: bool) -> anyhow::Result<ExitCode> {
    let config = args.flags.layers()?.config;
    // Two threads: the daemon's own work is small, and the cores are the worker's.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?;
    let result: Result<(), DaemonError> = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            // A second one ends at once: the journal is made for it.
            tokio::spawn(async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                std::process::exit(1);
            });
        };
        daemon::serve(config, verbose, shutdown).await
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result?;
    Ok(ExitCode::SUCCESS)
}
