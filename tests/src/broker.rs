//! A mosquitto of the test's own, and mosquitto's clients talking to it.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::process::{self, Finished, Running};

const START: Duration = Duration::from_secs(10);

/// A mosquitto process on a free port of 127.0.0.1; it ends with this value.
#[derive(Debug)]
pub struct Broker {
    process: Option<Running>,
    folder: TempDir,
    port: u16,
}

impl Broker {
    /// Starts a broker that forgets everything when it ends.
    ///
    /// # Errors
    /// When mosquitto is not installed or does not start.
    pub fn forgetful() -> Result<Self> {
        Self::start(false, "127.0.0.1", &|_| Ok("allow_anonymous true\n".to_owned()))
    }

    /// One that lets in whom these lines of mosquitto.conf let in; they get the broker's folder.
    ///
    /// # Errors
    /// Those of `lines`, and when mosquitto is not installed or does not start.
    pub fn with(lines: impl Fn(&Path) -> Result<String>) -> Result<Self> {
        Self::start(false, "127.0.0.1", &lines)
    }

    /// One that listens on every address: for a network of the test's own.
    ///
    /// # Errors
    /// When mosquitto is not installed or does not start.
    pub fn on_every_address() -> Result<Self> {
        Self::start(false, "0.0.0.0", &|_| Ok("allow_anonymous true\n".to_owned()))
    }

    /// Starts a broker that keeps sessions and messages over [`Broker::stop`] and [`Broker::restart`].
    ///
    /// # Errors
    /// When mosquitto is not installed or does not start.
    pub fn persistent() -> Result<Self> {
        Self::start(true, "127.0.0.1", &|_| Ok("allow_anonymous true\n".to_owned()))
    }

    fn start(persistent: bool, address: &str, more: &dyn Fn(&Path) -> Result<String>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let more = more(folder.path())?;
        let mut last = None;
        // Another process may take the free port before mosquitto does.
        for _ in 0..5 {
            let port = free_port()?;
            write_config(folder.path(), address, port, persistent, &more)?;
            match launch(folder.path()) {
                Ok(process) => {
                    return Ok(Self {
                        process: Some(process),
                        folder,
                        port,
                    });
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("no try was made")?)
    }

    /// Its TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its address as our programs take it.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// Ends it in good order: a persistent one writes its state.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(process) = self.process.take() {
            process.terminate(START)?;
        }
        Ok(())
    }

    /// Ends it at once, with nothing written.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(process) = self.process.take() {
            process.kill()?;
        }
        Ok(())
    }

    /// Stops its process where it stands (SIGSTOP): its connections stay open and nothing is read or said on them.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pause(&self) -> Result<()> {
        process::signal("STOP", self.id()?)
    }

    /// Lets a paused one go on (SIGCONT).
    ///
    /// # Errors
    /// When it does not run.
    pub fn resume(&self) -> Result<()> {
        process::signal("CONT", self.id()?)
    }

    fn id(&self) -> Result<u32> {
        Ok(self.process.as_ref().context("the broker does not run")?.id())
    }

    /// Starts it again on the same port after [`Broker::stop`] or [`Broker::kill`].
    ///
    /// # Errors
    /// When it does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.process = Some(launch(self.folder.path())?);
        Ok(())
    }

    /// Subscribes with mosquitto_sub (MQTT 5, QoS 1); returns once the broker has confirmed it.
    ///
    /// # Errors
    /// When mosquitto_sub is not installed or the broker refuses.
    pub fn subscribe(&self, topic: &str) -> Result<Subscription> {
        // Into a pipe, it would keep its lines until it has a block of them.
        let process = Running::start(
            Command::new("stdbuf")
                .args(["-oL", "mosquitto_sub", "-d"])
                .args(CLIENT)
                .args(["-p", &self.port.to_string(), "-t", topic])
                .args(["-F", &format!("{MARK}%t\t%p")]),
        )?;
        process.wait_for_line(START, |line| line.starts_with("Subscribed"))?;
        Ok(Subscription { process })
    }

    /// Publishes with mosquitto_pub (MQTT 5, QoS 1); returns once the broker has taken it. `more` are further
    /// arguments, such as `-D publish response-topic T`.
    ///
    /// # Errors
    /// When mosquitto_pub is not installed or the broker is not there.
    pub fn publish(&self, topic: &str, payload: &str, more: &[&str]) -> Result<()> {
        let port = self.port.to_string();
        let mut arguments = CLIENT.to_vec();
        arguments.extend(["-p", &port, "-t", topic, "-m", payload]);
        arguments.extend(more);
        process::run("mosquitto_pub", arguments, START)?.success()?;
        Ok(())
    }

    /// Asks with mosquitto_rr, which waits for one answer and prints it.
    ///
    /// # Errors
    /// When mosquitto_rr is not installed or no answer comes within `limit`.
    pub fn request(&self, topic: &str, reply: &str, payload: &str, limit: Duration) -> Result<Finished> {
        let (port, seconds) = (self.port.to_string(), limit.as_secs().to_string());
        let mut arguments = CLIENT.to_vec();
        arguments.extend([
            "-p", &port, "-t", topic, "-e", reply, "-W", &seconds, "-m", payload,
        ]);
        process::run("mosquitto_rr", arguments, limit + START)
    }
}

