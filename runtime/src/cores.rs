//! Cores: how many this process may use, and which of them are the fast ones.
//!
//! In: the root of the file system, so that tests can bring their own. Source: the kernel's
//! Documentation/ABI/testing/sysfs-devices-system-cpu.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// More than any machine has.
const MOST_CPUS: usize = 4096;

/// The CPUs of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cores {
    /// Physical cores: two threads of one core do not calculate faster than one. 0 when the system does not say.
    pub physical: u32,
    /// What each CPU can do, where the system says so: 1024 is the fastest of the machine.
    pub capacities: Vec<u32>,
}

impl Cores {
    /// Reads what /sys says.
    pub fn read(root: &Path) -> Self {
        let mut siblings = BTreeSet::new();
        let mut capacities = Vec::new();
        for cpu in 0..MOST_CPUS {
            let folder = root.join(format!("sys/devices/system/cpu/cpu{cpu}"));
            let Ok(text) = fs::read_to_string(folder.join("topology/thread_siblings_list")) else {
                break;
            };
            siblings.insert(text);
            capacities.extend(
                fs::read_to_string(folder.join("cpu_capacity"))
                    .ok()
                    .and_then(|text| text.trim().parse::<u32>().ok()),
            );
        }
        Self {
            physical: siblings.len() as u32,
            capacities,
        }
    }

    /// Numbers of the CPUs that are about as fast as the fastest, where others are slower; none where all are alike. Some
    /// machines say which of their fast cores has a little more; a slow core of two kinds has less than three quarters.
    pub fn fast(&self) -> Vec<usize> {
        let best = self.capacities.iter().max().copied().unwrap_or(0);
        let all = self.capacities.iter().enumerate();
        let fast: Vec<usize> = all
            .filter(|(_, capacity)| **capacity >= best / 4 * 3)
            .map(|(cpu, _)| cpu)
            .collect();
        if fast.len() < self.capacities.len() {
            fast
        } else {
            Vec::new()
        }
    }

    /// How many those are; `None` where all are alike.
    pub fn big(&self) -> Option<u32> {
        Some(self.fast().len() as u32).filter(|&count| count > 0)
    }
}

/// Threads to compute with: one for each physical core that this process may use, and where some are slower, one for each of
/// the fast ones. Every step would wait for the slowest (ggml-org/llama.cpp issue 7176: eight threads on an RK3588 are half
/// as fast as four).
pub fn threads() -> u32 {
    let big = Cores::read(Path::new("/")).big();
    big.map_or_else(physical, |big| physical().min(big))
}

/// Keeps this process, and what it starts from now on, on the fast cores, where some are slower and its threads fit.
pub fn keep_to_the_fast(threads: u32) {
    let fast = Cores::read(Path::new("/")).fast();
    if fast.is_empty() || threads as usize > fast.len() {
        return;
    }
    let mut set = CpuSet::new();
    let allowed = sched_getaffinity(None).ok();
    for cpu in fast {
        if cpu < CpuSet::MAX_CPU && allowed.as_ref().is_none_or(|allowed| allowed.is_set(cpu)) {
            set.set(cpu);
        }
    }
    // Fewer than it needs are left where somebody chose its cores: then that is what counts.
    if set.count() >= threads
        && let Err(error) = sched_setaffinity(None, &set)
    {
        tracing::warn!("the fast cores cannot be chosen: {error}");
    }
}

/// Physical cores that this process may use.
pub fn physical() -> u32 {
    let allowed = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
    match Cores::read(Path::new("/")).physical {
        0 => allowed,
        physical => allowed.min(physical),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(cpus: &[(&str, Option<u32>)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (cpu, (siblings, capacity)) in cpus.iter().enumerate() {
            let path = folder.path().join(format!("sys/devices/system/cpu/cpu{cpu}"));
            fs::create_dir_all(path.join("topology")).unwrap();
            fs::write(path.join("topology/thread_siblings_list"), siblings).unwrap();
            if let Some(capacity) = capacity {
                fs::write(path.join("cpu_capacity"), capacity.to_string()).unwrap();
            }
        }
        folder
    }

    #[test]
    fn siblings_are_one_core() {
        let folder = machine(&[("0,2", None), ("1,3", None), ("0,2", None), ("1,3", None)]);
        let cores = Cores::read(folder.path());
        assert_eq!((cores.physical, cores.big()), (2, None));
        assert_eq!(Cores::read(Path::new("/nonexistent")), Cores::default());
        assert!(physical() >= 1 && (1..=physical()).contains(&threads()));
    }

    #[test]
    fn big_and_little() {
        let folder = machine(&[
            ("0", Some(400)),
            ("1", Some(400)),
            ("2", Some(1024)),
            ("3", Some(1024)),
        ]);
        assert_eq!(Cores::read(folder.path()).big(), Some(2));
        assert_eq!(Cores::read(folder.path()).fast(), [2, 3]);
        let folder = machine(&[("0", Some(1009)), ("1", Some(1024))]);
        assert_eq!(Cores::read(folder.path()).big(), None);
    }
}
