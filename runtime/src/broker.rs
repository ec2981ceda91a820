//! The embedded broker: MQTT 3.1.1 and 5 on one port, inside `pipit serve` (the crate mqtt5).
//!
//! For a first try, and for a device that is its own broker. It keeps everything in memory: what a client has sent
//! and the daemon has not yet read is lost with the process, so a client that must know sends again until it is
//! answered (`pipit ask` does). It lets everyone in, so by default it listens on this machine only.

use std::net::SocketAddr;

use mqtt5::broker::config::StorageBackend;
use mqtt5::broker::{BrokerConfig, BrokerShutdownHandle, MqttBroker, StorageConfig};

/// What waits for a client that does not read: so many messages on their way to it, after them so many bytes. What comes
/// then is dropped, as mosquitto does it.
const MOST_ON_THEIR_WAY: usize = 256;
const MOST_WAITING_BYTES: usize = 8 * 1024 * 1024;

/// What goes wrong.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The port is in use, or not ours.
    #[error(
        "the embedded broker cannot listen on {address}: {reason}; hint: another broker may run there: \
         --broker mqtt://{address} uses it, --broker embedded://{ip}:PORT takes another port"
    )]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Its address part.
        ip: std::net::IpAddr,
        /// The system's reason.
        reason: String,
    },
}

/// A broker that runs.
pub struct Broker {
    stop: BrokerShutdownHandle,
    task: tokio::task::JoinHandle<()>,
    /// Where it listens.
    pub address: SocketAddr,
}

impl std::fmt::Debug for Broker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Broker")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Broker {
    /// Starts listening.
    ///
    /// # Errors
    /// A port that cannot be had.
    pub async fn start(address: SocketAddr, most_packet_bytes: usize) -> Result<Self, BrokerError> {
        let fail = |reason: String| BrokerError::Listen {
            address,
            ip: address.ip(),
            reason,
        };
        // The broker's own listener takes a port that is in use without a word on some systems: ask first.
        drop(std::net::TcpListener::bind(address).map_err(|error| fail(error.to_string()))?);
        let mut config = BrokerConfig {
            bind_addresses: vec![address],
            max_packet_size: most_packet_bytes,
            // None of the payload stays in a topic alias that the client may not resolve.
            topic_alias_maximum: 0,
            client_channel_capacity: MOST_ON_THEIR_WAY,
            storage_config: StorageConfig {
                backend: StorageBackend::Memory,
                enable_persistence: true,
                max_queued_bytes_per_client: MOST_WAITING_BYTES,
                ..StorageConfig::default()
            },
            ..BrokerConfig::default()
        };
        config.auth_config.allow_anonymous = true;
        let mut broker = MqttBroker::with_config(config)
            .await
            .map_err(|error| fail(error.to_string()))?;
        let address = broker.local_addr().unwrap_or(address);
        let stop = broker.shutdown_handle();
        let task = tokio::spawn(async move {
            if let Err(error) = broker.run().await {
                tracing::error!("embedded broker: {error}");
            }
        });
        Ok(Self { stop, task, address })
    }

    /// Stops it.
    pub async fn stop(self) {
        self.stop.shutdown();
        let _ = tokio::time::timeout(std::time::Duration::from_secs(2), self.task).await;
    }
}
