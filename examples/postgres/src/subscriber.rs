//! The subscriber: answers from the broker become rows. A message is acknowledged when its row is committed, so that the
//! broker keeps what came while the database was away.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{ConnectReturnCode, Packet, Publish, SubscribeFilter};
use rumqttc::{AckMode, AsyncClient, Event, MqttOptions, Transport};

use crate::answer::{Answer, Message};
use crate::session::EmptySession;
use crate::store::Store;

/// Messages that may be unacknowledged: the broker holds back the rest.
const RECEIVE_MAXIMUM: u16 = 64;
/// The largest answer that is taken, with its properties.
const MOST_PACKET_BYTES: u32 = 4 * 1024 * 1024;
/// Between two attempts to reach the broker or the database.
const AGAIN: Duration = Duration::from_secs(2);
/// Seconds that the broker keeps answers for a subscriber that is away: a week.
const SESSION_EXPIRY_S: u32 = 7 * 24 * 3600;
/// Between two looks for old rows.
const PRUNE: Duration = Duration::from_secs(3600);

/// Where answers are, and for how long they are kept.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// mqtt://HOST[:PORT] or mqtts://HOST[:PORT]
    #[arg(
        long,
        value_name = "URL",
        env = "PIPIT_BROKER",
        default_value = "mqtt://127.0.0.1:1883"
    )]
    broker: String,
    /// Who we are at the broker: the same name gets what came while it was away
    #[arg(long, value_name = "ID", default_value = "pipit-postgres")]
    client_id: String,
    /// User at the broker
    #[arg(long, value_name = "NAME")]
    username: Option<String>,
    /// File that holds the password alone
    #[arg(long, value_name = "FILE", requires = "username")]
    password_file: Option<PathBuf>,
    /// PEM file with the authorities to trust for mqtts:// [default: the system's]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Topics on which answers come; can be given again
    #[arg(long, value_name = "FILTER", default_values = ["reply/#", "pipit/v1/+/res/#", "pipit/v1/pool/+/res/#"])]
    subscribe: Vec<String>,
    /// Levels of the reply prefixes: 1 for reply/, of which reply/kitchen/17 is the client reply/kitchen
    #[arg(long, value_name = "N", default_value_t = 1)]
    prefix_levels: usize,
    /// Days that a row is kept
    #[arg(long, value_name = "DAYS", default_value_t = 30.0, value_parser = days)]
    pub(crate) keep_days: f64,
}

/// Days as a number above 0.
pub(crate) fn days(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|days: &f64| days.is_finite() && *days > 0.0)
        .ok_or_else(|| "hint: a number above 0, like 30".to_owned())
}

/// Takes in answers until it is told to stop.
///
/// # Errors
/// What cannot become better by trying again.
pub(crate) async fn run(options: &Options, store: &Store) -> anyhow::Result<()> {
    let mqtt = mqtt_options(options)?;
    let connections = async {
        loop {
            let lost = connection(mqtt.clone(), options, store).await;
            tracing::warn!("no connection to the broker: {lost}; trying again");
            tokio::time::sleep(AGAIN).await;
        }
    };
    let old_rows = async {
        loop {
            match store.prune(options.keep_days).await {
                Ok(0) => {}
                Ok(rows) => tracing::info!("{rows} rows older than {} days deleted", options.keep_days),
                Err(error) => tracing::warn!("old rows cannot be deleted: {error}"),
            }
            tokio::time::sleep(PRUNE).await;
        }
    };
    tokio::select! {
        () = connections => Ok(()),
        () = old_rows => Ok(()),
    }
}

