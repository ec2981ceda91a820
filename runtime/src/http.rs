//! The HTTP door: what OpenAI's clients say becomes requests of the wire, and answers go back on the same connection.
//!
//! In: HTTP/1.1 on an address of this machine or a Unix socket, as `[http]` says. Out: [`Event`]s for the service, whose
//! journal, queue and limits are those of MQTT. `POST /v1/chat/completions`, `GET /v1/models`, `/health`, `/metrics`.
//! A client that goes away drops its connection's task, and with it the receiver that the service looks at.
//! Source: OpenAI's chat completions reference; what the openai client for Python reads (tests/tests/openai.rs).

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::rt::{Read, Write};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::config::{Config, ConfigError, Listen, secret};
use crate::daemon::service::door::Event;

mod chat;
mod events;
mod guard;
mod metrics;
mod models;
mod reply;
mod routes;

use guard::Guard;

/// Connections at a time; the system keeps more of them waiting.
const MOST_CONNECTIONS: usize = 256;
/// Seconds that a client may take for its headers, and for its body.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of all headers together, and what is read ahead.
const HEAD_BYTES: usize = 16 * 1024;
/// Questions that wait for the service.
const WAITING: usize = 64;
/// What connections may take to end when the daemon stops.
const GRACE: Duration = Duration::from_secs(2);

/// What keeps the door shut.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The address or the socket's file cannot be had.
    #[error(
        "the HTTP door cannot be at {place}: {reason}; hint: another program may be there: [http] listen names another place"
    )]
    Listen {
        /// Where.
        place: String,
        /// The system's reason.
        reason: String,
    },
}

/// What every connection knows.
#[derive(Debug)]
struct World {
    service: mpsc::Sender<Event>,
    guard: Guard,
    /// Bytes of a body.
    most_bytes: usize,
    created: u64,
}

/// A door that is open.
#[derive(Debug)]
pub struct Door {
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
    socket: Option<PathBuf>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Opens the door where the configuration says, if it says so. What comes in has to be given to the service.
///
/// # Errors
/// A place that cannot be had, a key that cannot be read.
pub async fn open(config: &Config) -> Result<(Option<Door>, mpsc::Receiver<Event>), HttpError> {
    let (service, events) = mpsc::channel(WAITING);
    let Some(listen) = &config.http.listen else {
        return Ok((None, events));
    };
    let fail = |error: std::io::Error| HttpError::Listen {
        place: listen.clone(),
        reason: error.to_string(),
    };
    let place = Listen::parse(listen, &config.http)?;
    let (listener, socket) = match &place {
        Listen::Tcp(address) => (
            Listener::Tcp(TcpListener::bind(address).await.map_err(fail)?),
            None,
        ),
        Listen::Unix(path) => (Listener::Unix(bind(path).map_err(fail)?), Some(path.clone())),
    };
    let key = config
        .http
        .key_file
        .as_deref()
        .map(secret::password)
        .transpose()?;
    let world = World {
        service,
        guard: Guard::new(&place, key)?,
        most_bytes: config.limits.request_bytes,
        created: crate::clock::unix_ms() / 1000,
    };
    tracing::info!("HTTP at {listen}");
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(accept(listener, Arc::new(world), stopped));
    Ok((Some(Door { stop, task, socket }), events))
}

/// A socket that the daemon's user and group may open. One that nobody listens on any more is replaced.
fn bind(path: &std::path::Path) -> std::io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    if Listen::is_abandoned_socket(path) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

impl Door {
    /// Lets nobody in any more, and waits a little for those who are being answered.
    pub async fn close(self) {
        let _ = self.stop.send(());
        let _ = self.task.await;
        if let Some(path) = self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Listener {
    async fn accept(&self) -> std::io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // A piece of an answer is small, and shall not wait for the next one.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(listener) => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

async fn accept(listener: Listener, world: Arc<World>, mut stopped: oneshot::Receiver<()>) {
    let connections = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        tokio::select! {
            (place, stream) = next => match stream {
                Ok(stream) => {
                    let (world, watcher) = (Arc::clone(&world), connections.watcher());
                    tokio::spawn(async move {
                        match stream {
                            Stream::Tcp(stream) => serve(TokioIo::new(stream), world, watcher).await,
                            Stream::Unix(stream) => serve(TokioIo::new(stream), world, watcher).await,
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    // Out of file descriptors, most likely: others will end.
                    tracing::warn!("HTTP: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            _ = &mut stopped => break,
        }
    }
    drop(listener);
    let _ = tokio::time::timeout(GRACE, connections.shutdown()).await;
}

/// One connection, until either side ends it.
async fn serve(io: impl Read + Write + Unpin + 'static, world: Arc<World>, watcher: Watcher) {
    let answer = service_fn(move |request: hyper::Request<Incoming>| {
        let world = Arc::clone(&world);
        async move { Ok::<_, Infallible>(routes::answer(&world, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(io, answer);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!("HTTP: {error}");
    }
}
