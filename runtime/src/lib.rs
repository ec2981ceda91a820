//! A daemon that serves language models over MQTT on small boards.
