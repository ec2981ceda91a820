//! Cores: how many this process may use, and which of them are the fast ones.
//!
//! In: the root of the file system, so that tests can bring their own. Source: the kernel's
//! Documentation/ABI/testing/sysfs-devices-system-cpu.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

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

    /// CPUs that are as fast as the fastest, where they differ; `None` where all are alike.
    pub fn big(&self) -> Option<u32> {
        let best = self.capacities.iter().max()?;
        let count = self
            .capacities
            .iter()
            .filter(|capacity| *capacity == best)
            .count();
        (count < self.capacities.len()).then_some(count as u32)
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
        assert!(physical() >= 1);
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
        let folder = machine(&[("0", Some(1024)), ("1", Some(1024))]);
        assert_eq!(Cores::read(folder.path()).big(), None);
    }
}
