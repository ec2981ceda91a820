//! `pipit worker`: the process that runs the model. `serve` starts it; it speaks frames on its standard streams.

use std::process::ExitCode;

pub(super) fn run() -> ExitCode {
    // What llama.cpp says goes where the filter sends it.
    llama_cpp_2::send_logs_to_tracing(llama_cpp_2::LogOptions::default());
    match pipit::engine::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The daemon was told and says it once; this is for someone who looks closer.
            tracing::debug!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
