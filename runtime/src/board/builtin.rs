//! The files of firmware-configs/, in the program.

macro_rules! files {
    ($folder:literal: $($name:literal)*) => {
        &[$(($name, include_str!(concat!("../../../firmware-configs/", $folder, "/", $name, ".toml"))),)*]
    };
}

/// Names and texts of the boards.
pub(super) const BOARDS: &[(&str, &str)] = files! { "boards":
    "raspberry-pi-zero-2-w"
    "raspberry-pi-3"
    "raspberry-pi-4"
    "raspberry-pi-5"
    "orange-pi-5"
    "rock-5b"
    "jetson-orin-nano"
    "imx8mp-evk"
    "beagleplay"
    "visionfive-2"
    "generic-aarch64"
    "generic-armv9"
    "generic-armv7"
};

/// Names and texts of the systems-on-chip.
pub(super) const SOCS: &[(&str, &str)] = files! { "socs":
    "bcm2710a1"
    "bcm2837"
    "bcm2711"
    "bcm2712"
    "rk3588"
    "tegra234"
    "imx8mp"
    "am625"
    "jh7110"
    "armv8-a"
    "armv9-a"
    "armv7-a"
};

/// The text of a name.
pub(super) fn text(files: &[(&str, &'static str)], name: &str) -> Option<&'static str> {
    files.iter().find(|(id, _)| *id == name).map(|(_, text)| *text)
}
