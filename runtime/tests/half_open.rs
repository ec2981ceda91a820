//! A half-open link with more to send than the sockets hold: the client library's `poll()` hangs there for ever, and
//! the link's own watchdog must strike. A real mosquitto that stands still (SIGSTOP).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::BTreeSet;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pipit::mqtt::{Delivery, Event, Link, Options, Outgoing};

const KEEP_ALIVE_S: u16 = 5;

/// A broker that does not outlive its test.
struct Broker {
    process: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Broker {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let config = folder.path().join("mosquitto.conf");
        std::fs::write(
            &config,
            format!("listener {port} 127.0.0.1\nallow_anonymous true\n"),
        )
        .unwrap();
        let beside = "/usr/sbin/mosquitto";
        let program = if Path::new(beside).exists() {
            beside
        } else {
            "mosquitto"
        };
        let process = Command::new(program)
            .arg("-c")
            .arg(&config)
            .stderr(Stdio::null())
            .spawn()
            .expect("mosquitto is installed");
        let until = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "mosquitto does not listen");
            std::thread::yield_now();
        }
        Self {
            process,
            port,
            _folder: folder,
        }
    }

    fn signal(&self, name: &str) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn the_watchdog_strikes_when_outgoing_data_waits_and_nothing_is_lost() {
    let broker = Broker::start();
    let (link, mut events) = Link::start(Options {
        host: "127.0.0.1".to_owned(),
        port: broker.port,
        client_id: "half-open".to_owned(),
        keep_alive_s: KEEP_ALIVE_S,
        most_packet_bytes: 4 * 1024 * 1024,
        subscribe: vec!["x".to_owned()],
        ..Options::default()
    })
    .unwrap();
    assert!(matches!(events.recv().await, Some(Event::Connected { epoch: 1 })));

    broker.signal("-STOP");
    // 64 MB: the socket buffers of both sides hold a tenth of it.
    let tokens: BTreeSet<u64> = (1..=32).collect();
    for &token in &tokens {
        assert!(link.publish(Outgoing {
            topic: "nobody/listens".to_owned(),
            payload: vec![b'x'; 2 * 1024 * 1024],
            token: Some(token),
            ..Outgoing::default()
        }));
    }
    let stopped = Instant::now();
    let patience = Duration::from_secs(u64::from(KEEP_ALIVE_S) * 2 + 10);
    let event = tokio::time::timeout(patience, events.recv())
        .await
        .expect("the link hangs");
    let Some(Event::Disconnected { reason }) = event else {
        panic!("{event:?}")
    };
    println!("after {:.1} s: {reason}", stopped.elapsed().as_secs_f64());
    // The watchdog's own words: the client library noticed nothing.
    assert!(reason.contains("nothing from the broker for 9 s"), "{reason}");

    broker.signal("-CONT");
    let mut left = tokens;
    let until = tokio::time::Instant::now() + Duration::from_secs(60);
    while !left.is_empty() {
        match tokio::time::timeout_at(until, events.recv()).await {
            Ok(Some(Event::Delivered { token, delivery })) => {
                assert!(!matches!(delivery, Delivery::Refused(_)), "{delivery:?}");
                left.remove(&token);
            }
            Ok(Some(_)) => {}
            other => panic!("{} messages were lost: {other:?}", left.len()),
        }
    }
}
