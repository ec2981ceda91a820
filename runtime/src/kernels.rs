//! Kernels: which instructions ggml was compiled for, and which this CPU has.
//!
//! In: what the compiler said at build time (build.rs), what the CPU says now, what ggml says of itself. Out: the
//! difference, both ways. A CPU that lacks what was compiled in ends a program with an illegal instruction, at the
//! latest in the first kernel: the guard at the end of this file comes before that, before even the constructors
//! of llama.cpp, and says what is wrong (docs/decisions/0012-x86-kernels.md).

use std::ffi::CStr;

/// One set of instructions. Those that a compiler takes only where a program names them (AES, SHA, …) are not here:
/// llama.cpp names none of them.
struct Instructions {
    /// The compiler's macro.
    c_macro: &'static str,
    /// ggml's name (ggml/src/ggml-cpu/ggml-cpu.cpp, ggml_backend_cpu_get_features), where it has one.
    ggml: Option<&'static str>,
    /// Whether this CPU has it.
    here: fn() -> bool,
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! instructions {
    ($detect:ident: $($c_macro:literal $ggml:expr, $feature:tt;)*) => {
        &[$(Instructions { c_macro: $c_macro, ggml: $ggml, here: || std::arch::$detect!($feature) },)*]
    };
}

#[cfg(target_arch = "x86_64")]
const ALL: &[Instructions] = instructions! { is_x86_feature_detected:
    "__SSE3__" Some("SSE3"), "sse3";
    "__SSSE3__" Some("SSSE3"), "ssse3";
    "__SSE4_1__" None, "sse4.1";
    "__SSE4_2__" None, "sse4.2";
    "__POPCNT__" None, "popcnt";
    "__LZCNT__" None, "lzcnt";
    "__MOVBE__" None, "movbe";
    "__BMI__" None, "bmi1";
    "__BMI2__" Some("BMI2"), "bmi2";
    "__F16C__" Some("F16C"), "f16c";
    "__FMA__" Some("FMA"), "fma";
    "__AVX__" Some("AVX"), "avx";
    "__AVX2__" Some("AVX2"), "avx2";
    "__AVXVNNI__" Some("AVX_VNNI"), "avxvnni";
    "__AVX512F__" Some("AVX512"), "avx512f";
    "__AVX512BW__" None, "avx512bw";
    "__AVX512CD__" None, "avx512cd";
    "__AVX512DQ__" None, "avx512dq";
    "__AVX512VL__" None, "avx512vl";
    "__AVX512IFMA__" None, "avx512ifma";
    "__AVX512BITALG__" None, "avx512bitalg";
    "__AVX512VPOPCNTDQ__" None, "avx512vpopcntdq";
    "__AVX512VBMI__" Some("AVX512_VBMI"), "avx512vbmi";
    "__AVX512VBMI2__" None, "avx512vbmi2";
    "__AVX512VNNI__" Some("AVX512_VNNI"), "avx512vnni";
    "__AVX512BF16__" Some("AVX512_BF16"), "avx512bf16";
    "__AVX512FP16__" None, "avx512fp16";
    "__GFNI__" None, "gfni";
};

#[cfg(target_arch = "aarch64")]
const ALL: &[Instructions] = instructions! { is_aarch64_feature_detected:
    "__ARM_NEON" Some("NEON"), "neon";
    "__ARM_FEATURE_CRC32" None, "crc";
    "__ARM_FEATURE_ATOMICS" None, "lse";
    "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC" Some("FP16_VA"), "fp16";
    "__ARM_FEATURE_DOTPROD" Some("DOTPROD"), "dotprod";
    "__ARM_FEATURE_MATMUL_INT8" Some("MATMUL_INT8"), "i8mm";
    "__ARM_FEATURE_BF16" None, "bf16";
    "__ARM_FEATURE_SVE" Some("SVE"), "sve";
    "__ARM_FEATURE_SVE2" None, "sve2";
};

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ALL: &[Instructions] = &[];

/// What ggml was compiled for, by ggml's names where it has them; the compiler's macro otherwise.
pub fn compiled() -> Vec<&'static str> {
    names(|instructions| built_in(instructions.c_macro))
}

/// What this CPU has, of all that the compiler knows how to use.
pub fn of_this_cpu() -> Vec<&'static str> {
    names(|instructions| (instructions.here)())
}

/// What was compiled in and this CPU lacks: to run it is an illegal instruction.
pub fn lacking() -> Vec<&'static str> {
    names(|instructions| built_in(instructions.c_macro) && !(instructions.here)())
}

/// Kernels of ggml that this CPU could run and that were not compiled.
pub fn unused() -> Vec<&'static str> {
    names(|instructions| {
        instructions.ggml.is_some() && (instructions.here)() && !built_in(instructions.c_macro)
    })
}

