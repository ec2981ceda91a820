//! Heat: what is done before the kernel, or the firmware, slows the machine down, and before it switches it off.
//!
//! In: the temperatures of /sys, under a root so that tests can bring their own. Out: a [`Step`]: fewer threads, then pauses,
//! then no new requests. A step is left again only when it is a few degrees cooler than where it began. Source: the kernel's
//! Documentation/ABI/testing/sysfs-class-thermal; a Raspberry Pi's firmware slows down from 80 °C and most at 85 °C
//! (Raspberry Pi documentation, frequency management), and its driver tells Linux of no such point.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Where nothing says at which temperature the machine slows down.
const LIMIT: i64 = 85;
/// Degrees around the limit where a step begins.
const BEGINS: [(i64, Step); 3] = [(-5, Step::FewerThreads), (0, Step::Slower), (5, Step::Refuse)];
/// Degrees below its beginning at which a step ends.
const COOLER: i64 = 3;
/// Between two looks.
const PAUSE: Duration = Duration::from_secs(2);
const ZONES: usize = 64;
const TRIPS: usize = 16;

/// What is done against heat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Nothing.
    #[default]
    Cool,
    /// Half of the threads compute.
    FewerThreads,
    /// And after each step of the model it rests for as long as that took.
    Slower,
    /// And no new requests are taken.
    Refuse,
}

/// The hottest zone of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Thousandths of a degree Celsius.
    pub millidegrees: i64,
    /// Degrees at which something slows the machine down.
    pub limit: i64,
}

/// The hottest zone; `None` where the machine has no sensor that Linux knows.
pub fn hottest(root: &Path) -> Option<Reading> {
    let number = |path: &Path| -> Option<i64> { fs::read_to_string(path).ok()?.trim().parse().ok() };
    let zones = (0..ZONES).filter_map(|zone| {
        let folder = root.join(format!("sys/class/thermal/thermal_zone{zone}"));
        let millidegrees = number(&folder.join("temp"))?;
        let limit = (0..TRIPS)
            .filter(|trip| {
                // At `critical` the machine is switched off: that is no limit to work at.
                fs::read_to_string(folder.join(format!("trip_point_{trip}_type")))
                    .is_ok_and(|kind| matches!(kind.trim(), "passive" | "hot"))
            })
            .filter_map(|trip| number(&folder.join(format!("trip_point_{trip}_temp"))))
            // Some drivers say 0 or less for a trip that is off.
            .filter(|&thousandths| thousandths > 0)
            .min()
            .map_or(LIMIT, |thousandths| thousandths / 1000);
        Some(Reading { millidegrees, limit })
    });
    zones.max_by_key(|reading| reading.millidegrees)
}

/// Decides.
#[derive(Debug, Default)]
pub struct Thermal {
    step: Option<Step>,
    looked: Option<Instant>,
}

impl Thermal {
    /// What is done now; `None` where the machine has no sensor.
    pub fn step(&self) -> Option<Step> {
        self.step
    }

    /// Reads the sensors, not too often. Whether something else is to be done from now on.
    pub fn look(&mut self, root: &Path, now: Instant) -> bool {
        if self
            .looked
            .is_some_and(|looked| now.duration_since(looked) < PAUSE)
        {
            return false;
        }
        self.looked = Some(now);
        let before = self.step;
        self.step = hottest(root).map(|reading| next(before.unwrap_or_default(), reading));
        before.unwrap_or_default() != self.step.unwrap_or_default()
    }
}

/// The step after `step`, at this temperature.
fn next(step: Step, reading: Reading) -> Step {
    let over = reading.millidegrees.div_euclid(1000) - reading.limit;
    let begun = BEGINS.iter().filter(|(begins, known)| {
        let kept = if *known <= step { COOLER } else { 0 };
        over >= begins - kept
    });
    begun.map(|(_, known)| *known).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_up_with_the_heat_and_down_later() {
        let at = |step, degrees: i64| {
            next(
                step,
                Reading {
                    millidegrees: degrees * 1000,
                    limit: 85,
                },
            )
        };
        let mut step = Step::Cool;
        let mut seen = Vec::new();
        for degrees in [60, 79, 80, 84, 85, 88, 90, 87, 86, 82, 81, 79, 77, 76, 30] {
            step = at(step, degrees);
            seen.push(step);
        }
        use Step::{Cool, FewerThreads, Refuse, Slower};
        let expected = [
            Cool,
            Cool,
            FewerThreads,
            FewerThreads,
            Slower,
            Slower,
            Refuse,
            Refuse,
            Slower,
            Slower,
            FewerThreads,
            FewerThreads,
            FewerThreads,
            Cool,
            Cool,
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_machine_that_gets_hot() {
        let folder = tempfile::tempdir().unwrap();
        let zone = folder.path().join("sys/class/thermal/thermal_zone1");
        let mut thermal = Thermal::default();
        let mut now = Instant::now();
        assert!(!thermal.look(folder.path(), now));
        assert_eq!(thermal.step(), None, "a machine without a sensor is never hot");
        fs::create_dir_all(&zone).unwrap();
        fs::write(zone.join("trip_point_0_type"), "passive\n").unwrap();
        fs::write(zone.join("trip_point_0_temp"), "70000\n").unwrap();
        fs::write(zone.join("trip_point_1_type"), "critical\n").unwrap();
        fs::write(zone.join("trip_point_1_temp"), "60000\n").unwrap();
        for (millidegrees, changes, step) in [
            (40_000, false, Step::Cool),
            (66_500, true, Step::FewerThreads),
            (70_000, true, Step::Slower),
        ] {
            fs::write(zone.join("temp"), millidegrees.to_string()).unwrap();
            now += PAUSE;
            assert_eq!(thermal.look(folder.path(), now), changes);
            assert!(!thermal.look(folder.path(), now), "not twice at a time");
            assert_eq!(thermal.step(), Some(step));
        }
        assert_eq!(hottest(folder.path()).unwrap().limit, 70);
    }
}
