//! The machine: threads, temperature, throttling, energy, clock.
//!
//! Source: the kernel's Documentation/ABI/testing/sysfs-class-thermal and sysfs-devices-system-cpu; for a Raspberry
//! Pi the bits of `vcgencmd get_throttled` (Raspberry Pi documentation, os.html).

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Finding, State};
use crate::config::{Address, Config};
use crate::cores::Cores;
use crate::energy::Meter;
use crate::{clock, thermal};

/// Degrees below the temperature where the kernel slows the machine down.
const NEAR: i64 = 10;
const EARLIEST_S: u64 = clock::EARLIEST_MS / 1000;

/// All looks of this file.
pub fn findings(config: &Config, root: &Path) -> Vec<Finding> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    vec![
        threads(config, &Cores::read(root)),
        temperature(root),
        throttling(root),
        energy(config, root),
        clock(config, now),
    ]
}

fn threads(config: &Config, cores: &Cores) -> Finding {
    const WHAT: &str = "threads";
    let allowed = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
    let physical = match cores.physical {
        0 => allowed,
        physical => physical.min(allowed),
    };
    let threads = match config.model.threads {
        0 => physical.min(cores.big().unwrap_or(physical)),
        threads => threads,
    };
    let says = format!("{threads}, on {physical} physical cores that this process may use");
    match cores.big() {
        _ if threads > physical => Finding::new(WHAT, State::Warn, says)
            .hint(format!("[model] threads = {physical}: more threads than cores wait for each other")),
        Some(big) if threads > big => Finding::new(WHAT, State::Warn, format!("{says}, {big} of them fast")).hint(
            format!("[model] threads = {big}: every step waits for the slowest core; `pipit bench` shows which is best"),
        ),
        _ => Finding::new(WHAT, State::Ok, says),
    }
}

fn number(path: &Path) -> Option<i64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The hottest zone, against the lowest temperature where the kernel acts.
fn temperature(root: &Path) -> Finding {
    const WHAT: &str = "temperature";
    let Some(reading) = thermal::hottest(root) else {
        return Finding::new(WHAT, State::Info, "this machine has no sensor that Linux knows");
    };
    let (degrees, limit) = (reading.millidegrees / 1000, reading.limit);
    let says = format!("{degrees} °C; it slows down at {limit} °C");
    if degrees >= limit {
        Finding::new(WHAT, State::Fail, says).hint("cool it: a heat sink, a fan, or fewer [model] threads")
    } else if degrees + NEAR >= limit {
        Finding::new(WHAT, State::Warn, says).hint("under load it will slow down: a heat sink or a fan")
    } else {
        Finding::new(WHAT, State::Ok, says)
    }
}

/// The sensor by which energy is measured.
fn energy(config: &Config, root: &Path) -> Finding {
    const WHAT: &str = "energy";
    match &config.metrics.energy_sensor {
        Some(path) => match Meter::of(path) {
            Ok(meter) => Finding::new(WHAT, State::Ok, meter.name()),
            Err(error) => Finding::of_error(WHAT, &error),
        },
        None => match Meter::find(root) {
            Some(meter) => Finding::new(WHAT, State::Ok, meter.name()),
            None => Finding::new(
                WHAT,
                State::Info,
                "this machine has no sensor that this user may read",
            ),
        },
    }
}

/// Whether something holds the CPU's speed down now, or has since the start.
fn throttling(root: &Path) -> Finding {
    const WHAT: &str = "throttling";
    let raspberry_pi = fs::read_to_string(root.join("sys/devices/platform/soc/soc:firmware/get_throttled"))
        .ok()
        .and_then(|text| u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok());
    if let Some(bits) = raspberry_pi {
        let names = [
            (0, "under-voltage now"),
            (1, "frequency capped now"),
            (2, "throttled now"),
            (3, "soft temperature limit now"),
            (16, "under-voltage since the start"),
            (17, "frequency capped since the start"),
            (18, "throttled since the start"),
            (19, "soft temperature limit since the start"),
        ];
        let seen: Vec<&str> = names
            .iter()
            .filter(|(bit, _)| bits >> bit & 1 == 1)
            .map(|(_, name)| *name)
            .collect();
        if !seen.is_empty() {
            return Finding::new(WHAT, State::Warn, seen.join(", "))
                .hint("a stronger power supply against under-voltage, cooling against the rest");
        }
        return Finding::new(WHAT, State::Ok, "none since the start");
    }
    let folder = root.join("sys/devices/system/cpu/cpu0");
    let frequencies = (
        number(&folder.join("cpufreq/scaling_max_freq")),
        number(&folder.join("cpufreq/cpuinfo_max_freq")),
    );
    let throttled = number(&folder.join("thermal_throttle/core_throttle_count"));
    match (frequencies, throttled) {
        ((Some(now), Some(most)), _) if now < most => Finding::new(
            WHAT,
            State::Warn,
            format!("the CPU is held at {} of {} MHz", now / 1000, most / 1000),
        )
        .hint("something lowered scaling_max_freq: heat, a power profile, or a person"),
        (_, Some(count)) if count > 0 => Finding::new(
            WHAT,
            State::Warn,
            format!("{count} times since the start, by heat"),
        )
        .hint("a heat sink or a fan"),
        ((None, _), None) | ((_, None), None) => Finding::new(WHAT, State::Info, "this machine does not say"),
        _ => Finding::new(WHAT, State::Ok, "none since the start"),
    }
}

