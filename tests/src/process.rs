//! Child processes of a test: what they print is kept and can be waited for, and none outlives its test.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A process that has ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Finished {
    /// The standard output of a process that ended with 0.
    ///
    /// # Errors
    /// When it ended otherwise, with what it said.
    pub fn success(self) -> Result<String> {
        if self.code == Some(0) {
            return Ok(self.stdout);
        }
        bail!(
            "exit code {:?}\nstdout: {}\nstderr: {}",
            self.code,
            self.stdout,
            self.stderr
        );
    }
}

/// A process that runs beside the test, killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    output: Arc<Output>,
    readers: Vec<thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Output {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    unread: VecDeque<String>,
    stdout: String,
    stderr: String,
    open: usize,
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in one stream, line by line, until it closes.
    fn read(&self, stream: impl Read, is_stdout: bool) {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while let Ok(1..) = reader.read_until(b'\n', &mut line) {
            let text = String::from_utf8_lossy(&line).into_owned();
            let mut lines = self.lock();
            if is_stdout {
                lines.stdout.push_str(&text)
            } else {
                lines.stderr.push_str(&text)
            }
            lines.unread.push_back(text.trim_end().to_owned());
            drop(lines);
            self.changed.notify_all();
            line.clear();
        }
        self.lock().open -= 1;
        self.changed.notify_all();
    }
}

impl Running {
    /// Starts `command` with both outputs captured and no standard input.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} cannot be started", command.get_program().display()))?;
        let output = Arc::new(Output::default());
        output.lock().open = 2;
        let stdout = child.stdout.take().context("no standard output")?;
        let stderr = child.stderr.take().context("no standard error")?;
        let readers = vec![
            thread::spawn({
                let output = Arc::clone(&output);
                move || output.read(stdout, true)
            }),
            thread::spawn({
                let output = Arc::clone(&output);
                move || output.read(stderr, false)
            }),
        ];
        Ok(Self {
            child,
            output,
            readers,
        })
    }

    /// The next line of either output that `wanted` accepts; the lines before it are passed over.
    ///
    /// # Errors
    /// When the process closes its outputs or `limit` passes first, with all it said.
    pub fn wait_for_line(&self, limit: Duration, mut wanted: impl FnMut(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + limit;
        let mut lines = self.output.lock();
        loop {
            while let Some(line) = lines.unread.pop_front() {
                if wanted(&line) {
                    return Ok(line);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if lines.open == 0 || left.is_zero() {
                let why = if left.is_zero() {
                    "not within the time"
                } else {
                    "it ended before"
                };
                bail!(
                    "the awaited line did not come: {why}\n{}{}",
                    lines.stdout,
                    lines.stderr
                );
            }
            lines = self
                .output
                .changed
                .wait_timeout(lines, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When `limit` passes first: it is killed then.
    pub fn finish(mut self, limit: Duration) -> Result<Finished> {
        let deadline = Instant::now() + limit;
        let mut lines = self.output.lock();
        while lines.open > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "still running after {limit:?}\nstdout: {}\nstderr: {}",
                    lines.stdout,
                    lines.stderr
                );
            }
            lines = self
                .output
                .changed
                .wait_timeout(lines, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(lines);
        let status = self.child.wait()?;
        self.finished(status)
    }

    fn finished(&mut self, status: ExitStatus) -> Result<Finished> {
        for reader in self.readers.drain(..) {
            if reader.join().is_err() {
                bail!("a reader of the output panicked");
            }
        }
        let lines = self.output.lock();
        Ok(Finished {
            code: status.code(),
            stdout: lines.stdout.clone(),
            stderr: lines.stderr.clone(),
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// All that it has said so far, both outputs.
    pub fn said(&self) -> String {
        let lines = self.output.lock();
        format!("{}{}", lines.stdout, lines.stderr)
    }

    /// The process ids of its children, oldest first (Linux: `/proc`).
    ///
    /// # Errors
    /// When the process has ended.
    pub fn children(&self) -> Result<Vec<u32>> {
        let id = self.id();
        let mut found = Vec::new();
        for task in fs::read_dir(format!("/proc/{id}/task"))? {
            let children = fs::read_to_string(task?.path().join("children"))?;
            for child in children.split_whitespace() {
                found.push(child.parse()?);
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Ends it at once (SIGKILL), as a crash or a power cut would, and waits until it is gone.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(mut self) -> Result<Finished> {
        // It may have ended by itself in the meantime: that is as good.
        self.child.kill().ok();
        let status = self.child.wait()?;
        self.finished(status)
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    ///
    /// # Errors
    /// When it has not ended after `limit`.
    pub fn terminate(self, limit: Duration) -> Result<Finished> {
        signal("TERM", self.id())?;
        self.finish(limit)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Sends a signal, named as kill(1) names it, to a process.
///
/// # Errors
/// When there is no such process.
pub fn signal(name: &str, id: u32) -> Result<()> {
    let status = Command::new("kill")
        .args([format!("-{name}"), id.to_string()])
        .status()?;
    if !status.success() {
        bail!("kill -{name} {id} failed");
    }
    Ok(())
}

/// Words in front of a command that give it mounts of its own.
pub const OWN_MOUNTS: [&str; 2] = ["unshare", "-rm"];

/// Whether this user may start something with [`OWN_MOUNTS`].
pub fn may_mount() -> bool {
    let [program, flags] = OWN_MOUNTS;
    let tried = Command::new(program).args([flags, "true"]).output();
    tried.is_ok_and(|it| it.status.success())
}

/// Bytes of memory that a process has resident now, and the most that it ever had (Linux: `/proc`).
///
/// # Errors
/// When there is no such process.
pub fn resident(id: u32) -> Result<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let bytes = |label: &str| -> Result<u64> {
        let line = status
            .lines()
            .find(|line| line.starts_with(label))
            .with_context(|| format!("no {label} of process {id}"))?;
        let kib = line.split_whitespace().nth(1).context("no number")?;
        Ok(kib.parse::<u64>()? * 1024)
    };
    Ok((bytes("VmRSS:")?, bytes("VmHWM:")?))
}

/// Runs a program to its end.
///
/// # Errors
/// When it cannot be started or takes longer than `limit`.
pub fn run<S: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = S>,
    limit: Duration,
) -> Result<Finished> {
    Running::start(Command::new(program).args(arguments))?.finish(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn both_outputs_and_the_exit_code_are_kept() {
        let finished = run("sh", ["-c", "echo out; echo err >&2; exit 7"], SOON).unwrap();
        assert_eq!(finished.code, Some(7));
        assert_eq!(
            (finished.stdout.as_str(), finished.stderr.as_str()),
            ("out\n", "err\n")
        );
    }

    #[test]
    fn a_line_is_waited_for_and_an_end_without_it_is_an_error() {
        let running = Running::start(Command::new("sh").args(["-c", "echo one; echo two"])).unwrap();
        assert_eq!(
            running
                .wait_for_line(SOON, |line| line.starts_with("tw"))
                .unwrap(),
            "two"
        );
        let error = running.wait_for_line(SOON, |line| line == "three").unwrap_err();
        assert!(error.to_string().contains("it ended before"), "{error}");
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let running = Running::start(Command::new("sleep").arg("100")).unwrap();
        let id = running.id();
        drop(running);
        assert!(!std::path::Path::new(&format!("/proc/{id}")).exists());
    }

    #[test]
    fn a_program_that_takes_too_long_is_an_error() {
        let error = run("sleep", ["100"], Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("still running"), "{error}");
    }
}