/// A running mosquitto_sub.
#[derive(Debug)]
pub struct Subscription {
    process: Running,
}

/// One message that a subscription received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its topic.
    pub topic: String,
    /// Its payload, on one line.
    pub payload: String,
}

/// How every mosquitto client is called here: MQTT 5, QoS 1, on this machine.
const CLIENT: [&str; 6] = ["-V", "5", "-q", "1", "-h", "127.0.0.1"];
/// Tells our lines from mosquitto_sub's own.
const MARK: &str = "message\t";

impl Subscription {
    /// The next message.
    ///
    /// # Errors
    /// When none comes within `limit`.
    pub fn next(&self, limit: Duration) -> Result<Message> {
        let line = self.process.wait_for_line(limit, |line| line.starts_with(MARK))?;
        let line = &line[MARK.len()..];
        // Of an empty message the end of the line is cut off.
        let (topic, payload) = line.split_once('\t').unwrap_or((line, ""));
        Ok(Message {
            topic: topic.to_owned(),
            payload: payload.to_owned(),
        })
    }

    /// The next message that `wanted` accepts; those before it are passed over.
    ///
    /// # Errors
    /// When none comes within `limit`.
    pub fn wait_for(&self, limit: Duration, mut wanted: impl FnMut(&Message) -> bool) -> Result<Message> {
        let deadline = Instant::now() + limit;
        loop {
            let message = self.next(deadline.saturating_duration_since(Instant::now()))?;
            if wanted(&message) {
                return Ok(message);
            }
        }
    }
}

/// A TCP port of 127.0.0.1 that nobody listens on at the moment.
///
/// # Errors
/// When the system has none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn write_config(folder: &Path, address: &str, port: u16, persistent: bool, more: &str) -> Result<()> {
    // `user root`: started by root, it would become a user who may not write into the test's folder. It keeps
    // everything that a slow reader has not taken: by default it would drop what is more than 1000 messages.
    let mut config = format!(
        "user root\nlistener {port} {address}\n{more}max_queued_messages 0\n\
         log_dest stderr\nlog_type error\nlog_type warning\nlog_type notice\nlog_type information\n"
    );
    if persistent {
        let place = folder.display();
        config.push_str(&format!(
            "persistence true\npersistence_location {place}/\nautosave_interval 1\n"
        ));
    }
    fs::write(folder.join("mosquitto.conf"), config)?;
    Ok(())
}

fn launch(folder: &Path) -> Result<Running> {
    // Debian keeps it where only root's PATH looks.
    let program = ["/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto"]
        .into_iter()
        .find(|path| Path::new(path).is_file())
        .unwrap_or("mosquitto");
    let process = Running::start(
        Command::new(program)
            .arg("-c")
            .arg(folder.join("mosquitto.conf"))
            .env_remove("NOTIFY_SOCKET"),
    )
    .with_context(|| format!("{program} is not there; hint: scripts/install-packages --tests"))?;
    process.wait_for_line(START, |line| line.ends_with("running"))?;
    Ok(process)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_arrives_also_after_a_restart() {
        let mut broker = Broker::forgetful().unwrap();
        for round in ["one", "two"] {
            let subscription = broker.subscribe("a/#").unwrap();
            broker.publish("a/b", round, &[]).unwrap();
            let message = subscription.next(START).unwrap();
            assert_eq!((message.topic.as_str(), message.payload.as_str()), ("a/b", round));
            broker.restart().unwrap();
        }
    }

    #[test]
    fn a_persistent_broker_keeps_a_retained_message_over_a_stop() {
        let mut broker = Broker::persistent().unwrap();
        broker.publish("kept", "still here", &["-r"]).unwrap();
        broker.stop().unwrap();
        broker.restart().unwrap();
        let message = broker.subscribe("kept").unwrap().next(START).unwrap();
        assert_eq!(message.payload, "still here");
    }

    #[test]
    fn a_request_that_nobody_answers_times_out() {
        let broker = Broker::forgetful().unwrap();
        let finished = broker
            .request("nobody/req", "reply/x", "hello", Duration::from_secs(1))
            .unwrap();
        assert_eq!(finished.code, Some(27), "{finished:?}");
    }

    #[test]
    fn a_stopped_broker_refuses_messages() {
        let mut broker = Broker::forgetful().unwrap();
        broker.kill().unwrap();
        if broker.publish("a", "b", &[]).is_ok() {
            panic!("a message was taken by a broker that is not there");
        }
    }
}
