//! The command line: one file a subcommand, and what they share.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Args, Parser, Subcommand};
use pipit::config::{Config, ConfigError, Layers, Problems, Setting, Sources};
use pipit::daemon::DaemonError;
#[cfg(feature = "http")]
use pipit::http::HttpError;
use pipit::mqtt::LinkError;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

mod ask;
mod bench;
mod check;
mod config;
mod installer;
mod model;
mod serve;
mod worker;

/// Exit codes besides 0, 1 and clap's 2.
mod code {
    /// A file is not the one that was meant.
    pub(super) const VERIFICATION: u8 = 3;
    /// No answer in time.
    pub(super) const TIMED_OUT: u8 = 27;
    /// EX_UNAVAILABLE: the broker is not there, or its port cannot be had.
    pub(super) const UNAVAILABLE: u8 = 69;
    /// EX_CONFIG.
    pub(super) const CONFIG: u8 = 78;
}

#[derive(Debug, Parser)]
#[command(name = "pipit", version, about = "Serves a small language model over MQTT, and asks one", after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  pipit serve --model SmolLM2-135M-Instruct.Q4_1.gguf
  pipit check --model SmolLM2-135M-Instruct.Q4_1.gguf
  pipit ask 'Turn on the kitchen light' --stream
  pipit model install https://models.example.org/smart-home/manifest.json
  pipit serve --model model.gguf --broker mqtt://broker.local --device kitchen
  mosquitto_rr -V 5 -t pipit/v1/kitchen/req -e reply/me -m 'Turn on the kitchen light'

Exit codes: 0 done, 1 failed, 2 usage, 3 verification failed, 27 timed out waiting for an answer, 69 broker unavailable, 78 bad configuration";

#[derive(Debug, Args)]
struct Common {
    /// Say more; twice: everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Say only what went wrong
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer prompts over MQTT until told to stop
    Serve(serve::Args),
    /// Send one prompt and print the answer
    Ask(Box<ask::Args>),
    /// Show, check and generate the configuration
    Config(config::Args),
    /// Look at everything that `serve` needs: CPU, memory, disk, broker, model
    Check(Box<check::Args>),
    /// Measure prefill and decode of a model on this machine
    Bench(bench::Args),
    /// Install, list, verify, activate and roll back models
    Model(Box<model::Args>),
    /// The process that installs a model; `serve` starts it
    #[command(hide = true)]
    Installer,
    /// The process that runs the model; `serve` starts it
    #[command(hide = true)]
    Worker,
}

/// Flags about the broker.
#[derive(Debug, Args)]
struct BrokerArgs {
    /// TOML file to read in place of /etc/pipit and the user's own; variables and flags come before what it says
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// mqtt://HOST[:PORT], mqtts://HOST[:PORT], or embedded[://ADDR:PORT] [env: PIPIT_BROKER]
    #[arg(long, value_name = "URL")]
    broker: Option<String>,
    /// Name of the device [env: PIPIT_DEVICE] [default: this machine's name]
    #[arg(long, value_name = "ID")]
    device: Option<String>,
    /// PEM file with the authorities to trust for mqtts://
    #[arg(long, value_name = "FILE")]
    ca: Option<String>,
}

impl BrokerArgs {
    /// The configuration of all layers, with these flags and `more` on top.
    fn layers(&self, more: Vec<Setting>) -> Result<Layers, Problems> {
        let flags = [
            ("--broker", "broker.url", &self.broker),
            ("--device", "device", &self.device),
            ("--ca", "broker.ca", &self.ca),
        ];
        let flags = flags
            .into_iter()
            .filter_map(|(name, key, value)| Some(Setting::flag(name, key, value.clone()?)));
        Layers::read(&Sources {
            file: self.config.clone(),
            flags: flags.chain(more).collect(),
            ..Sources::of_process()
        })
    }

    /// The configuration alone.
    fn config(&self) -> Result<Config, Problems> {
        self.layers(Vec::new()).map(|layers| layers.config)
    }
}

/// Parses the command line and runs the subcommand.
pub(crate) fn run() -> ExitCode {
    let cli = Cli::parse();
    logging(&cli.common);
    let result = match cli.command {
        Command::Serve(args) => serve::run(&args, cli.common.verbose > 0),
        Command::Ask(args) => ask::run(&args),
        Command::Config(args) => config::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Model(args) => model::run(&args),
        Command::Installer => return installer::run(),
        Command::Worker => return worker::run(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            if let Some(problems) = error.downcast_ref::<Problems>() {
                for problem in &problems.0 {
                    eprintln!("error: {problem}");
                }
                return ExitCode::from(code::CONFIG);
            }
            // The library's errors say their cause themselves; a context of anyhow's needs the chain.
            if error.is::<ConfigError>() || error.is::<LinkError>() || error.is::<DaemonError>() {
                eprintln!("error: {error}");
            } else {
                eprintln!("error: {error:#}");
            }
            ExitCode::from(code_of(&error))
        }
    }
}

fn code_of(error: &anyhow::Error) -> u8 {
    if error.is::<ConfigError>() || error.is::<LinkError>() {
        return code::CONFIG;
    }
    match error.downcast_ref::<DaemonError>() {
        Some(
            DaemonError::Config(_)
            | DaemonError::NoModel
            | DaemonError::Model(_)
            | DaemonError::Store(_)
            | DaemonError::Plan(_)
            | DaemonError::Link(_),
        ) => code::CONFIG,
        #[cfg(feature = "embedded-broker")]
        Some(DaemonError::Broker(_)) => code::UNAVAILABLE,
        #[cfg(feature = "http")]
        Some(DaemonError::Http(HttpError::Config(_))) => code::CONFIG,
        _ => 1,
    }
}

/// Log lines go to standard error. llama.cpp and the embedded broker speak only when asked.
fn logging(common: &Common) {
    let levels = match (common.quiet, common.verbose) {
        (true, _) => "error,llama_cpp_2=off,llama-cpp-2=off,mqtt5=off",
        (_, 0) => "info,llama_cpp_2=off,llama-cpp-2=off,mqtt5=off,rumqttc=off",
        (_, 1) => "debug,mqtt5=warn,rumqttc=info",
        _ => "trace",
    };
    let asked = std::env::var("PIPIT_LOG").unwrap_or_else(|_| levels.to_owned());
    let (filter, mistake) = match asked.parse::<Targets>() {
        Ok(filter) => (filter, None),
        Err(mistake) => (levels.parse().unwrap_or_default(), Some(mistake)),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false);
    let registry = tracing_subscriber::registry().with(filter);
    // Journald writes its own time.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        registry.with(lines.without_time()).init();
    } else {
        registry.with(lines).init();
    }
    if let Some(mistake) = mistake {
        tracing::warn!("PIPIT_LOG `{asked}` is no list of target=level: {mistake}");
    }
}
