//! The sensors: which files of /sys are read, and what they say in joules and watts.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::MeterError;

/// Names of hwmon's drivers that measure what flows into a board. Others (a graphics card, a disk, a battery) measure a part.
const MONITORS: [&str; 5] = ["ina", "power_meter", "pac193", "ltc294", "ltc428"];
/// Two readings of watts that are further apart say nothing of what was between them.
const LONGEST: Duration = Duration::from_secs(5);
const FOLDERS: usize = 64;

/// A kind of sensor, and its files.
#[derive(Debug)]
pub(super) enum Sensor {
    /// Microjoules since some time: the sum of all.
    Counters(Vec<Counter>),
    /// The product of all, times the factor, is watts.
    Power { files: Vec<PathBuf>, factor: f64 },
}

/// One counter.
#[derive(Clone, Debug)]
pub(super) struct Counter {
    file: PathBuf,
    /// The highest value before it begins anew, in microjoules.
    range: Option<f64>,
}

/// What the files of a sensor said. An f64 holds microjoules of 2500 kWh exactly.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) at: Instant,
    pub(super) values: Vec<f64>,
}

impl Sensor {
    /// The sensor nearest to the whole board, and its name for people.
    pub(super) fn find(root: &Path) -> Option<(String, Self)> {
        hwmon(root).or_else(|| iio(root)).or_else(|| rapl(root))
    }

    /// The sensor of one file, by its name.
    pub(super) fn of(path: &Path) -> Result<Self, MeterError> {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.unwrap_or_default();
        let sensor = if name == "energy_uj" || name.starts_with("energy") && name.ends_with("_input") {
            Self::Counters(vec![Counter::of(path)])
        } else if name.starts_with("power") && (name.ends_with("_input") || name.ends_with("_average")) {
            Self::Power {
                files: vec![path.to_owned()],
                factor: 1e-6,
            }
        } else {
            return Err(MeterError::Kind(path.to_owned()));
        };
        match number(path) {
            Ok(_) => Ok(sensor),
            Err(message) => Err(MeterError::Unreadable {
                path: path.to_owned(),
                message,
            }),
        }
    }

    /// What its files say now; `None` where one of them cannot be read.
    pub(super) fn values(&self) -> Option<Vec<f64>> {
        match self {
            Self::Counters(counters) => counters
                .iter()
                .map(|counter| number(&counter.file).ok())
                .collect(),
            Self::Power { files, .. } => files.iter().map(|file| number(file).ok()).collect(),
        }
    }

    /// Watts of a reading; a counter has none.
    pub(super) fn watts(&self, reading: &Reading) -> Option<f64> {
        match self {
            Self::Counters(_) => None,
            Self::Power { factor, .. } => Some(reading.values.iter().product::<f64>() * factor),
        }
    }

    /// Joules between two readings; `None` where they cannot be known.
    pub(super) fn joules(&self, before: &Reading, after: &Reading) -> Option<f64> {
        match self {
            Self::Counters(counters) => {
                let values = before.values.iter().zip(&after.values);
                let parts = counters.iter().zip(values);
                let microjoules: Option<f64> =
                    parts.map(|(counter, (&old, &new))| counter.since(old, new)).sum();
                microjoules.map(|microjoules| microjoules / 1e6)
            }
            Self::Power { .. } => {
                let pause = after.at.duration_since(before.at);
                let mean = (self.watts(before)? + self.watts(after)?) / 2.0;
                (pause <= LONGEST).then_some(mean * pause.as_secs_f64())
            }
        }
    }
}

impl Counter {
    fn of(file: &Path) -> Self {
        Self {
            range: number(&file.with_file_name("max_energy_range_uj")).ok(),
            file: file.to_owned(),
        }
    }

    /// Microjoules between two values; `None` after a reset.
    fn since(&self, old: f64, new: f64) -> Option<f64> {
        match self.range {
            _ if new >= old => Some(new - old),
            Some(range) if range >= old => Some(range - old + new),
            _ => None,
        }
    }
}

fn hwmon(root: &Path) -> Option<(String, Sensor)> {
    (0..FOLDERS).find_map(|at| {
        let folder = root.join(format!("sys/class/hwmon/hwmon{at}"));
        let chip = text(&folder.join("name"))?;
        if !MONITORS.iter().any(|known| chip.starts_with(known)) {
            return None;
        }
        let file = |name: &str| Some(folder.join(name)).filter(|file| number(file).is_ok());
        let named = |what: &str| format!("hwmon {chip} {what}");
        if let Some(energy) = file("energy1_input") {
            return Some((named("energy1"), Sensor::Counters(vec![Counter::of(&energy)])));
        }
        if let Some(power) = file("power1_input").or_else(|| file("power1_average")) {
            let files = vec![power];
            return Some((named("power1"), Sensor::Power { files, factor: 1e-6 }));
        }
        let files = vec![file("in1_input")?, file("curr1_input")?];
        Some((named("in1 x curr1"), Sensor::Power { files, factor: 1e-6 }))
    })
}

fn iio(root: &Path) -> Option<(String, Sensor)> {
    (0..FOLDERS).find_map(|at| {
        let folder = root.join(format!("sys/bus/iio/devices/iio:device{at}"));
        let chip = text(&folder.join("name")).filter(|chip| chip.starts_with("ina"))?;
        (0..8).find_map(|channel| {
            let raw = folder.join(format!("in_power{channel}_raw"));
            let scale = number(&folder.join(format!("in_power{channel}_scale"))).ok()?;
            number(&raw).ok()?;
            let sensor = Sensor::Power {
                files: vec![raw],
                factor: scale * 1e-3,
            };
            Some((format!("iio {chip} power{channel}"), sensor))
        })
    })
}

fn rapl(root: &Path) -> Option<(String, Sensor)> {
    let zones: Vec<(String, Counter)> = (0..FOLDERS)
        .filter_map(|at| {
            let file = root.join(format!("sys/class/powercap/intel-rapl:{at}/energy_uj"));
            number(&file).ok()?;
            Some((text(&file.with_file_name("name"))?, Counter::of(&file)))
        })
        .collect();
    let of = |which: fn(&str) -> bool| -> Vec<Counter> {
        let zones = zones.iter().filter(|(name, _)| which(name));
        zones.map(|(_, counter)| counter.clone()).collect()
    };
    let (platform, packages) = (of(|name| name == "psys"), of(|name| name.starts_with("package")));
    if !platform.is_empty() {
        return Some(("RAPL psys".to_owned(), Sensor::Counters(platform)));
    }
    (!packages.is_empty()).then(|| ("RAPL packages".to_owned(), Sensor::Counters(packages)))
}

fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn number(path: &Path) -> Result<f64, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let number = text.trim().parse::<f64>().map_err(|error| error.to_string())?;
    number
        .is_finite()
        .then_some(number)
        .ok_or_else(|| "it is no number".to_owned())
}
