################################################################################
#
# pipit
#
################################################################################

# The repository that this tree is in.
PIPIT_VERSION = 0.1.0
PIPIT_SITE = $(BR2_EXTERNAL_PIPIT_PATH)/../..
PIPIT_SITE_METHOD = local
PIPIT_LICENSE = MIT or Apache-2.0
PIPIT_LICENSE_FILES = LICENSE-MIT LICENSE-APACHE
PIPIT_DEPENDENCIES = host-cmake host-clang
PIPIT_CARGO_BUILD_OPTS = -p pipit --bin pipit

PIPIT_MARCH = $(call qstrip,$(BR2_PACKAGE_PIPIT_MARCH))

ifeq ($(BR2_aarch64),y)
# llama-cpp-sys-2 pins -march=armv8-a: the launcher puts the board's in its place.
PIPIT_CARGO_ENV = \
	PIPIT_MARCH=$(PIPIT_MARCH) \
	CMAKE_C_COMPILER_LAUNCHER=$(@D)/firmware-configs/compiler \
	CMAKE_CXX_COMPILER_LAUNCHER=$(@D)/firmware-configs/compiler
else ifeq ($(BR2_arm),y)
PIPIT_CARGO_ENV = GGML_CPU_ARM_ARCH=$(PIPIT_MARCH) GGML_LLAMAFILE=OFF
endif
PIPIT_CARGO_ENV += \
	BINDGEN_EXTRA_CLANG_ARGS="--sysroot=$(STAGING_DIR)" \
	CFLAGS_$(subst -,_,$(RUSTC_TARGET_NAME))="$(TARGET_CFLAGS) -ffp-contract=off" \
	CXXFLAGS_$(subst -,_,$(RUSTC_TARGET_NAME))="$(TARGET_CXXFLAGS) -ffp-contract=off"

define PIPIT_INSTALL_CONFIG
	$(INSTALL) -D -m 0644 $(@D)/runtime/src/config/default.toml $(TARGET_DIR)/etc/pipit/config.toml
endef
PIPIT_POST_INSTALL_TARGET_HOOKS += PIPIT_INSTALL_CONFIG

define PIPIT_INSTALL_INIT_SYSTEMD
	$(INSTALL) -D -m 0644 $(@D)/firmware-configs/systemd/pipit.service $(TARGET_DIR)/usr/lib/systemd/system/pipit.service
endef

define PIPIT_USERS
	pipit -1 pipit -1 * /var/lib/pipit - - Pipit
endef

$(eval $(cargo-package))
