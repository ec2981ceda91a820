//! The daemon: joins link, journal, queue and worker.
//!
//! In: a [`Config`] and a shutdown future. Out: answers. [`serve`] sets the parts up, then one loop waits for
//! whatever happens next and hands it to the [`service`], which holds all state and never waits.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::config::{Address, Config, ConfigError, secret};
use crate::energy::Meter;
use crate::health::{self, State, Systemd};
use crate::home_assistant;
use crate::journal::table::Table;
use crate::journal::writer::Writer;
use crate::journal::{Journal, JournalError};
use crate::model::{self, ModelError};
use crate::mqtt::{self, Door, Link, LinkError, Tls};
use crate::plan::PlanError;
use crate::store::place::{GivenUp, MOST_STARTS};
use crate::store::{Served, Store, StoreError};
use crate::task;
use crate::wire::{PoolTopics, Topics};
use crate::worker::{self, Worker};

pub mod installer;
pub mod service;

use installer::Installer;
use service::Service;
use service::models::Models;
use service::pool::Pool;

/// Messages for the device that may be unacknowledged: the broker holds back the rest.
const RECEIVE_MAXIMUM: u16 = 32;
/// Events of the pool's connections on their way.
const POOL_EVENTS: usize = 8;

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No model is named.
    #[error("no model; hint: `pipit model install`, --model FILE.gguf, or [model] path in the configuration")]
    NoModel,
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Settings that no plan can be made for.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// An installed model.
    #[error(transparent)]
    Store(#[from] StoreError),
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
    /// The HTTP door.
    #[cfg(feature = "http")]
    #[error(transparent)]
    Http(#[from] crate::http::HttpError),
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
    if let Some(path) = &config.model.path {
        // Before a folder is made.
        model::inspect(path)?;
    }
    let state = state_folder(&config)?;
    let _lock = lock(&state)?;
    let store = Store::of(&state);
    let served = choose(&config, &state, &store)?;
    let (header, plan) = served.plan(&config)?;
    let model = served.path.clone();
    let adapters: Vec<String> = served.adapters.keys().cloned().collect();
    let tasks = task::load(&config, &adapters)?;
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
    let meter = meter(&config)?;
    if let Some(why) = open_way(&config) {
        tracing::warn!("{why}; hint: mqtts:// in [broker] url");
    }
    let options = link_options(&config)?;
    let broker_name = format!("{}:{}", options.host, options.port);
    #[cfg(feature = "http")]
    let (door, mut knocks) = crate::http::open(&config).await?;
    #[cfg(not(feature = "http"))]
    let (_, mut knocks) = tokio::sync::mpsc::channel(1);
    let (link, mut link_events) = Link::start(options.clone())?;
    let (pool_sender, mut pool_events) = tokio::sync::mpsc::channel(POOL_EVENTS);
    let pool = match &config.pool.name {
        Some(name) => Some(Pool::join(&config, name, options, pool_sender)?),
        None => None,
    };
    let (writer, mut commits) = Writer::start(journal)?;
    let program = std::env::current_exe()?;
    let worker_options = worker::Options {
        program: program.clone(),
        settings: served.settings(&config, &state)?,
        plan,
        memory_bytes: config.model.memory_bytes,
        hang: Duration::from_secs(config.model.hang_s),
        verbose,
    };
    let (worker, mut worker_events) = Worker::start(worker_options.clone());
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
    let (installer, mut reports) = Installer::new(program, state.clone());
    let models = Models::new(store, installer, state, worker_options, served);
    let mut service = Service::new(
        config,
        table,
        journal_bytes,
        link.clone(),
        writer,
        worker,
        (models, adapters, tasks),
    );
    service.join(pool);
    service.measure_with(meter);
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
            Some((door, event)) = pool_events.recv() => service.pool(door, event),
            result = &mut hashing, if !hashed => {
                hashed = true;
                match result.map_err(std::io::Error::other).and_then(|result| result) {
                    Ok(sha256) => service.hashed(sha256),
                    Err(error) => tracing::error!("model {}: {error}", model.display()),
                }
            }
            Some(report) = reports.recv() => service.reported(report),
            Some(knock) = knocks.recv() => service.door(knock),
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
        service.fill_from_pool();
        if let Some(since) = draining
            && (service.is_idle() || since.elapsed() > grace)
        {
            break;
        }
    }
    drop(worker_events);
    service.stop(&mut link_events).await;
    // Whoever still waits there has heard from the service now that nothing comes any more.
    #[cfg(feature = "http")]
    if let Some(door) = door {
        drop(knocks);
        door.close().await;
    }
    #[cfg(feature = "embedded-broker")]
    if let Some(broker) = broker {
        broker.stop().await;
    }
    tracing::info!("stopped");
    Ok(())
}

/// The sensor of the configuration, or the one that the machine has.
fn meter(config: &Config) -> Result<Option<Meter>, ConfigError> {
    let meter = match &config.metrics.energy_sensor {
        Some(path) => Some(
            Meter::of(path)
                .map_err(|error| ConfigError::value("metrics.energy_sensor", error.to_string()))?,
        ),
        None => Meter::find(std::path::Path::new("/")),
    };
    if let Some(meter) = &meter {
        tracing::info!("energy is measured by {}", meter.name());
    }
    Ok(meter)
}

