//! Energy: joules that a sensor has measured. Where there is none, nothing is said; nothing is ever guessed.
//!
//! In: files of /sys, under a root so that tests can bring their own. Out: joules since the last reading, watts now. The
//! sensors, the nearest to the whole board first:
//! - a power monitor on the board that hwmon knows (INA219, INA226, INA3221, ...): microjoules, microwatts, or the product of
//!   its first channel's millivolts and milliamperes, which on a Jetson is the whole board's (VDD_IN);
//! - the same chips through iio, in milliwatts;
//! - RAPL through powercap: the platform (psys), else the sum of the processor packages, in microjoules. The counters begin
//!   anew at `max_energy_range_uj`, and only root may read them unless told otherwise.
//!
//! Watts become joules by the trapezoid between two readings. Sources: the kernel's Documentation/hwmon/sysfs-interface,
//! hwmon/ina3221, ABI/testing/sysfs-bus-iio, power/powercap/powercap.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

mod sensor;

use sensor::{Reading, Sensor};

/// A counter moves in steps: watts are a mean over this long.
const WINDOW: Duration = Duration::from_secs(1);

/// A sensor, and its last reading.
#[derive(Debug)]
pub struct Meter {
    name: String,
    sensor: Sensor,
    last: Option<Reading>,
    watts: Option<f64>,
    /// Of a counter: since when joules are added up for the next figure in watts, and how many these are.
    window: Option<(Instant, f64)>,
}

/// A sensor of the configuration that cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MeterError {
    /// The name says nothing of the unit.
    #[error("{0} is no sensor; hint: energy_uj, energyN_input, powerN_input or powerN_average under /sys")]
    Kind(PathBuf),
    /// It cannot be read.
    #[error("{path} cannot be read: {message}; hint: is it there, and may this user read it?")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
}

impl Meter {
    /// The sensor nearest to the whole board, below a root (`/`); `None` where there is none that can be read.
    pub fn find(root: &Path) -> Option<Self> {
        Sensor::find(root).map(|(name, sensor)| Self::new(name, sensor))
    }

    /// The sensor of one file.
    ///
    /// # Errors
    /// One that cannot be read, or whose name says nothing of its unit.
    pub fn of(path: &Path) -> Result<Self, MeterError> {
        Ok(Self::new(path.display().to_string(), Sensor::of(path)?))
    }

    fn new(name: String, sensor: Sensor) -> Self {
        Self {
            name,
            sensor,
            last: None,
            watts: None,
            window: None,
        }
    }

    /// Which sensor it is, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Watts at the last reading; of a counter, the mean of the last second or more.
    pub fn watts(&self) -> Option<f64> {
        self.watts
    }

    /// Joules since the last reading; `None` where that cannot be known: the first time, after a failure, a reset, or a pause
    /// that is too long for a sensor of watts.
    pub fn read(&mut self, now: Instant) -> Option<f64> {
        let before = self.last.take();
        let Some(values) = self.sensor.values() else {
            (self.watts, self.window) = (None, None);
            return None;
        };
        let after = Reading { at: now, values };
        let joules = before.and_then(|before| self.sensor.joules(&before, &after));
        match self.sensor.watts(&after) {
            Some(watts) => self.watts = Some(watts),
            None => self.add_to_window(now, joules),
        }
        self.last = Some(after);
        joules
    }

    fn add_to_window(&mut self, now: Instant, joules: Option<f64>) {
        let sum = self
            .window
            .zip(joules)
            .map(|((since, sum), joules)| (since, sum + joules));
        self.window = match sum {
            None => Some((now, 0.0)),
            Some((since, sum)) if now.duration_since(since) >= WINDOW => {
                self.watts = Some(sum / now.duration_since(since).as_secs_f64());
                Some((now, 0.0))
            }
            not_yet => not_yet,
        };
    }
}

#[cfg(test)]
mod tests;
