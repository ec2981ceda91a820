//! Systems-on-chip: which instructions their cores have, and so which kernels a build for them gets.

use serde::{Deserialize, Serialize};

/// A system-on-chip.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Soc {
    /// As its maker calls it.
    pub name: String,
    /// Rust's name of what to build for.
    pub triple: String,
    /// What the C++ compiler is told, behind `-march=`: ggml's kernels are chosen by it.
    pub march: String,
    /// Instructions that all of its cores have, as Rust spells them.
    pub features: Vec<String>,
    /// The model of its cores that qemu runs the build on.
    pub qemu_cpu: String,
    /// Its cores, the fastest first; none where that is not known.
    #[serde(default)]
    pub cores: Vec<Cores>,
}

/// Cores of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cores {
    /// As ARM calls them.
    pub kind: String,
    /// How many.
    pub count: u32,
}

/// What a compiler of ARM's architecture level takes for granted.
const LEVELS: [(&str, &[&str]); 4] = [
    ("armv7-a", &[]),
    ("armv8-a", &["neon"]),
    ("armv8.2-a", &["neon", "crc", "lse"]),
    (
        "armv9-a",
        &["neon", "crc", "lse", "fp16", "dotprod", "sve", "sve2"],
    ),
];

/// Names of one set of instructions: in `march`, as a feature, ggml's, the compiler's macro.
const KERNELS: [(&str, &str, &str); 5] = [
    ("neon", "NEON", "__ARM_NEON"),
    ("fp16", "FP16_VA", "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC"),
    ("dotprod", "DOTPROD", "__ARM_FEATURE_DOTPROD"),
    ("i8mm", "MATMUL_INT8", "__ARM_FEATURE_MATMUL_INT8"),
    ("sve", "SVE", "__ARM_FEATURE_SVE"),
];

impl Soc {
    /// What a program compiled with `march` needs, as Rust spells it; `None` where the level is not known.
    pub fn needs(&self) -> Option<Vec<&str>> {
        if self.march.starts_with("rv") {
            return Some(Vec::new());
        }
        let mut words = self.march.split('+');
        let level = words.next()?;
        let (_, implied) = LEVELS.iter().find(|(name, _)| *name == level)?;
        let mut needs: Vec<&str> = implied.to_vec();
        for word in words {
            match word {
                "neon-vfpv4" => needs.extend(["neon", "vfpv4"]),
                word => needs.push(word),
            }
        }
        Some(needs)
    }

    /// The kernels of ggml that such a program has, by ggml's names.
    pub fn kernels(&self) -> Vec<&'static str> {
        let needs = self.needs().unwrap_or_default();
        let named = KERNELS.iter().filter(|(feature, ..)| needs.contains(feature));
        named.map(|(_, ggml, _)| *ggml).collect()
    }

    /// Whether a program compiled for it has a macro of the C compiler defined, as far as the memory plan asks.
    pub fn built_in(&self, c_macro: &str) -> bool {
        let needs = self.needs().unwrap_or_default();
        match KERNELS.iter().find(|(.., name)| *name == c_macro) {
            Some((feature, ..)) => needs.contains(feature),
            None => c_macro == "GGML_USE_CPU_REPACK" && !needs.is_empty(),
        }
    }
}
