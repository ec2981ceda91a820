include $(sort $(wildcard $(BR2_EXTERNAL_PIPIT_PATH)/package/*/*.mk))