fn clock(config: &Config, now_s: u64) -> Finding {
    const WHAT: &str = "clock";
    if now_s >= EARLIEST_S {
        return Finding::new(WHAT, State::Ok, "it is set");
    }
    let encrypted = matches!(
        Address::parse(&config.broker.url),
        Ok(Address::Remote { tls: true, .. })
    );
    let state = if encrypted { State::Fail } else { State::Warn };
    Finding::new(
        WHAT,
        state,
        format!("it shows {} days after 1970: it is not set", now_s / 86400),
    )
    .hint("a time server (systemd-timesyncd); mqtts:// refuses every certificate until then")
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
    fn temperature_against_the_trip_point() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        assert_eq!(temperature(root).state, State::Info);
        let zone = "sys/class/thermal/thermal_zone0";
        write(root, &format!("{zone}/temp"), "45000\n");
        assert_eq!(temperature(root).state, State::Ok);
        write(root, &format!("{zone}/temp"), "78000\n");
        assert_eq!(temperature(root).state, State::Warn);
        write(root, &format!("{zone}/trip_point_0_type"), "passive\n");
        write(root, &format!("{zone}/trip_point_0_temp"), "105000\n");
        assert_eq!(temperature(root).state, State::Ok);
        write(root, "sys/class/thermal/thermal_zone3/temp", "91000");
        assert_eq!(temperature(root).state, State::Fail);
    }

    #[test]
    fn energy_by_what_sensor_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let mut config = Config::default();
        assert_eq!(energy(&config, root).state, State::Info);
        write(root, "sys/class/hwmon/hwmon0/name", "ina226\n");
        write(root, "sys/class/hwmon/hwmon0/power1_input", "2500000\n");
        let found = energy(&config, root);
        assert_eq!(
            (found.state, found.says.as_str()),
            (State::Ok, "hwmon ina226 power1")
        );
        config.metrics.energy_sensor = Some(root.join("sys/class/hwmon/hwmon0/name"));
        assert_eq!(energy(&config, root).state, State::Fail);
    }

    #[test]
    fn throttling_of_every_kind() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        assert_eq!(throttling(root).state, State::Info);
        let cpu = "sys/devices/system/cpu/cpu0";
        write(root, &format!("{cpu}/cpufreq/scaling_max_freq"), "1500000\n");
        write(root, &format!("{cpu}/cpufreq/cpuinfo_max_freq"), "1500000\n");
        assert_eq!(throttling(root).state, State::Ok);
        write(root, &format!("{cpu}/cpufreq/scaling_max_freq"), "600000\n");
        assert!(throttling(root).says.contains("600 of 1500 MHz"));
        write(
            root,
            "sys/devices/platform/soc/soc:firmware/get_throttled",
            "0x0\n",
        );
        assert_eq!(throttling(root).state, State::Ok);
        write(
            root,
            "sys/devices/platform/soc/soc:firmware/get_throttled",
            "50005\n",
        );
        let finding = throttling(root);
        assert_eq!(finding.state, State::Warn);
        assert!(
            finding.says.starts_with("under-voltage now, throttled now"),
            "{}",
            finding.says
        );
    }

    #[test]
    fn a_clock_that_is_not_set() {
        let mut config = Config::default();
        assert_eq!(clock(&config, EARLIEST_S).state, State::Ok);
        assert_eq!(clock(&config, 90).state, State::Warn);
        "mqtts://broker".clone_into(&mut config.broker.url);
        assert_eq!(clock(&config, 90).state, State::Fail);
    }

    #[test]
    fn more_threads_than_fast_cores() {
        let mut config = Config::default();
        let cores = Cores {
            physical: 4,
            capacities: vec![400, 400, 400, 1024],
        };
        config.model.threads = 1;
        assert_eq!(threads(&config, &cores).state, State::Ok);
        config.model.threads = 64;
        assert_eq!(threads(&config, &cores).state, State::Warn);
    }
}