/// One connection, until it is lost; why.
async fn connection(mqtt: MqttOptions, options: &Options, store: &Store) -> String {
    let (client, mut event_loop) = AsyncClient::builder(mqtt).capacity(256).build();
    // Whoever polls must not wait for the database: what came goes through here.
    let (sender, mut messages) = tokio::sync::mpsc::channel::<Publish>(usize::from(RECEIVE_MAXIMUM));
    let poll = async {
        loop {
            match event_loop.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(connack))) => {
                    if connack.code != ConnectReturnCode::Success {
                        return format!("it refuses: {:?}", connack.code);
                    }
                    let filters = options.subscribe.iter();
                    let filters =
                        filters.map(|filter| SubscribeFilter::new(filter.clone(), QoS::AtLeastOnce));
                    if let Err(error) = client.try_subscribe_many(filters.collect::<Vec<_>>()) {
                        return error.to_string();
                    }
                }
                Ok(Event::Incoming(Packet::SubAck(_))) => tracing::info!("listening for answers"),
                Ok(Event::Incoming(Packet::Publish(publish))) => {
                    // Full only where the broker ignores our Receive Maximum.
                    if let Err(error) = sender.try_send(publish) {
                        return error.to_string();
                    }
                }
                Ok(_) => {}
                Err(error) => return error.to_string(),
            }
        }
    };
    let keep = async {
        while let Some(publish) = messages.recv().await {
            keep(&publish, options, store).await;
            if let Err(error) = client.ack(&publish).await {
                return error.to_string();
            }
        }
        "the channel closed".to_owned()
    };
    tokio::select! {
        why = poll => why,
        why = keep => why,
    }
}

/// Adds the row of a message, for as long as that takes.
async fn keep(publish: &Publish, options: &Options, store: &Store) {
    let properties = publish.properties.clone().unwrap_or_default();
    let topic = String::from_utf8_lossy(&publish.topic);
    let message = Message {
        topic: &topic,
        payload: &publish.payload,
        correlation: properties.correlation_data.as_deref(),
        properties: &properties.user_properties,
    };
    let Some(answer) = Answer::of(&message, options.prefix_levels) else {
        return;
    };
    loop {
        match store.add(&answer).await {
            Ok(true) => return tracing::debug!(id = answer.request_id, "kept"),
            Ok(false) => return tracing::debug!(id = answer.request_id, "known"),
            Err(error) => {
                tracing::warn!("a row cannot be written: {error}; trying again");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

fn mqtt_options(options: &Options) -> anyhow::Result<MqttOptions> {
    let (tls, address) = match options.broker.split_once("://") {
        Some(("mqtt", address)) => (false, address),
        Some(("mqtts", address)) => (true, address),
        _ => bail!(
            "`{}` is no broker; hint: mqtt://HOST[:PORT] or mqtts://HOST[:PORT]",
            options.broker
        ),
    };
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) => {
            let port = port
                .parse()
                .with_context(|| format!("`{port}` is no port; hint: 1883"))?;
            (host, port)
        }
        None => (address, if tls { 8883 } else { 1883 }),
    };
    let mut mqtt = MqttOptions::new(&options.client_id, (host, port));
    mqtt.set_keep_alive(30)
        .set_ack_mode(AckMode::Manual)
        .set_receive_maximum(Some(RECEIVE_MAXIMUM))
        .set_max_packet_size(Some(MOST_PACKET_BYTES))
        .set_outgoing_inflight_upper_limit(32)
        .set_clean_start(false)
        .set_session_expiry_interval(Some(SESSION_EXPIRY_S))
        .set_session_store(EmptySession {
            expiry_s: SESSION_EXPIRY_S,
        });
    if tls {
        mqtt.set_transport(match &options.ca {
            None => Transport::try_tls_with_default_config().context("TLS")?,
            Some(path) => {
                let ca = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
                Transport::tls(ca, None, None)
            }
        });
    }
    if let Some(user) = &options.username {
        let password = match &options.password_file {
            Some(path) => std::fs::read_to_string(path)
                .with_context(|| format!("{} cannot be read", path.display()))?
                .trim_end_matches(['\r', '\n'])
                .to_owned(),
            None => String::new(),
        };
        mqtt.set_credentials(user.clone(), password);
    }
    Ok(mqtt)
}
