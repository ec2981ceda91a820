//! Keeps the metadata of a fleet's answers in PostgreSQL: who asked whom, with which model, how many tokens, how long.
//! Never the words.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

mod answer;
#[path = "../../../runtime/src/mqtt/session.rs"]
mod session;
mod store;
mod subscriber;

use store::Store;

#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    /// postgres://USER@HOST[:PORT]/DATABASE; the password stands in ~/.pgpass or in the file that PGPASSFILE names
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the tables or bring them up to date; `run` does so, too
    Migrate,
    /// Take in answers until told to stop, and delete old rows
    Run(Box<subscriber::Options>),
    /// Delete the rows of one client, or of one request; prints how many
    Erase(Whose),
    /// Delete rows that are older; prints how many
    Prune {
        /// Days that a row is kept
        #[arg(long, value_name = "DAYS", value_parser = subscriber::days)]
        keep_days: f64,
    },
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Whose {
    /// The client as a device has it: reply/kitchen, or a whole reply topic
    #[arg(long)]
    client: Option<String>,
    /// The id of a request, whoever sent it
    #[arg(long)]
    request: Option<String>,
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,sqlx=warn"));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(Cli::parse())));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let store = Store::open(&cli.database).await?;
    let rows = match &cli.command {
        Command::Migrate => return Ok(()),
        Command::Run(options) => {
            let mut terminate = signal(SignalKind::terminate())?;
            return tokio::select! {
                result = subscriber::run(options, &store) => result,
                _ = terminate.recv() => Ok(()),
                _ = tokio::signal::ctrl_c() => Ok(()),
            };
        }
        Command::Erase(Whose {
            client: Some(client), ..
        }) => store.erase_client(client).await?,
        Command::Erase(Whose { request, .. }) => {
            store
                .erase_request(request.as_deref().unwrap_or_default())
                .await?
        }
        Command::Prune { keep_days } => store.prune(*keep_days).await?,
    };
    println!("{rows}");
    Ok(())
}
