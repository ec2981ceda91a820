//! Meters over trees of files as the kernel has them.

use std::fs;

use super::*;

/// A tree of files as the kernel has them.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new(files: &[(&str, &str)]) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        for (file, value) in files {
            tree.put(file, value);
        }
        tree
    }

    fn put(&self, file: &str, value: &str) {
        let path = self.0.path().join("sys").join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{value}\n")).unwrap();
    }

    fn find(&self) -> Option<Meter> {
        Meter::find(self.0.path())
    }
}

fn after(start: Instant, seconds: f64) -> Instant {
    start + Duration::from_secs_f64(seconds)
}

#[test]
fn a_board_without_a_sensor_has_no_meter() {
    let tree = Tree::new(&[
        ("class/hwmon/hwmon0/name", "amdgpu"),
        ("class/hwmon/hwmon0/power1_input", "30000000"),
        ("class/hwmon/hwmon1/name", "ina219"),
        ("class/hwmon/hwmon1/in1_input", "5000"),
        ("class/powercap/intel-rapl:0/name", "package-0"),
        ("class/powercap/intel-rapl:0:0/energy_uj", "7"),
    ]);
    assert!(tree.find().is_none());
}

#[test]
fn volts_and_amperes_become_joules() {
    let tree = Tree::new(&[
        ("class/hwmon/hwmon3/name", "ina3221"),
        ("class/hwmon/hwmon3/in1_input", "5000"),
        ("class/hwmon/hwmon3/curr1_input", "1000"),
    ]);
    let mut meter = tree.find().unwrap();
    assert_eq!(meter.name(), "hwmon ina3221 in1 x curr1");
    let start = Instant::now();
    assert_eq!((meter.read(start), meter.watts()), (None, Some(5.0)));
    tree.put("class/hwmon/hwmon3/curr1_input", "2000");
    // From 5 to 10 W in two seconds.
    assert_eq!(meter.read(after(start, 2.0)), Some(15.0));
    assert_eq!(meter.read(after(start, 9.0)), None, "nobody saw what was between");
    fs::remove_file(tree.0.path().join("sys/class/hwmon/hwmon3/curr1_input")).unwrap();
    assert_eq!((meter.read(after(start, 9.5)), meter.watts()), (None, None));
    tree.put("class/hwmon/hwmon3/curr1_input", "2000");
    assert_eq!(meter.read(after(start, 10.0)), None);
    assert_eq!(meter.read(after(start, 10.5)), Some(5.0));
}

#[test]
fn microwatts_of_hwmon_and_milliwatts_of_iio() {
    let tree = Tree::new(&[
        ("bus/iio/devices/iio:device0/name", "ina226"),
        ("bus/iio/devices/iio:device0/in_power2_raw", "120"),
        ("bus/iio/devices/iio:device0/in_power2_scale", "25.0"),
    ]);
    let mut meter = tree.find().unwrap();
    meter.read(Instant::now());
    assert_eq!((meter.name(), meter.watts()), ("iio ina226 power2", Some(3.0)));
    tree.put("class/hwmon/hwmon1/name", "ina226");
    tree.put("class/hwmon/hwmon1/power1_input", "2500000");
    let mut meter = tree.find().unwrap();
    meter.read(Instant::now());
    assert_eq!((meter.name(), meter.watts()), ("hwmon ina226 power1", Some(2.5)));
}

#[test]
fn a_counter_that_begins_anew_loses_nothing() {
    let tree = Tree::new(&[
        ("class/powercap/intel-rapl:0/name", "package-0"),
        ("class/powercap/intel-rapl:0/energy_uj", "262143000000"),
        ("class/powercap/intel-rapl:0/max_energy_range_uj", "262143328850"),
        ("class/powercap/intel-rapl:1/name", "package-1"),
        ("class/powercap/intel-rapl:1/energy_uj", "1000000"),
        ("class/powercap/intel-rapl:1/max_energy_range_uj", "262143328850"),
    ]);
    let mut meter = tree.find().unwrap();
    let start = Instant::now();
    assert_eq!(meter.read(start), None);
    tree.put("class/powercap/intel-rapl:0/energy_uj", "671150");
    tree.put("class/powercap/intel-rapl:1/energy_uj", "2500000");
    // 0.32885 + 0.67115 J of the one, 1.5 J of the other.
    assert_eq!((meter.read(after(start, 0.5)), meter.watts()), (Some(2.5), None));
    assert_eq!(
        (meter.read(after(start, 1.0)), meter.watts()),
        (Some(0.0), Some(2.5))
    );
    // The platform's counter has both.
    tree.put("class/powercap/intel-rapl:2/name", "psys");
    tree.put("class/powercap/intel-rapl:2/energy_uj", "100");
    assert_eq!(tree.find().unwrap().name(), "RAPL psys");
}

#[test]
fn a_counter_without_a_range_that_goes_back_was_reset() {
    let tree = Tree::new(&[
        ("class/hwmon/hwmon0/name", "ina228"),
        ("class/hwmon/hwmon0/energy1_input", "5000000"),
    ]);
    let file = tree.0.path().join("sys/class/hwmon/hwmon0/energy1_input");
    let mut meter = Meter::of(&file).unwrap();
    let start = Instant::now();
    meter.read(start);
    tree.put("class/hwmon/hwmon0/energy1_input", "0");
    assert_eq!(meter.read(after(start, 1.0)), None);
    tree.put("class/hwmon/hwmon0/energy1_input", "1000000");
    assert_eq!(meter.read(after(start, 2.0)), Some(1.0));
}

#[test]
fn sensors_that_cannot_be_are_named() {
    let tree = Tree::new(&[("a/power1_input", "x"), ("a/temp1_input", "1")]);
    let of = |file: &str| Meter::of(&tree.0.path().join("sys/a").join(file)).unwrap_err();
    assert!(matches!(of("temp1_input"), MeterError::Kind(_)));
    assert!(matches!(of("power1_input"), MeterError::Unreadable { .. }));
    assert!(of("power2_input").to_string().contains("hint:"));
}
