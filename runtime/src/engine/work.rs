//! The worker's main loop: frames in, steps of the scheduler, frames out.

use std::io::{BufRead as _, Write as _};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::{Duration, Instant};

use super::interrupt::Interrupt;
use super::scheduler::Scheduler;
use super::{FromWorker, ToWorker, llama};
use crate::kernels;

/// A sign of life at least this often, so that a hang is noticed.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// The worker's main function: loads, answers, ends with its input.
///
/// # Errors
/// A model that cannot be loaded, after it was reported.
pub fn run() -> anyhow::Result<()> {
    // Should the daemon die without closing the pipe (it holds the only write end, so it cannot), this ends us too.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let mut outbox = Outbox::new();
    // Before llama.cpp is touched: an illegal instruction says nothing.
    let lacking = kernels::lacking();
    if !lacking.is_empty() {
        let message = kernels::refusal(&lacking);
        outbox.send(&[FromWorker::Unloadable {
            message: message.clone(),
        }])?;
        anyhow::bail!(message);
    }
    let interrupt = Interrupt::default();
    let inbox = read_frames(interrupt.clone())?;
    let settings = match inbox.recv() {
        Ok(ToWorker::Load(settings)) => settings,
        Ok(_) => anyhow::bail!("the first frame must be `load`"),
        Err(_) => return Ok(()),
    };
    let llama = match llama::Llama::load(&settings, &interrupt) {
        Ok(llama) => llama,
        Err(error) => {
            outbox.send(&[FromWorker::Unloadable {
                message: error.to_string(),
            }])?;
            return Err(error.into());
        }
    };
    outbox.send(&[FromWorker::Ready(llama.info().clone())])?;
    let mut scheduler = Scheduler::new(llama, &settings, interrupt);
    loop {
        let frame = if scheduler.is_idle() {
            match inbox.recv_timeout(HEARTBEAT) {
                Ok(frame) => Some(frame),
                Err(RecvTimeoutError::Timeout) => {
                    outbox.send(&[FromWorker::Heartbeat])?;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        } else {
            match inbox.try_recv() {
                Ok(frame) => Some(frame),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        };
        match frame {
            Some(frame) => take(&mut scheduler, frame),
            None => scheduler.step(),
        }
        outbox.send(&scheduler.events())?;
    }
}

fn take(scheduler: &mut Scheduler, frame: ToWorker) {
    match frame {
        ToWorker::Run { job, request } => scheduler.add(job, *request),
        ToWorker::Cancel { job } => scheduler.cancel(job),
        ToWorker::Ease { step } => scheduler.ease(step),
        ToWorker::Identity { sha256 } => scheduler.identify(&sha256),
        ToWorker::Load(_) => tracing::warn!("a second `load` is ignored: a model is changed by a new worker"),
    }
}

/// Writes frames.
struct Outbox {
    last: Instant,
}

impl Outbox {
    fn new() -> Self {
        Self { last: Instant::now() }
    }

    /// Writes the frames of one step together; a heartbeat when there were none for a while.
    fn send(&mut self, frames: &[FromWorker]) -> std::io::Result<()> {
        let heartbeat = [FromWorker::Heartbeat];
        let frames = match frames {
            [] if self.last.elapsed() < HEARTBEAT => return Ok(()),
            [] => &heartbeat,
            frames => frames,
        };
        let mut lines = Vec::new();
        for frame in frames {
            serde_json::to_writer(&mut lines, frame)?;
            lines.push(b'\n');
        }
        let mut out = std::io::stdout().lock();
        out.write_all(&lines)?;
        out.flush()?;
        self.last = Instant::now();
        Ok(())
    }
}

/// Reads frames on a thread of its own; the end of the input ends the process, also in the middle of a decode.
fn read_frames(interrupt: Interrupt) -> std::io::Result<Receiver<ToWorker>> {
    let (frames, inbox) = channel();
    std::thread::Builder::new()
        .name("frames".to_owned())
        .spawn(move || {
            for line in std::io::stdin().lock().lines() {
                let Ok(line) = line else { break };
                match serde_json::from_str(&line) {
                    Ok(frame) => {
                        let cancelled = match frame {
                            ToWorker::Cancel { job } => Some(job),
                            _ => None,
                        };
                        if frames.send(frame).is_err() {
                            break;
                        }
                        // The frame is there when the step ends.
                        if let Some(job) = cancelled {
                            interrupt.cancel(job);
                        }
                    }
                    Err(error) => tracing::error!("a frame that is not understood: {error}"),
                }
            }
            std::process::exit(0);
        })?;
    Ok(inbox)
}
