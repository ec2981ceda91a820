//! `pipit ask`: one prompt, one answer.
//!
//! It subscribes to the answer's topic, sends the request at QoS 1, and sends the same request again after every
//! reconnect: the id makes that safe, because a device answers an id once.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use pipit::config::Config;
use pipit::daemon::broker_options;
use pipit::mqtt::{Delivery, Event, Incoming, Link, Outgoing};
use pipit::wire::answer::Received;
use pipit::wire::topics::valid_id;
use pipit::wire::{Cancel, Completion, PoolTopics, Topics};

use super::{BrokerArgs, code};
use request::{RequestArgs, duration};

mod request;

/// Between two attempts while no device listens.
const UNHEARD: Duration = Duration::from_millis(500);

const EXAMPLES: &str = "\
Examples:
  pipit ask 'Turn on the kitchen light'
  pipit ask 'Tell me about wagtails' --stream --max-tokens 200 --temperature 0.7
  pipit ask 'Zet het licht aan' --broker mqtt://broker.local --device kitchen --json | jq .usage
  pipit ask 'Licht aan' --adapter smart-home --schema intent.schema.json
  pipit ask 'Turn on the kitchen light' --broker mqtt://broker.local --pool house
  echo 'A long prompt' | pipit ask -";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// What to ask; `-` reads it from standard input
    prompt: String,
    #[command(flatten)]
    broker: BrokerArgs,
    /// Ask whoever is free in this pool, in place of one device
    #[arg(long, value_name = "NAME", conflicts_with = "device")]
    pool: Option<String>,
    /// Print the answer as it comes
    #[arg(long)]
    stream: bool,
    /// Give up after this long: 500ms, 60s, 5m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    timeout: Duration,
    /// Print the whole answer object; with --stream every chunk, too, one a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    request: RequestArgs,
    /// Id of the request; the same id gives the same answer, once [default: a new one]
    #[arg(long, value_name = "ID")]
    id: Option<String>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = args.broker.config()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?;
    let result = runtime.block_on(async {
        match ask(args, &config).await {
            Ok(Some(code)) => Ok(code),
            Err(error) => Err(error),
            Ok(None) => {
                eprintln!(
                    "error: no answer from {} within {:?}; hint: is the device online? A longer --timeout waits longer",
                    args.pool.as_ref().unwrap_or(&config.device),
                    args.timeout
                );
                Ok(ExitCode::from(code::TIMED_OUT))
            }
        }
    });
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

/// `None` when the time is up; the device is told then that nobody waits any more.
async fn ask(args: &Args, config: &Config) -> anyhow::Result<Option<ExitCode>> {
    let prompt = if args.prompt == "-" {
        std::io::read_to_string(std::io::stdin()).context("the prompt cannot be read from standard input")?
    } else {
        args.prompt.clone()
    };
    let id = args
        .id
        .clone()
        .unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
    if !valid_id(&id) {
        bail!("`{id}` is no id; hint: 1 to 64 of A-Z a-z 0-9 _ . -");
    }
    let topics = match &args.pool {
        None => Topics::new(&config.root, &config.device),
        Some(pool) if !valid_id(pool) => {
            bail!("`{pool}` is no name of a pool; hint: 1 to 64 of A-Z a-z 0-9 _ . -")
        }
        Some(pool) => PoolTopics::new(&config.root, pool, &config.device)
            .shared()
            .clone(),
    };
    let body = serde_json::to_vec(&args.request.body(&id, &prompt, args.stream))?;
    let mut options = broker_options(config)?;
    let broker = format!("{}:{}", options.host, options.port);
    options.client_id = format!("pipit-ask-{}", uuid::Uuid::now_v7().simple());
    options.subscribe = vec![topics.answer(&id)];
    let (link, mut events) = Link::start(options)?;
    let mut printer = Printer {
        args,
        shown: String::new(),
        now: String::new(),
        next_seq: 0,
    };
    let send = |number: u64| {
        link.publish(Outgoing {
            topic: topics.request(),
            payload: body.clone(),
            token: Some(number),
            content_type: Some("application/json"),
            ..Outgoing::default()
        })
    };
    let mut connected_before = false;
    let mut request = 0;
    let until = tokio::time::Instant::now() + args.timeout;
    // Set while nobody has heard the request.
    let mut again = None;
    loop {
        let next = again.map_or(until, |again| until.min(again));
        let Ok(event) = tokio::time::timeout_at(next, events.recv()).await else {
            if next < until {
                again = None;
                request += 1;
                send(request);
                continue;
            }
            let payload = serde_json::to_vec(&Cancel { id })?;
            link.publish(Outgoing {
                topic: topics.cancel(),
                payload,
                ..Outgoing::default()
            });
            link.close().await;
            return Ok(None);
        };
        match event.context("the link to the broker ended")? {
            Event::Connected { .. } => {
                connected_before = true;
                request += 1;
                send(request);
            }
            Event::Disconnected { reason } if !connected_before => {
                eprintln!(
                    "error: broker {broker}: {reason}; hint: is `pipit serve` or mosquitto running there?"
                );
                return Ok(Some(ExitCode::from(code::UNAVAILABLE)));
            }
            Event::Disconnected { reason } => {
                tracing::warn!("no connection to the broker: {reason}; trying again");
            }
            Event::Delivered {
                delivery: Delivery::Refused(reason),
                ..
            } => {
                bail!(
                    "the broker refuses the request: {reason}; hint: may this client publish to {}?",
                    topics.request()
                );
            }
            // The device is away, and a broker that was started anew does not know that it will be back.
            Event::Delivered {
                delivery: Delivery::Unheard,
                ..
            } => {
                if request == 1 {
                    tracing::warn!("no device listens on {}; trying again", topics.request());
                }
                again = Some(tokio::time::Instant::now() + UNHEARD);
            }
            Event::Delivered { .. } => {}
            Event::Message(message) => {
                if let Some(ack) = message.ack {
                    link.ack(ack);
                }
                if let Some(code) = printer.show(&message)? {
                    link.close().await;
                    return Ok(Some(code));
                }
            }
        }
    }
}