/// The model to begin with: of the configuration, or the active one of the store, or the one before it, where the active
/// one was given up or cannot be read.
fn choose(config: &Config, state: &std::path::Path, store: &Store) -> Result<Served, DaemonError> {
    let fit = |served: Option<Served>| -> Result<Served, DaemonError> {
        let served = served.ok_or(DaemonError::NoModel)?;
        served.plan(config)?;
        Ok(served)
    };
    let place = store.place().unwrap_or_default();
    let hopeless = config.model.path.is_none() && !place.proven && place.starts >= MOST_STARTS;
    let error = match Served::of(config, state).map_err(DaemonError::from).and_then(fit) {
        Ok(served) if !hopeless => return Ok(served),
        Ok(served) if place.previous.is_none() => return Ok(served),
        Ok(_) => format!("it was started {} times and has not answered", place.starts),
        Err(error) if config.model.path.is_some() || place.previous.is_none() => return Err(error),
        Err(error) => error.to_string(),
    };
    tracing::error!("the model {} is given up: {error}", place.active);
    let place = store.change(|place| {
        let given_up = GivenUp {
            id: place.active.clone(),
            why: error,
        };
        let mut place = place.rolled_back()?;
        (place.previous, place.proven, place.given_up) = (None, true, Some(given_up));
        Ok(place)
    })?;
    fit(Some(Served::installed(store, &place.active)?))
}

/// How the daemon greets the broker.
fn link_options(config: &Config) -> Result<mqtt::Options, DaemonError> {
    let topics = Topics::new(&config.root, &config.device);
    let will = health::status(&config.device, State::Offline, Some("the connection was lost"));
    let mut options = broker_options(config)?;
    options.client_id = client_id(&config.root, &config.device);
    options.session_expiry_s = config.broker.session_expiry_s;
    options.most_packet_bytes = u32::try_from(most_packet_bytes(config)).unwrap_or(u32::MAX);
    options.subscribe = vec![topics.request(), topics.cancel()];
    if !config.tasks.is_empty() {
        options.subscribe.push(topics.tasks());
    }
    if config.admin.over_mqtt {
        options.subscribe.push(topics.commands());
    }
    if let Some(pool) = &config.pool.name {
        let pool = PoolTopics::new(&config.root, pool, &config.device);
        options.subscribe.extend(pool.own());
        options.subscribe_retained.extend(pool.retained());
    }
    if config.home_assistant.discovery {
        options.subscribe.push(home_assistant::birth(config));
    }
    options.will = Some((topics.status(), health::payload(&will)));
    Ok(options)
}

/// The client id of a device at its broker.
fn client_id(root: &str, device: &str) -> String {
    format!("{}-{device}", root.replace('/', "-"))
}

/// The part of the link's options that a client has, too.
///
/// # Errors
/// A password file that cannot be read, an address that cannot be.
pub fn broker_options(config: &Config) -> Result<mqtt::Options, ConfigError> {
    let (host, port, tls) = match Address::parse(&config.broker.url)? {
        Address::Remote { host, port, tls } => (host, port, tls),
        Address::Embedded(address) => {
            // A broker that listens everywhere is reached here.
            let ip = if address.ip().is_unspecified() {
                "127.0.0.1".to_owned()
            } else {
                address.ip().to_string()
            };
            (ip, address.port(), false)
        }
    };
    let tls = match tls {
        true => Some(tls_options(config)?),
        false => None,
    };
    let login = match (&config.broker.username, &config.broker.password_file) {
        (Some(user), Some(file)) => Some((user.clone(), secret::password(file)?)),
        (Some(user), None) => Some((user.clone(), String::new())),
        (None, _) => None,
    };
    Ok(mqtt::Options {
        door: Door::Own,
        host,
        port,
        tls,
        login,
        client_id: String::new(),
        session_expiry_s: 0,
        keep_alive_s: config.broker.keep_alive_s,
        most_packet_bytes: 4 * 1024 * 1024,
        receive_maximum: RECEIVE_MAXIMUM,
        subscribe: Vec::new(),
        subscribe_retained: Vec::new(),
        unsubscribe: Vec::new(),
        will: None,
    })
}

fn tls_options(config: &Config) -> Result<Tls, ConfigError> {
    let broker = &config.broker;
    let client = match (&broker.certificate, &broker.key) {
        (Some(certificate), Some(key)) => {
            let pem = |key: &'static str, path: &std::path::Path, bytes: Vec<u8>, what: &str| {
                let is_one = memchr::memmem::find(&bytes, what.as_bytes()).is_some();
                match is_one {
                    true => Ok(bytes),
                    false => Err(ConfigError::value(
                        key,
                        format!("{} holds no `{what}`; hint: a PEM file", path.display()),
                    )),
                }
            };
            let path = secret::file(certificate);
            let bytes = std::fs::read(&path).map_err(|source| ConfigError::Io {
                path: path.clone(),
                source,
            })?;
            let certificate = pem("broker.certificate", &path, bytes, "BEGIN CERTIFICATE")?;
            Some((
                certificate,
                pem("broker.key", key, secret::read(key)?, "PRIVATE KEY")?,
            ))
        }
        _ => None,
    };
    Ok(Tls {
        ca: broker.ca.clone(),
        client,
    })
}

/// What is wrong with a way to the broker on which others can read along; `None` when nothing is.
pub fn open_way(config: &Config) -> Option<String> {
    let Ok(Address::Remote { host, tls: false, .. }) = Address::parse(&config.broker.url) else {
        return None;
    };
    let here = host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    let password = match &config.broker.password_file {
        Some(_) => ", the password among it",
        None => "",
    };
    (!here).then(|| {
        format!("the connection to {host} is not encrypted: whoever is on the way reads everything{password}")
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
