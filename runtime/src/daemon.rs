//! The daemon: joins link, journal, queue and worker.
//!
//! In: a [`Config`] and a shutdown future. Out: answers. [`serve`] sets the parts up, then one loop waits for
//! whatever happens next and hands it to the [`service`], which holds all state and never waits.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::config::{Address, Config, ConfigError};
use crate::engine;
use crate::engine::prefix::disk::Place;
use crate::health::{self, State, Systemd};
use crate::journal::table::Table;
use crate::journal::writer::Writer;
use crate::journal::{Journal, JournalError};
use crate::model::{self, ModelError};
use crate::mqtt::{self, Link, LinkError};
use crate::plan::{self, Plan, PlanError};
use crate::wire::Topics;
use crate::worker::{self, Worker};

pub mod service;

use service::Service;

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No model is named.
    #[error("no model; hint: --model FILE.gguf, or [model] path in the configuration")]
    NoModel,
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Settings that no plan can be made for.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The embedded broker.
    #[cfg(feature = "embedded-broker")]
    #[error(transparent)]
    Broker(#[from] crate::broker::BrokerError),
    /// The state folder.
    #[error("state folder {path}: {message}")]
    State {
        /// The folder.
        path: PathBuf,
        /// What is wrong; with a hint.
        message: String,
    },
    /// The system.
    #[error("{0}")]
    System(#[from] std::io::Error),
}

/// Answers requests until `shutdown` is done.
///
/// # Errors
/// [`DaemonError`], before anything was answered. A broker that is not there and a model that does not load are no
/// errors: the daemon tries again, and says so.
pub async fn serve(
    config: Config,
    verbose: bool,
    shutdown: impl Future<Output = ()>,
) -> Result<(), DaemonError> {
    config.check()?;
    let model = config.model.path.clone().ok_or(DaemonError::NoModel)?;
    let header = model::inspect(&model)?;
    let plan = Plan::of(&header, &plan::Settings::of(&config)?);
    let state = state_folder(&config)?;
    let _lock = lock(&state)?;
    let (journal, replayed) = Journal::open(&state.join("journal"))?;
    if replayed.dropped_bytes > 0 {
        tracing::warn!(
            "journal: {} bytes at its end were torn and are dropped",
            replayed.dropped_bytes
        );
    }
    let journal_bytes = journal.bytes();
    let table = Table::from_records(replayed.records);

    #[cfg(feature = "embedded-broker")]
    let broker = match Address::parse(&config.broker.url)? {
        Address::Embedded(address) => {
            Some(crate::broker::Broker::start(address, most_packet_bytes(&config)).await?)
        }
        Address::Remote { .. } => None,
    };
    let options = link_options(&config)?;
    let broker_name = format!("{}:{}", options.host, options.port);
    let (link, mut link_events) = Link::start(options)?;
    let (writer, mut commits) = Writer::start(journal)?;
    let (worker, mut worker_events) = Worker::start(worker::Options {
        program: std::env::current_exe()?,
        settings: engine_settings(&config, &model, &state)?,
        plan,
        memory_bytes: config.model.memory_bytes,
        hang: Duration::from_secs(config.model.hang_s),
        verbose,
    });
    tracing::info!(
        "device {}: model {} ({}), broker {broker_name}",
        config.device,
        model.display(),
        header.quantisation
    );

    // Hashing a large file takes seconds on a board: it goes beside the loading, and its result is kept.
    let (hash_path, hash_state) = (model.clone(), state.clone());
    let mut hashing = tokio::task::spawn_blocking(move || known_sha256(&hash_path, &hash_state));
    let mut hashed = false;

    let grace = Duration::from_secs(config.grace_s);
    let mut systemd = Systemd::new();
    let mut service = Service::new(config, table, journal_bytes, link.clone(), writer, worker);
    service.replay();
    systemd.ready();
    let mut tick = tokio::time::interval(Duration::from_millis(250));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut shutdown = std::pin::pin!(shutdown);
    let mut draining: Option<Instant> = None;
    loop {
        let chunk_due = service.chunk_due().map(tokio::time::Instant::from_std);
        tokio::select! {
            event = link_events.recv() => match event {
                Some(event) => service.link(event),
                // The link ends only when we end it.
                None => break,
            },
            commit = commits.recv() => match commit {
                Some(commit) => service.committed(&commit),
                None => return Err(std::io::Error::other("the journal's thread ended").into()),
            },
            event = worker_events.recv() => match event {
                Some(event) => service.worker(event),
                None => return Err(std::io::Error::other("the worker's supervisor ended").into()),
            },
            result = &mut hashing, if !hashed => {
                hashed = true;
                match result.map_err(std::io::Error::other).and_then(|result| result) {
                    Ok(sha256) => service.hashed(sha256),
                    Err(error) => tracing::error!("model {}: {error}", model.display()),
                }
            }
            () = tokio::time::sleep_until(chunk_due.unwrap_or_else(tokio::time::Instant::now)),
                if chunk_due.is_some() => service.chunks(),
            _ = tick.tick() => {
                service.tick();
                if service.is_alive() {
                    systemd.alive();
                }
                systemd.status(service.state_line());
            }
            () = &mut shutdown, if draining.is_none() => {
                tracing::info!("stopping");
                systemd.stopping();
                draining = Some(Instant::now());
                service.drain();
            }
        }
        if let Some(since) = draining
            && (service.is_idle() || since.elapsed() > grace)
        {
            break;
        }
    }
    drop(worker_events);
    service.stop(&mut link_events).await;
    #[cfg(feature = "embedded-broker")]
    if let Some(broker) = broker {
        broker.stop().await;
    }
    tracing::info!("stopped");
    Ok(())
}

/// What the worker is told.
fn engine_settings(
    config: &Config,
    model: &std::path::Path,
    state: &std::path::Path,
) -> std::io::Result<engine::Settings> {
    let adapters = config.adapters.iter();
    let adapters = adapters.map(|(name, path)| Ok((name.clone(), std::path::absolute(path)?)));
    let disk = Place {
        folder: std::path::absolute(state.join("prefix"))?,
        bytes: config.prefix.disk_bytes,
        tokens: config.prefix.disk_tokens,
    };
    Ok(engine::Settings {
        model: std::path::absolute(model)?,
        n_ctx: config.model.n_ctx,
        slots: config.model.slots,
        threads: config.model.threads,
        cache_type_k: config.model.cache_type_k.clone(),
        cache_type_v: config.model.cache_type_v.clone(),
        prefill_chunk: config.model.prefill_chunk,
        prefill_ms: config.model.prefill_ms,
        adapters: adapters.collect::<std::io::Result<_>>()?,
        prefix_bytes: config.prefix.ram_bytes,
        prefix_disk: (config.prefix.disk_bytes > 0).then_some(disk),
    })
}

/// How the daemon greets the broker.
fn link_options(config: &Config) -> Result<mqtt::Options, DaemonError> {
    let topics = Topics::new(&config.root, &config.device);
    let will = health::status(&config.device, State::Offline, Some("the connection was lost"));
    let mut options = broker_options(config)?;
    options.client_id = format!("{}-{}", config.root.replace('/', "-"), config.device);
    options.session_expiry_s = config.broker.session_expiry_s;
    options.most_packet_bytes = u32::try_from(most_packet_bytes(config)).unwrap_or(u32::MAX);
    options.subscribe = vec![topics.request(), topics.cancel()];
    options.will = Some((topics.status(), will));
    Ok(options)
}

/// The part of the link's options that a client has, too.
///
/// # Errors
/// A password file that cannot be read, an address that cannot be.
pub fn broker_options(config: &Config) -> Result<mqtt::Options, ConfigError> {
    let (host, port, tls) = match Address::parse(&config.broker.url)? {
        Address::Remote { host, port, tls } => (host, port, tls.then(|| config.broker.ca.clone())),
        Address::Embedded(address) => {
            // A broker that listens everywhere is reached here.
            let ip = if address.ip().is_unspecified() {
                "127.0.0.1".to_owned()
            } else {
                address.ip().to_string()
            };
            (ip, address.port(), None)
        }
    };
    let login = match (&config.broker.username, &config.broker.password_file) {
        (Some(user), Some(file)) => {
            let password = std::fs::read_to_string(file).map_err(|source| ConfigError::Io {
                path: file.clone(),
                source,
            })?;
            Some((user.clone(), password.trim_end_matches(['\r', '\n']).to_owned()))
        }
        (Some(user), None) => Some((user.clone(), String::new())),
        (None, _) => None,
    };
    Ok(mqtt::Options {
        host,
        port,
        tls,
        login,
        client_id: String::new(),
        session_expiry_s: 0,
        keep_alive_s: config.broker.keep_alive_s,
        most_packet_bytes: 4 * 1024 * 1024,
        subscribe: Vec::new(),
        will: None,
    })
}

/// A request as large as allowed, its topic and its properties. The reason for the second term is that a request
/// which is a little too large shall get an answer that says so.
fn most_packet_bytes(config: &Config) -> usize {
    config
        .limits
        .request_bytes
        .saturating_mul(2)
        .saturating_add(64 * 1024)
}

fn state_folder(config: &Config) -> Result<PathBuf, DaemonError> {
    let path = config.state_dir()?;
    let fail = |error: std::io::Error| DaemonError::State {
        path: path.clone(),
        message: format!("{error}; hint: --state-dir names a folder that this user may write"),
    };
    std::fs::create_dir_all(&path).map_err(fail)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // Prompts are personal: nobody else reads the journal. A folder that is not ours stays as it is.
        let _ = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700));
    }
    Ok(path)
}