/// Prints chunks and the answer. Chunks can be lost, and begin again when the device had to: what is shown is always
/// a beginning of the answer, and the final answer completes it.
struct Printer<'a> {
    args: &'a Args,
    shown: String,
    /// Text of the chunks since seq 0.
    now: String,
    next_seq: u32,
}

impl Printer<'_> {
    /// Shows a message; the exit code when it was the last.
    fn show(&mut self, message: &Incoming) -> anyhow::Result<Option<ExitCode>> {
        let received = match Received::parse(&message.payload) {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!("not an answer: {error}");
                return Ok(None);
            }
        };
        let mut out = std::io::stdout().lock();
        match received {
            Received::Chunk(chunk) => {
                if self.args.json {
                    writeln!(out, "{}", serde_json::to_string(&chunk)?)?;
                    return Ok(None);
                }
                if chunk.seq == 0 {
                    self.now.clear();
                    self.next_seq = 0;
                }
                if chunk.seq != self.next_seq {
                    return Ok(None);
                }
                self.next_seq += 1;
                let delta = chunk
                    .choices
                    .first()
                    .and_then(|choice| choice.delta.content.as_deref());
                self.now.push_str(delta.unwrap_or_default());
                if let Some(more) = self.now.strip_prefix(self.shown.as_str()) {
                    write!(out, "{more}")?;
                    out.flush()?;
                    self.shown.push_str(more);
                }
                Ok(None)
            }
            Received::Completion(completion) => {
                self.finish(&mut out, &completion)?;
                Ok(Some(ExitCode::SUCCESS))
            }
            Received::Error(error) => {
                if self.args.json {
                    writeln!(out, "{}", serde_json::to_string(&error)?)?;
                }
                if !self.shown.is_empty() {
                    writeln!(out)?;
                }
                eprintln!("error: {}: {}", error.error.code.as_str(), error.error.message);
                Ok(Some(ExitCode::FAILURE))
            }
        }
    }

    fn finish(&self, out: &mut impl std::io::Write, completion: &Completion) -> anyhow::Result<()> {
        if self.args.json {
            writeln!(out, "{}", serde_json::to_string(completion)?)?;
            return Ok(());
        }
        let text = completion.text();
        match text.strip_prefix(self.shown.as_str()) {
            Some(rest) => writeln!(out, "{rest}")?,
            // The device began again and said something else: this is what counts.
            None => writeln!(out, "\n{text}")?,
        }
        Ok(())
    }
}
