//! The broker: does it let this device in?
//!
//! A connection of its own, with a client id that nobody else has: TCP, TLS, CONNACK, and a subscription to the
//! device's own status, which a client of the device may have.

use std::time::Duration;

use tokio::net::TcpListener;

use super::{Finding, State};
use crate::config::{Address, Config};
use crate::daemon::{broker_options, open_way};
use crate::mqtt::{Event, Link};
use crate::wire::Topics;

const WHAT: &str = "broker";
/// For all of it.
const PATIENCE: Duration = Duration::from_secs(3);

/// Connects once. An embedded broker that does not run yet has only its port looked at.
pub async fn finding(config: &Config, daemon_runs: bool) -> Finding {
    match Address::parse(&config.broker.url) {
        Err(error) => Finding::of_error(WHAT, &error),
        Ok(Address::Embedded(address)) if !daemon_runs => match TcpListener::bind(address).await {
            Ok(_) => Finding::new(WHAT, State::Ok, format!("embedded; {address} is free")),
            Err(error) => Finding::new(WHAT, State::Fail, format!("embedded; {address}: {error}"))
                .hint("another broker runs there: --broker mqtt://… uses it, embedded://ADDR:PORT takes another port"),
        },
        Ok(_) => connect(config).await,
    }
}

async fn connect(config: &Config) -> Finding {
    let mut options = match broker_options(config) {
        Ok(options) => options,
        Err(error) => return Finding::of_error(WHAT, &error),
    };
    let name = format!("{}:{}", options.host, options.port);
    options.client_id = format!("pipit-check-{}", uuid::Uuid::now_v7().simple());
    options.subscribe = vec![Topics::new(&config.root, &config.device).status()];
    let (link, mut events) = match Link::start(options) {
        Ok(started) => started,
        Err(error) => return Finding::of_error(WHAT, &error),
    };
    let unreachable = |reason: &str| {
        Finding::new(WHAT, State::Fail, format!("{name}: {reason}"))
            .hint("is a broker running there, and does it know this user? --broker names another")
    };
    let finding = match tokio::time::timeout(PATIENCE, events.recv()).await {
        Err(_) => unreachable(&format!("no answer within {} s", PATIENCE.as_secs())),
        Ok(Some(Event::Connected { .. })) => {
            let says = format!("{name} takes a client of this user");
            match open_way(config) {
                None => Finding::new(WHAT, State::Ok, says),
                Some(why) => {
                    Finding::new(WHAT, State::Warn, format!("{says}; {why}")).hint("mqtts:// in [broker] url")
                }
            }
        }
        Ok(Some(Event::Disconnected { reason })) => unreachable(&reason),
        Ok(Some(_)) | Ok(None) => unreachable("the connection ended"),
    };
    link.close().await;
    finding
}
