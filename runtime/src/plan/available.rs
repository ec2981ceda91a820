//! Available memory: the least of what the machine has left, what its control groups allow, and what the
//! configuration says.
//!
//! In: the root of the file system, so that tests can bring their own. Source: proc(5), the kernel's
//! Documentation/admin-guide/cgroup-v2.rst.

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Serialize;

/// How much there is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Available {
    /// Bytes.
    pub bytes: u64,
    /// What sets this limit.
    pub by: String,
}

/// The tightest limit; `None` when the system does not say. `cap` is the configuration's, 0 is none.
pub fn available(root: &Path, cap: u64) -> Option<Available> {
    let configured = (cap > 0).then(|| Available {
        bytes: cap,
        by: "[model] memory_bytes".to_owned(),
    });
    machine(root)
        .into_iter()
        .chain(groups(root))
        .chain(configured)
        .min_by_key(|available| available.bytes)
}

/// What a new program can get without swapping.
fn machine(root: &Path) -> Option<Available> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let kib = number_after(&text, "MemAvailable:")?;
    Some(Available {
        bytes: kib.saturating_mul(1024),
        by: "MemAvailable of /proc/meminfo".to_owned(),
    })
}

/// What each control group leaves, from this process's own up to the root.
fn groups(root: &Path) -> Vec<Available> {
    let Ok(text) = fs::read_to_string(root.join("proc/self/cgroup")) else {
        return Vec::new();
    };
    let Some(own) = text.lines().find_map(|line| line.strip_prefix("0::")) else {
        return Vec::new();
    };
    // Outside of its namespace a group shows as /../..: nothing is known of those.
    let own: PathBuf = Path::new(own)
        .components()
        .filter(|component| matches!(component, Component::Normal(_)))
        .collect();
    let mut found = Vec::new();
    for mount in ["sys/fs/cgroup", "sys/fs/cgroup/unified"] {
        for group in own.ancestors() {
            let folder = root.join(mount).join(group);
            for file in ["memory.max", "memory.high"] {
                found.extend(left(&folder, file).map(|bytes| Available {
                    bytes,
                    by: format!("{file} of the control group /{}", group.display()),
                }));
            }
        }
    }
    found
}

/// A limit less what is used. Pages of files count as used, and the kernel takes them back when they are wanted.
fn left(folder: &Path, file: &str) -> Option<u64> {
    // `max` is no limit and no number.
    let limit: u64 = fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()?;
    let used: u64 = fs::read_to_string(folder.join("memory.current"))
        .ok()?
        .trim()
        .parse()
        .ok()?;
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let files = ["active_file", "inactive_file"]
        .iter()
        .filter_map(|label| number_after(&stat, label))
        .fold(0, u64::saturating_add);
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

/// The number behind a label at the start of a line.
fn number_after(text: &str, label: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(label)).then(|| words.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn the_tightest_limit_counts() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        assert_eq!(available(root, 0), None);
        assert_eq!(available(root, 7).unwrap().by, "[model] memory_bytes");

        write(
            root,
            "proc/meminfo",
            "MemTotal:  500 kB\nMemAvailable:    400 kB\n",
        );
        assert_eq!(available(root, 0).unwrap().bytes, 400 * 1024);

        // A service with a limit inside a slice with a tighter one.
        write(root, "proc/self/cgroup", "4:memory:/old\n0::/a.slice/b.service\n");
        write(root, "sys/fs/cgroup/a.slice/b.service/memory.max", "300000\n");
        write(root, "sys/fs/cgroup/a.slice/b.service/memory.current", "100000\n");
        assert_eq!(available(root, 0).unwrap().bytes, 200_000);
        write(root, "sys/fs/cgroup/a.slice/memory.max", "max\n");
        write(root, "sys/fs/cgroup/a.slice/memory.high", "250000\n");
        write(root, "sys/fs/cgroup/a.slice/memory.current", "150000\n");
        let tight = available(root, 0).unwrap();
        assert_eq!(
            (tight.bytes, tight.by.as_str()),
            (100_000, "memory.high of the control group /a.slice")
        );
        // Pages of files can be taken back.
        write(
            root,
            "sys/fs/cgroup/a.slice/memory.stat",
            "anon 1\nactive_file 30000\ninactive_file 60000\nfile 999999\n",
        );
        assert_eq!(available(root, 0).unwrap().bytes, 190_000);
        // More used than allowed is nothing left, not a wrap.
        write(root, "sys/fs/cgroup/a.slice/memory.current", "999999\n");
        assert_eq!(available(root, 0).unwrap().bytes, 0);
    }

    #[test]
    fn damaged_files_are_no_limits() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        write(root, "proc/meminfo", "MemAvailable:\nMemAvailable: x kB\n");
        write(root, "proc/self/cgroup", "0::/../../x\n");
        write(root, "sys/fs/cgroup/x/memory.max", "-1");
        write(root, "sys/fs/cgroup/x/memory.current", "1");
        assert_eq!(available(root, 0), None);
    }
}
