//! The supervisor of the worker process: starts `pipit worker`, speaks [`ToWorker`] and [`FromWorker`] with it over
//! pipes, and starts another when it ends.
//!
//! In: frames for the worker. Out: [`Event`]s. The worker is the same program; it ends when this end of its input
//! closes, and with its parent.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::engine::{FromWorker, Settings, ToWorker};
use crate::plan::{self, Plan};

const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Between two attempts to load a model that could not be loaded.
const UNLOADABLE_WAIT: Duration = Duration::from_secs(60);

/// How to start the worker.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program; this one.
    pub program: PathBuf,
    /// What it is to load.
    pub settings: Settings,
    /// What it will take: it is not started where there is less.
    pub plan: Plan,
    /// Bytes that it may take; 0 is what is available.
    pub memory_bytes: u64,
    /// Silence after which it is ended.
    pub hang: Duration,
    /// Show llama.cpp's own messages.
    pub verbose: bool,
}

/// What happens.
#[derive(Clone, Debug)]
pub enum Event {
    /// A worker was started, with this process id.
    Started(u32),
    /// A frame.
    Frame(FromWorker),
    /// It was told to unload the model, and has ended; another one follows when it is woken.
    Asleep,
    /// It was told to make way for another model, and has ended; one with that model follows.
    Changed,
    /// It ended; another one follows. Whatever it was doing is undone.
    Ended {
        /// How.
        status: String,
    },
}

/// What the supervisor is told.
#[derive(Debug)]
enum Order {
    Frame(ToWorker),
    Sleep,
    Wake,
    Change(Box<Options>),
}

/// The sending half. When it is dropped, the worker ends.
#[derive(Debug)]
pub struct Worker {
    orders: mpsc::Sender<Order>,
    task: tokio::task::JoinHandle<()>,
}

impl Worker {
    /// Starts the supervisor's task, and that the worker.
    pub fn start(options: Options) -> (Self, mpsc::Receiver<Event>) {
        let (orders, inbox) = mpsc::channel(256);
        let (events, outbox) = mpsc::channel(64);
        let task = tokio::spawn(supervise(options, inbox, events));
        (Self { orders, task }, outbox)
    }

    /// Whether the supervisor still runs.
    pub fn is_alive(&self) -> bool {
        !self.orders.is_closed()
    }

    /// Sends a frame; false when there is no room, or no worker.
    pub fn send(&self, frame: ToWorker) -> bool {
        self.orders.try_send(Order::Frame(frame)).is_ok()
    }

    /// Ends the worker until [`Self::wake`]: the memory of the model is free until then.
    pub fn sleep(&self) {
        // With no room there are frames, so there is work: then it must not sleep.
        let _ = self.orders.try_send(Order::Sleep);
    }

    /// Starts a worker again after [`Self::sleep`]; without one, this does nothing.
    pub fn wake(&self) {
        let _ = self.orders.try_send(Order::Wake);
    }

    /// Ends the worker and starts one with other options; false when there is no room to say so.
    pub fn change(&self, options: Options) -> bool {
        self.orders.try_send(Order::Change(Box::new(options))).is_ok()
    }

    /// Ends the worker and waits for it.
    pub async fn stop(self) {
        drop(self.orders);
        let _ = tokio::time::timeout(Duration::from_secs(5), self.task).await;
    }
}

/// How one worker came to its end.
enum End {
    /// Nobody wants another.
    Closed,
    /// Nobody wants another for now.
    Asleep,
    /// Another one with these options is wanted.
    Changed(Box<Options>),
    /// By itself.
    Died { status: String, was_ready: bool },
    /// It could not load the model.
    Unloadable,
}