/// Whether ggml copies weights into an order of its own when it loads them.
pub fn repacks() -> bool {
    built_in("GGML_USE_CPU_REPACK")
}

/// Whether the compiler defined a macro; also for sets that this CPU cannot be asked for (`__AMX_INT8__`).
pub fn built_in(c_macro: &str) -> bool {
    env!("PIPIT_C_MACROS").split(' ').any(|name| name == c_macro)
}

fn names(which: impl Fn(&Instructions) -> bool) -> Vec<&'static str> {
    ALL.iter()
        .filter(|instructions| which(instructions))
        .map(|instructions| {
            instructions.ggml.unwrap_or_else(|| {
                instructions
                    .c_macro
                    .trim_matches('_')
                    .trim_start_matches("ARM_FEATURE_")
            })
        })
        .collect()
}

/// llama.cpp's own words: `CPU : SSE3 = 1 | AVX = 1 | …`. Only for a CPU that [`lacking`] finds nothing on.
#[expect(unsafe_code, reason = "llama-cpp-2 does not wrap this function")]
pub fn system_info() -> String {
    static CALLS: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = CALLS.lock();
    // SAFETY: it takes nothing and returns a string that ends with 0 and lives until the next call; nothing else in
    // this program calls it, and the lock makes the calls from here follow each other.
    let text = unsafe { CStr::from_ptr(llama_cpp_sys_2::llama_print_system_info()) };
    text.to_string_lossy().into_owned()
}

/// The names that [`system_info`] gives the value 1.
pub fn reported(system_info: &str) -> Vec<&str> {
    system_info
        .split(['|', ':'])
        .filter_map(|part| part.trim().strip_suffix("= 1"))
        .map(str::trim)
        .collect()
}

/// What is to be said when this CPU lacks something.
pub fn refusal(lacking: &[&str]) -> String {
    format!(
        "this pipit was compiled for a CPU with {}, which this one does not have; hint: build it on this machine, or \
         for its CPU: docs/decisions/0012-x86-kernels.md, for a board docs/boards.md",
        lacking.join(", ")
    )
}

/// Looks before anything of llama.cpp runs. `.preinit_array` holds functions that the loader calls before all
/// constructors; those of llama.cpp, in C++, are compiled for the same instructions as its kernels.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod guard {
    #[used]
    #[expect(unsafe_code, reason = "to come before the constructors of llama.cpp")]
    // SAFETY: the section holds pointers to functions of C's calling convention; the function needs the C library
    // only for `write` and `exit`, which need no constructor.
    #[unsafe(link_section = ".preinit_array")]
    static GUARD: extern "C" fn() = look;

    extern "C" fn look() {
        let lacking = super::lacking();
        if !lacking.is_empty() {
            eprintln!("error: {}", super::refusal(&lacking));
            std::process::exit(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ggml_has_what_the_compiler_was_told_and_this_cpu_has() {
        assert_eq!(lacking(), Vec::<&str>::new());
        let info = system_info();
        let reported = reported(&info);
        for instructions in ALL {
            let Some(name) = instructions.ggml else { continue };
            assert_eq!(
                reported.contains(&name),
                built_in(instructions.c_macro),
                "{name}: build.rs and ggml do not agree: {info}"
            );
        }
        assert_eq!(reported.contains(&"REPACK"), repacks(), "{info}");
    }

    /// The proof that a build on this machine, with `.cargo/config.toml` as it is, has the best kernels for it. On
    /// aarch64 llama-cpp-sys-2 pins `-march=armv8-a` (docs/decisions/0007-arm-kernels.md).
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn every_kernel_of_this_cpu_is_used() {
        assert_eq!(unused(), Vec::<&str>::new());
        let info = system_info();
        let reported = reported(&info);
        for name in of_this_cpu() {
            let by_ggml = ALL.iter().any(|instructions| instructions.ggml == Some(name));
            assert!(!by_ggml || reported.contains(&name), "{name} is not in {info}");
        }
        let lesser = ["AVX", "AVX2", "FMA", "F16C"].map(|name| of_this_cpu().contains(&name));
        assert_eq!(
            lesser,
            ["AVX", "AVX2", "FMA", "F16C"].map(|name| reported.contains(&name))
        );
    }

    #[test]
    fn names_of_the_system_info() {
        assert_eq!(
            reported("CPU : SSE3 = 1 | AVX512 = 0 | SVE_CNT = 16 | REPACK = 1 | "),
            ["SSE3", "REPACK"]
        );
        assert!(refusal(&["AVX2", "FMA"]).contains("AVX2, FMA"));
    }
}
