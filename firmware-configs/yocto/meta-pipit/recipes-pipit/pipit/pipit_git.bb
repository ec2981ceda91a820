SUMMARY = "Daemon that serves a small language model over MQTT"
DESCRIPTION = "Answers prompts that come over MQTT with a language model on the device: journal, supervised worker, llama.cpp's kernels."
SECTION = "console/network"
# The project has no page of its own: its documentation is in the repository.
HOMEPAGE = "file://README.md"
LICENSE = "MIT | Apache-2.0"
LIC_FILES_CHKSUM = "file://LICENSE-MIT;md5=b3d4e4ccd5959004a055108bfec2db86"

# Where your copy of Pipit's repository is; a release, as SRCREV.
PIPIT_REPOSITORY ?= "git://pipit.invalid/pipit.git;protocol=https"
SRC_URI = "${PIPIT_REPOSITORY};branch=main"
PV = "0.1.0+git"
SRCREV ?= "${AUTOREV}"
S = "${UNPACKDIR}/git"

# Written by `bitbake -c update_crates pipit` from Cargo.lock, once for each release.
include ${BPN}-crates.inc

inherit cargo cargo-update-recipe-crates pkgconfig systemd useradd

DEPENDS:append = " clang-native cmake-native"

CVE_PRODUCT = "pipit"

# A device has a broker of its own.
CARGO_BUILD_FLAGS += "-p pipit --bin pipit --no-default-features"

# ggml's kernels: what the cores of the machine have (firmware-configs/socs). llama-cpp-sys-2 pins -march=armv8-a, and
# the launcher puts this in its place.
PIPIT_MARCH ?= "armv8-a"
PIPIT_MARCH:raspberrypi5 = "armv8.2-a+fp16+dotprod"
PIPIT_MARCH:rk3588 = "armv8.2-a+fp16+dotprod"
PIPIT_MARCH:tegra234 = "armv8.2-a+fp16+dotprod"
PIPIT_MARCH:arm = "armv7-a+neon-vfpv4"
export PIPIT_MARCH
export CMAKE_C_COMPILER_LAUNCHER = "${@'${S}/firmware-configs/compiler' if d.getVar('TARGET_ARCH') == 'aarch64' else ''}"
export CMAKE_CXX_COMPILER_LAUNCHER = "${CMAKE_C_COMPILER_LAUNCHER}"
export GGML_CPU_ARM_ARCH = "${@d.getVar('PIPIT_MARCH') if d.getVar('TARGET_ARCH') == 'arm' else ''}"
export GGML_LLAMAFILE = "${@'OFF' if d.getVar('TARGET_ARCH') == 'arm' else 'ON'}"
export BINDGEN_EXTRA_CLANG_ARGS = "--sysroot=${STAGING_DIR_TARGET} --target=${TARGET_SYS}"
# The same input gives the same bytes: no contraction (docs/decisions/0005-quantisation-kernels.md).
PIPIT_FLAGS = "-ffp-contract=off"
# The crate cc says -mfpu=vfpv3-d16, which outweighs march: without this there is no NEON.
PIPIT_FLAGS:append:arm = " -mfpu=${@d.getVar('PIPIT_MARCH').partition('+')[2]}"
TARGET_CFLAGS += "${PIPIT_FLAGS}"
TARGET_CXXFLAGS += "${PIPIT_FLAGS}"

SYSTEMD_SERVICE:${PN} = "pipit.service"

USERADD_PACKAGES = "${PN}"
USERADD_PARAM:${PN} = "--system --user-group --home-dir ${localstatedir}/lib/pipit --no-create-home --shell /sbin/nologin pipit"

do_install:append() {
    install -D -m 0644 ${S}/firmware-configs/systemd/pipit.service ${D}${systemd_system_unitdir}/pipit.service
    install -d -m 0755 ${D}${sysconfdir}/pipit/config.d
    sed 's|^#state_dir = |state_dir = |' ${S}/runtime/src/config/default.toml >${D}${sysconfdir}/pipit/config.toml
}

CONFFILES:${PN} = "${sysconfdir}/pipit/config.toml"
