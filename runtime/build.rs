//! Writes down which instructions ggml's kernels were compiled for: `PIPIT_C_MACROS`, for src/kernels.rs.
//!
//! The kernels are chosen when they are compiled. A CPU that lacks their instructions cannot ask ggml for them, because
//! the answer may itself be such an instruction. So the compiler is asked here, with the very flags that it compiled
//! ggml-cpu.c with; CMake wrote them down for llama-cpp-sys-2.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CMAKE_C_COMPILER_LAUNCHER");
    println!("cargo:rerun-if-env-changed=PIPIT_MARCH");
    let macros = macros().unwrap_or_else(|error| {
        println!("cargo:warning=what ggml's kernels were compiled for is not known: {error}");
        String::new()
    });
    println!("cargo:rustc-env=PIPIT_C_MACROS={macros}");
}

/// The compiler's own macros that speak of instructions, and ggml's for its copies of weights.
fn macros() -> Result<String, String> {
    let root = std::env::var("DEP_LLAMA_ROOT").map_err(|error| format!("DEP_LLAMA_ROOT: {error}"))?;
    let path = Path::new(&root).join("build/compile_commands.json");
    println!("cargo:rerun-if-changed={}", path.display());
    let commands = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let commands: serde_json::Value = serde_json::from_slice(&commands).map_err(|error| error.to_string())?;
    let command = commands
        .as_array()
        .into_iter()
        .flatten()
        .find(|entry| {
            entry["file"]
                .as_str()
                .is_some_and(|file| file.ends_with("/ggml-cpu.c"))
        })
        .and_then(|entry| entry["command"].as_str())
        .ok_or_else(|| format!("{} does not name ggml-cpu.c", path.display()))?;
    let words: Vec<&str> = command.split_whitespace().collect();
    let flags = words
        .iter()
        .position(|word| word.starts_with('-'))
        .unwrap_or(words.len());
    let (program, flags) = words.split_at(flags);
    // CMake may leave out the launcher, which rewrites a flag for a board (firmware-configs/compiler).
    let launcher = std::env::var("CMAKE_C_COMPILER_LAUNCHER").unwrap_or_default();
    let launcher = Some(launcher.as_str()).filter(|path| !path.is_empty() && program.first() != Some(path));
    let mut program = launcher.into_iter().chain(program.iter().copied());
    let compiler = program.next().unwrap_or("cc");
    let machine = flags.iter().filter(|word| word.starts_with("-m"));
    let output = Command::new(compiler)
        .args(program)
        .args(machine)
        .args(["-dM", "-E", "-x", "c", "/dev/null"])
        .output()
        .map_err(|error| format!("{compiler}: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let defined = String::from_utf8_lossy(&output.stdout);
    let mut names: Vec<&str> = defined
        .lines()
        .filter_map(|line| line.strip_prefix("#define ")?.split_whitespace().next())
        .filter(|name| name.starts_with("__") && !name.contains('('))
        .filter(|name| INSTRUCTIONS.iter().any(|start| name.starts_with(start)))
        .collect();
    if command.contains("-DGGML_USE_CPU_REPACK") {
        names.push("GGML_USE_CPU_REPACK");
    }
    Ok(names.join(" "))
}

/// How the macros begin that speak of instructions.
const INSTRUCTIONS: [&str; 13] = [
    "__SSE",
    "__SSSE",
    "__AVX",
    "__FMA",
    "__F16C",
    "__BMI",
    "__LZCNT",
    "__POPCNT",
    "__MOVBE",
    "__GFNI",
    "__AMX",
    "__ARM_FEATURE",
    "__ARM_NEON",
];
