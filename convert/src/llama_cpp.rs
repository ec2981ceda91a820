//! llama.cpp in this process: it is started once, and its log goes to ours.

use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;

/// Why llama.cpp does not take a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LlamaCppError {
    /// Somebody else in this process has started it.
    #[error("llama.cpp cannot be started: {0}")]
    Start(String),
    /// It refuses the file.
    #[error("llama.cpp does not load the file: {0}")]
    Load(String),
}

/// The crate that brings llama.cpp, and its version.
const CRATE: &str = "llama-cpp-sys-2 0.1.161";

/// Which llama.cpp this is: the crate that brings it, and the version of the ggml in it.
pub fn version() -> String {
    #[expect(unsafe_code, reason = "ggml is C")]
    // SAFETY: ggml gives a constant that ends in a zero.
    let ggml = unsafe { CStr::from_ptr(llama_cpp_sys_2::ggml_version()) };
    format!("{CRATE}, ggml {}", ggml.to_string_lossy())
}

/// What llama.cpp complained of last.
static COMPLAINT: Mutex<String> = Mutex::new(String::new());

/// The backend, started at the first call.
pub fn backend() -> Result<&'static LlamaBackend, LlamaCppError> {
    static BACKEND: OnceLock<Result<LlamaBackend, String>> = OnceLock::new();
    let started = BACKEND.get_or_init(|| {
        #[expect(unsafe_code, reason = "llama.cpp is C")]
        // SAFETY: the callback lives as long as the program, and takes no data.
        unsafe {
            llama_cpp_sys_2::llama_log_set(Some(log), std::ptr::null_mut());
        }
        LlamaBackend::init().map_err(|error| error.to_string())
    });
    started
        .as_ref()
        .map_err(|error| LlamaCppError::Start(error.clone()))
}

/// Loads a model. The error says what llama.cpp said.
pub fn load(path: &Path, params: &LlamaModelParams) -> Result<LlamaModel, LlamaCppError> {
    let backend = backend()?;
    // llama-cpp-2 asserts that it is there.
    path.metadata()
        .map_err(|error| LlamaCppError::Load(error.to_string()))?;
    attempt(|| LlamaModel::load_from_file(backend, path, params))
}

/// Lets llama.cpp make something out of a file. The error says what it said.
pub(crate) fn attempt<T, E: ToString>(make: impl FnOnce() -> Result<T, E>) -> Result<T, LlamaCppError> {
    backend()?;
    if let Ok(mut complaint) = COMPLAINT.lock() {
        complaint.clear();
    }
    make().map_err(|error| {
        let complaint = COMPLAINT
            .lock()
            .map(|complaint| complaint.clone())
            .unwrap_or_default();
        LlamaCppError::Load(if complaint.is_empty() {
            error.to_string()
        } else {
            complaint
        })
    })
}

/// Its lines are for those who look for a fault in it: what a user must know, we say ourselves.
extern "C" fn log(level: llama_cpp_sys_2::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    #[expect(unsafe_code, reason = "llama.cpp is C")]
    // SAFETY: llama.cpp gives a string that ends in a zero and lives as long as this call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let text = text.trim();
    if text.is_empty() || text == "." {
        return;
    }
    if level == llama_cpp_sys_2::GGML_LOG_LEVEL_ERROR
        && let Ok(mut complaint) = COMPLAINT.lock()
        && complaint.is_empty()
    {
        complaint.push_str(text);
    }
    tracing::debug!(target: "llama.cpp", "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_one_that_is_linked() {
        let lock = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.lock");
        let lock = std::fs::read_to_string(lock).unwrap();
        let (name, version) = CRATE.split_once(' ').unwrap();
        assert!(lock.contains(&format!("name = \"{name}\"\nversion = \"{version}\"\n")));
        assert!(self::version().starts_with(&format!("{CRATE}, ggml ")));
    }
}
