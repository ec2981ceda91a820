//! `pipit installer`: does one order of the daemon's. `serve` starts it; the task stands on its standard input.

use std::process::ExitCode;

use pipit::daemon::installer::{Outcome, Task, perform};

pub(super) fn run() -> ExitCode {
    // With the daemon it ends, too; and it is the last to get the processor.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let _ = rustix::process::nice(10);
    let outcome = serde_json::from_reader::<_, Task>(std::io::stdin().lock())
        .map_err(|error| Outcome::Failed(format!("the task is not understood: {error}")))
        .and_then(|task| {
            let program = std::env::current_exe().map_err(|error| Outcome::Failed(error.to_string()))?;
            Ok(perform(&task, program))
        })
        .unwrap_or_else(|outcome| outcome);
    println!("{}", serde_json::to_string(&outcome).unwrap_or_default());
    ExitCode::SUCCESS
}
