################################################################################
#
# pipit
#
################################################################################

# The commit that is checked out in the repository that this tree is in. Taken with git, because only what is downloaded
# has its crates fetched (`cargo vendor`): the build itself is offline.
PIPIT_VERSION := $(shell git -C $(BR2_EXTERNAL_PIPIT_PATH) rev-parse HEAD)
PIPIT_SITE := file://$(shell git -C $(BR2_EXTERNAL_PIPIT_PATH) rev-parse --show-toplevel)
PIPIT_SITE_METHOD = git
PIPIT_LICENSE = MIT or Apache-2.0
PIPIT_LICENSE_FILES = LICENSE-MIT LICENSE-APACHE
PIPIT_DEPENDENCIES = host-cmake host-clang
# A device has a broker of its own.
PIPIT_CARGO_BUILD_OPTS = -p pipit --bin pipit --no-default-features

PIPIT_MARCH = $(call qstrip,$(BR2_PACKAGE_PIPIT_MARCH))
# ggml rounds the same everywhere without contraction (docs/decisions/0005-quantisation-kernels.md).
PIPIT_FLAGS = -ffp-contract=off

ifeq ($(BR2_aarch64),y)
# llama-cpp-sys-2 pins -march=armv8-a: the launcher puts the board's in its place.
PIPIT_CARGO_ENV = \
	PIPIT_MARCH=$(PIPIT_MARCH) \
	CMAKE_C_COMPILER_LAUNCHER=$(@D)/firmware-configs/compiler \
	CMAKE_CXX_COMPILER_LAUNCHER=$(@D)/firmware-configs/compiler
else ifeq ($(BR2_arm),y)
PIPIT_CARGO_ENV = GGML_CPU_ARM_ARCH=$(PIPIT_MARCH) GGML_LLAMAFILE=OFF
# The crate cc says -mfpu=vfpv3-d16, which outweighs march: without this there is no NEON.
PIPIT_FLAGS += -mfpu=$(subst armv7-a+,,$(PIPIT_MARCH))
else ifeq ($(BR2_riscv),y)
# ggml's default is a vector unit.
PIPIT_CARGO_ENV = $(foreach one,RVV RV_ZFH RV_ZVFH RV_ZICBOP RV_ZIHINTPAUSE,GGML_$(one)=OFF)
endif
PIPIT_CARGO_ENV += \
	LIBCLANG_PATH="$(HOST_DIR)/lib" \
	BINDGEN_EXTRA_CLANG_ARGS="--sysroot=$(STAGING_DIR)" \
	CFLAGS_$(subst -,_,$(RUSTC_TARGET_NAME))="$(TARGET_CFLAGS) $(PIPIT_FLAGS)" \
	CXXFLAGS_$(subst -,_,$(RUSTC_TARGET_NAME))="$(TARGET_CXXFLAGS) $(PIPIT_FLAGS)"

# Not `cargo install`, which takes no workspace.
define PIPIT_INSTALL_TARGET_CMDS
	$(INSTALL) -D -m 0755 $(@D)/target/$(RUSTC_TARGET_NAME)/$(if $(BR2_ENABLE_DEBUG),debug,release)/pipit $(TARGET_DIR)/usr/bin/pipit
	$(INSTALL) -d -m 0755 $(TARGET_DIR)/etc/pipit/config.d
	sed 's|^#state_dir = |state_dir = |' $(@D)/runtime/src/config/default.toml >$(TARGET_DIR)/etc/pipit/config.toml
endef

define PIPIT_INSTALL_INIT_SYSTEMD
	$(INSTALL) -D -m 0644 $(@D)/firmware-configs/systemd/pipit.service $(TARGET_DIR)/usr/lib/systemd/system/pipit.service
endef

define PIPIT_INSTALL_INIT_SYSV
	$(INSTALL) -D -m 0755 $(PIPIT_PKGDIR)/S90pipit $(TARGET_DIR)/etc/init.d/S90pipit
endef

define PIPIT_USERS
	pipit -1 pipit -1 * /var/lib/pipit - - Pipit
endef

$(eval $(cargo-package))