/// One daemon for one state folder.
fn lock(folder: &std::path::Path) -> Result<std::fs::File, DaemonError> {
    let path = folder.join("lock");
    let file = std::fs::File::create(&path)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        DaemonError::State {
            path: folder.to_owned(),
            message: "another pipit uses it; hint: stop that one, or give this one another --state-dir"
                .to_owned(),
        }
    })?;
    Ok(file)
}

/// SHA-256 of the model, computed once for each file: path, size and time of change are what it is kept under.
fn known_sha256(model: &std::path::Path, state: &std::path::Path) -> std::io::Result<String> {
    let meta = std::fs::metadata(model)?;
    let modified = meta
        .modified()?
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    let name = format!(
        "{} {} {}",
        std::path::absolute(model)?.display(),
        meta.len(),
        modified.as_nanos()
    );
    let file = state.join("model-sha256");
    if let Ok(known) = std::fs::read_to_string(&file)
        && let Some((sha256, known)) = known.split_once(' ')
        && known == name
        && sha256.len() == 64
    {
        return Ok(sha256.to_owned());
    }
    let sha256 = model::sha256(model)?;
    if let Err(error) = std::fs::write(&file, format!("{sha256} {name}")) {
        tracing::debug!("{}: {error}", file.display());
    }
    Ok(sha256)
}