async fn supervise(mut options: Options, mut inbox: mpsc::Receiver<Order>, events: mpsc::Sender<Event>) {
    let mut wait = FIRST_WAIT;
    loop {
        let (status, pause) = match run(&options, &mut inbox, &events).await {
            End::Closed => return,
            End::Asleep => {
                if events.send(Event::Asleep).await.is_err() {
                    return;
                }
                loop {
                    match inbox.recv().await {
                        Some(Order::Wake) => break,
                        Some(Order::Change(changed)) => {
                            options = *changed;
                            break;
                        }
                        // Frames for a worker that is gone; the daemon sends them again to the next.
                        Some(_) => {}
                        None => return,
                    }
                }
                continue;
            }
            End::Changed(changed) => {
                (options, wait) = (*changed, FIRST_WAIT);
                if events.send(Event::Changed).await.is_err() {
                    return;
                }
                continue;
            }
            End::Died { status, was_ready } => {
                if was_ready {
                    wait = FIRST_WAIT;
                }
                let pause = wait;
                wait = (wait * 2).min(LONGEST_WAIT);
                (status, pause)
            }
            End::Unloadable => ("the model cannot be loaded".to_owned(), UNLOADABLE_WAIT),
        };
        if events.send(Event::Ended { status }).await.is_err() {
            return;
        }
        let until = tokio::time::sleep(pause);
        tokio::pin!(until);
        loop {
            tokio::select! {
                () = &mut until => break,
                order = inbox.recv() => match order {
                    Some(Order::Change(changed)) => {
                        (options, wait) = (*changed, FIRST_WAIT);
                        break;
                    }
                    // Frames for a worker that is gone; the daemon sends them again to the next.
                    Some(_) => {}
                    None => return,
                },
            }
        }
    }
}

async fn run(options: &Options, inbox: &mut mpsc::Receiver<Order>, events: &mpsc::Sender<Event>) -> End {
    let died = |status: String| End::Died {
        status,
        was_ready: false,
    };
    if let Err(error) = options
        .plan
        .check(plan::available(Path::new("/"), options.memory_bytes).as_ref())
    {
        let message = error.to_string();
        return match events
            .send(Event::Frame(FromWorker::Unloadable { message }))
            .await
        {
            Ok(()) => End::Unloadable,
            Err(_) => End::Closed,
        };
    }
    let mut command = Command::new(&options.program);
    command
        .arg("worker")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    if options.verbose {
        command.arg("-v");
    }
    // A Ctrl-C at the terminal is for the daemon: it ends the worker when its answer is out.
    command.process_group(0);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return died(format!("cannot be started: {error}")),
    };
    let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return died("has no pipes".to_owned());
    };
    if events
        .send(Event::Started(child.id().unwrap_or(0)))
        .await
        .is_err()
    {
        return End::Closed;
    }
    let mut lines = BufReader::new(output).lines();
    let mut to_write = line(&ToWorker::Load(options.settings.clone()));
    let mut written = 0;
    let (mut ready, mut unloadable) = (false, false);
    let mut silence = std::pin::pin!(tokio::time::sleep(options.hang));
    loop {
        tokio::select! {
            read = lines.next_line() => {
                silence.as_mut().reset(tokio::time::Instant::now() + options.hang);
                let text = match read {
                    Ok(Some(text)) => text,
                    Ok(None) | Err(_) => break,
                };
                match serde_json::from_str(&text) {
                    Ok(frame) => {
                        ready |= matches!(frame, FromWorker::Ready(_));
                        unloadable |= matches!(frame, FromWorker::Unloadable { .. });
                        if events.send(Event::Frame(frame)).await.is_err() {
                            return End::Closed;
                        }
                    }
                    Err(error) => tracing::error!("a frame from the worker is not understood: {error}"),
                }
            }
            // Never await a write alone: the worker may be writing, too, into a full pipe.
            result = input.write(&to_write[written..]), if written < to_write.len() => match result {
                Ok(count) => written += count,
                Err(_) => break,
            },
            order = inbox.recv(), if written == to_write.len() => match order {
                Some(Order::Frame(frame)) => {
                    to_write = line(&frame);
                    written = 0;
                }
                Some(Order::Wake) => {}
                Some(Order::Sleep) => {
                    drop(input);
                    end(&mut child).await;
                    return End::Asleep;
                }
                Some(Order::Change(changed)) => {
                    drop(input);
                    end(&mut child).await;
                    return End::Changed(changed);
                }
                None => {
                    drop(input);
                    end(&mut child).await;
                    return End::Closed;
                }
            },
            () = &mut silence => {
                let _ = child.start_kill();
                let _ = child.wait().await;
                return died(format!("gave no sign of life for {} s", options.hang.as_secs()));
            }
        }
    }
    drop(input);
    let status = end(&mut child).await;
    if unloadable {
        End::Unloadable
    } else {
        End::Died {
            status,
            was_ready: ready,
        }
    }
}

fn line(frame: &ToWorker) -> Vec<u8> {
    // Maps with string keys only: this cannot fail.
    let mut line = serde_json::to_vec(frame).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Waits for a worker whose input is closed, and helps after a while.
async fn end(child: &mut Child) -> String {
    let status = match tokio::time::timeout(Duration::from_secs(2), child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            let _ = child.start_kill();
            child.wait().await
        }
    };
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}
