//! The canary: a worker of its own loads a model and answers its golden prompts before anybody else asks it.
//!
//! In: what the worker is to load, prompts. Out: the answers, and the most memory that the worker had. It is a process
//! of its own, so a model that ends it ends nothing else.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::manifest::Golden;
use crate::engine::{FromWorker, Job, Settings, ToWorker};
use crate::health;
use crate::plan::{Plan, mebibytes};

/// What a plan may be wrong by, in per cent, and bytes besides.
const SLACK_PERCENT: u64 = 10;
const SLACK_BYTES: u64 = 16 << 20;

/// How to try.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The program whose `worker` it is; this one.
    pub program: PathBuf,
    /// What it is to load.
    pub settings: Settings,
    /// Silence after which it is given up.
    pub hang: Duration,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Tried {
    /// The answers, in the order of the prompts.
    pub answers: Vec<String>,
    /// The most memory that the worker had resident.
    pub peak_bytes: Option<u64>,
}

impl Trial {
    /// Loads the model and answers the prompts one after the other, greedily.
    ///
    /// # Errors
    /// A sentence.
    pub fn answers(&self, golden: &[Golden]) -> Result<Tried, String> {
        let mut worker = Worker::start(&self.program, self.hang)?;
        worker.send(&ToWorker::Load(self.settings.clone()))?;
        loop {
            match worker.next()? {
                FromWorker::Ready(_) => break,
                FromWorker::Unloadable { message } => return Err(message),
                _ => {}
            }
        }
        let mut answers = Vec::new();
        for (job, golden) in (1..).zip(golden) {
            worker.send(&ToWorker::Run {
                job,
                request: Box::new(question(golden)),
            })?;
            loop {
                match worker.next()? {
                    FromWorker::Done { finished, .. } => {
                        answers.push(finished.text);
                        break;
                    }
                    FromWorker::Failed { message, .. } => {
                        return Err(format!("golden prompt {job}: {message}"));
                    }
                    _ => {}
                }
            }
        }
        let peak_bytes = health::peak_resident(worker.child.id());
        Ok(Tried { answers, peak_bytes })
    }

    /// Tries a model against its manifest and its memory plan.
    ///
    /// # Errors
    /// A sentence that says what it did wrong.
    pub fn run(&self, golden: &[Golden], plan: &Plan) -> Result<Tried, String> {
        let tried = self.answers(golden)?;
        for (at, (golden, answer)) in golden.iter().zip(&tried.answers).enumerate() {
            golden
                .judge(answer)
                .map_err(|why| format!("golden prompt {}: {why}", at + 1))?;
        }
        let planned = plan.worker_bytes().saturating_add(plan.read_once);
        let most = planned + planned / 100 * SLACK_PERCENT + SLACK_BYTES;
        match tried.peak_bytes {
            Some(peak) if peak > most && plan.unknown.is_empty() => Err(format!(
                "it takes {} of memory, and its plan says {}",
                mebibytes(peak),
                mebibytes(planned)
            )),
            _ => Ok(tried),
        }
    }
}

/// Greedy, and with nothing of this device's own: the same question everywhere.
fn question(golden: &Golden) -> Job {
    Job {
        messages: golden.messages.clone(),
        max_tokens: golden.max_tokens,
        stop: Vec::new(),
        schema: None,
        adapter: golden.adapter.clone(),
        stream: false,
        deadline_ms: None,
        sampling: pipit_sampler::Settings {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 0,
            seed: 0,
        },
    }
}

/// A worker, ended when this is dropped.
struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    hang: Duration,
}

impl Worker {
    fn start(program: &Path, hang: Duration) -> Result<Self, String> {
        let mut child = Command::new(program)
            .args(["-q", "worker"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", program.display()))?;
        let input = child.stdin.take();
        let output = child.stdout.take().ok_or("the worker has no output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            input,
            lines,
            hang,
        })
    }

    fn send(&mut self, frame: &ToWorker) -> Result<(), String> {
        // Maps with string keys only: this cannot fail.
        let mut line = serde_json::to_vec(frame).unwrap_or_default();
        line.push(b'\n');
        let input = self.input.as_mut().ok_or("the worker has no input")?;
        input
            .write_all(&line)
            .and_then(|()| input.flush())
            .map_err(|error| format!("the worker takes nothing: {error}"))
    }

    fn next(&mut self) -> Result<FromWorker, String> {
        use std::sync::mpsc::RecvTimeoutError;
        match self.lines.recv_timeout(self.hang) {
            Ok(line) => serde_json::from_str(&line).map_err(|error| error.to_string()),
            Err(RecvTimeoutError::Timeout) => Err(format!("no sign of life for {} s", self.hang.as_secs())),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait();
                Err(status.map_or_else(
                    |error| error.to_string(),
                    |status| format!("the worker ended ({status})"),
                ))
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
